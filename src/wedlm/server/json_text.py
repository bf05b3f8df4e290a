# SPDX-License-Identifier: Apache-2.0
"""Read JSON, or Python's literals, a character at a time from text that a model wrote, and write it down as clean JSON.

A parser is a generator: it is sent characters, raises ``NotParsed`` at the first one that is not allowed, and returns
where the value ends, so nothing inside a string can end it. The output is valid JSON and valid Unicode: a control
character in a string is escaped, half of a surrogate pair becomes U+FFFD, and numbers stay as they are.
"""

import re
from collections.abc import Generator

MAX_DEPTH = 48
_MAX_NUMBER = 400  # characters
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_SPACE = " \t\n\r"
_WORDS = {"t": ("true", "true"), "f": ("false", "false"), "n": ("null", "null")}
_PYTHON_WORDS = {**_WORDS, "T": ("True", "true"), "F": ("False", "false"), "N": ("None", "null")}
_ESCAPES = {one: "\\" + one for one in '"\\/bfnrt'}
_PYTHON_ESCAPES = {"'": "'", '"': '\\"', "\\": "\\\\", "\n": "", "a": "\\u0007", "b": "\\b", "f": "\\f", "n": "\\n"}
_PYTHON_ESCAPES |= {"r": "\\r", "t": "\\t", "v": "\\u000b", "0": "\\u0000"}
_HEXADECIMAL = {"x": 2, "u": 4, "U": 8}

Parser = Generator[None, str, str | None]  # returns the character after the value, if it had to be read
Word = Generator[None, str, str]


class NotParsed(Exception):
    """The text is not such a value."""


def space() -> Word:
    """The first character that is not white space."""
    while (character := (yield)) in _SPACE:
        pass
    return character


def expect(text: str) -> Generator[None, str, None]:
    """Exactly ``text``."""
    for expected in text:
        if (yield) != expected:
            raise NotParsed


class JsonText:
    """What has been read, as JSON, in ``out``. ``python``: also accepts strings in either quotation mark, True, False
    and None, tuples, and commas before a closing bracket."""

    def __init__(self, python: bool = False) -> None:
        self.out: list[str] = []
        self._python = python
        self._words = _PYTHON_WORDS if python else _WORDS

    def text(self, start: int = 0) -> str:
        """What was written after the first ``start`` pieces."""
        return "".join(self.out[start:])

    def value(self, first: str, depth: int = MAX_DEPTH) -> Parser:
        """Any value that begins with ``first``."""
        if first == '"' or (self._python and first == "'"):
            yield from self._string(first)
            return None
        if first == "{":
            yield from self.object(depth)
            return None
        if first == "[" or (self._python and first == "("):
            yield from self._array("]" if first == "[" else ")", depth)
            return None
        if first in self._words:
            word, written = self._words[first]
            yield from expect(word[1:])
            self.out.append(written)
            return None
        return (yield from self._number(first))

    def object(self, depth: int = MAX_DEPTH, fields: dict[str, str] | None = None) -> Generator[None, str, None]:
        """The rest of an object after its brace; ``fields``, if given, collects the JSON text of keys and
        their values."""
        if depth == 0:
            raise NotParsed
        self.out.append("{")
        character, first = (yield from space()), True
        while character != "}":
            if not first:
                self.out.append(", ")
            if character != '"' and not (self._python and character == "'"):
                raise NotParsed
            start = len(self.out)
            yield from self._string(character)
            key = self.text(start)
            if (yield from space()) != ":":
                raise NotParsed
            self.out.append(": ")
            start = len(self.out)
            character = (yield from self.value((yield from space()), depth - 1)) or (yield)
            if fields is not None:
                fields[key] = self.text(start)
            character, first = (yield from self._after_item(character, "}")), False
        self.out.append("}")

    def _array(self, close: str, depth: int) -> Generator[None, str, None]:
        if depth == 0:
            raise NotParsed
        self.out.append("[")
        character, first = (yield from space()), True
        while character != close:
            if not first:
                self.out.append(", ")
            character = (yield from self.value(character, depth - 1)) or (yield)
            character, first = (yield from self._after_item(character, close)), False
        self.out.append("]")

    def _after_item(self, character: str, close: str) -> Word:
        """The first character of the next item, or ``close``."""
        if character in _SPACE:
            character = yield from space()
        if character == close:
            return character
        if character != ",":
            raise NotParsed
        character = yield from space()
        if character == close and not self._python:
            raise NotParsed
        return character

    def _string(self, quote: str) -> Generator[None, str, None]:
        self.out.append('"')
        high = ""  # the first half of a pair, which waits for the second
        while (character := (yield)) != quote:
            piece, code = character, ord(character)
            if character == "\\":
                piece, code = yield from self._escape()
            elif character < " " or character == '"':
                piece = '\\"' if character == '"' else f"\\u{code:04x}"
            if high and 0xDC00 <= code < 0xE000:
                self.out.append(high + piece)
                high = ""
                continue
            if high:
                self.out.append("\ufffd")
            high = piece if 0xD800 <= code < 0xDC00 else ""
            if not high:
                self.out.append("\ufffd" if 0xDC00 <= code < 0xE000 else piece)
        self.out.append('\ufffd"' if high else '"')

    def _escape(self) -> Generator[None, str, tuple[str, int]]:
        """An escape after its backslash, as JSON, and its character's number if it might be half of a pair."""
        character = yield
        if character == "u" or (self._python and character in _HEXADECIMAL):
            digits = ""
            for _ in range(_HEXADECIMAL[character]):
                digits += yield
            try:
                code = int(digits, 16) if digits.isalnum() else -1
                whole = chr(code)
            except ValueError:
                raise NotParsed from None
            return (f"\\u{code:04x}" if code < 0x10000 else whole), code
        if self._python:
            if character in _PYTHON_ESCAPES:
                return _PYTHON_ESCAPES[character], 0
            return "\\\\" + (character if character >= " " else f"\\u{ord(character):04x}"), 0
        if character not in _ESCAPES:
            raise NotParsed
        return _ESCAPES[character], 0

    def _number(self, first: str) -> Word:
        digits, character = "", first
        while character in "+-.0123456789eE":
            digits += character
            if len(digits) > _MAX_NUMBER:
                raise NotParsed
            character = yield
        if not _NUMBER.fullmatch(digits):
            raise NotParsed
        self.out.append(digits)
        return character


def fields_of(text: str) -> dict[str, str]:
    """The fields of a whole JSON object, see ``JsonText.object``. Raises NotParsed."""
    fields: dict[str, str] = {}
    _read_object(text, JsonText(), fields)
    return fields


def clean_object(text: str) -> str:
    """A whole JSON object, written cleanly. Raises NotParsed."""
    written = JsonText()
    _read_object(text, written, None)
    return written.text()


def _read_object(text: str, written: JsonText, fields: dict[str, str] | None) -> None:
    """Read an object. Raises NotParsed unless it ends with the text's last character."""
    if not text.startswith("{"):
        raise NotParsed
    parser = written.object(fields=fields)
    next(parser)
    for index, character in enumerate(text[1:], 2):
        try:
            parser.send(character)
        except StopIteration:
            if index == len(text):
                return
            break
    raise NotParsed
