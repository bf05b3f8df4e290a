# SPDX-License-Identifier: Apache-2.0
"""The forms in which models write calls: how a call begins, is read and is written, and which form a model uses.

The text is a stranger's. A call ends where its JSON (or Python) ends, whatever its strings contain, and text that turns
out not to call a known function is content. Reading takes time in proportion to the text.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from wedlm.server.json_text import JsonText, NotParsed, clean_object, expect, fields_of, space

Emit = Callable[[str, str], None]  # a function's name and the JSON text of its arguments; NotParsed for an unknown name
Grammar = Callable[[Emit, str], Generator[None, str, str | None]]
_NAME = re.compile(r"[A-Za-z0-9_.-]")
_MAX_NAME = 64
_ENCODER = json.JSONEncoder(ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class ToolForm:
    """``grammar(emit, opening)`` reads what follows ``opening``: one of ``tags``, which may stand anywhere, or nothing
    at the beginning of the answer if the form is ``bare``. It returns a character that it has read too far. ``close``
    may stand after the last call. ``signs``: what a chat template contains that teaches this form. ``call_grammar``:
    Lark rules for ``calls`` of a rule ``call``; None if a call is not JSON."""

    name: str
    tags: tuple[str, ...]
    bare: bool
    close: str
    grammar: Grammar
    example: str
    write: Callable[[Sequence[dict[str, Any]]], str]
    signs: tuple[str, ...]
    call_grammar: str | None = None

    @property
    def more_calls(self) -> str:
        """The part of ``call_grammar`` that lets calls follow the first one."""
        found = re.search(r"\(.*\)\*", self.call_grammar or "")
        return "" if found is None else found[0]


def _call(fields: dict[str, str]) -> tuple[str, str]:
    """The name and the arguments (JSON text of an object) of a call that was written as an object."""
    if fields.get('"function"', "").startswith("{"):  # as OpenAI's calls are
        fields = fields_of(fields['"function"'])
    name = fields.get('"name"', fields.get('"function"', ""))
    arguments = fields.get('"arguments"', fields.get('"parameters"', "null"))
    if not name.startswith('"'):
        raise NotParsed
    if arguments.startswith('"'):  # JSON that was encoded twice
        arguments = json.loads(arguments).strip()
        arguments = clean_object(arguments) if arguments not in ("", "null") else "null"
    if arguments == "null":
        arguments = "{}"
    if not arguments.startswith("{"):
        raise NotParsed
    return json.loads(name), arguments


def _object(emit: Emit) -> Generator[None, str, None]:
    """The rest of a call's object after its brace."""
    fields: dict[str, str] = {}
    yield from JsonText().object(fields=fields)
    emit(*_call(fields))


def _hermes(emit: Emit, opening: str) -> Generator[None, str, str | None]:
    if (yield from space()) != "{":
        raise NotParsed
    yield from _object(emit)
    if (yield from space()) != "<":
        raise NotParsed
    yield from expect("/tool_call>")
    return None


def _llama3(emit: Emit, opening: str) -> Generator[None, str, str | None]:
    character = yield from space()
    while character == "{":
        yield from _object(emit)
        character = yield from space()
        if character == ";":
            character = yield from space()
    raise NotParsed


def _mistral(emit: Emit, opening: str) -> Generator[None, str, str | None]:
    """A list of objects, or, as newer models write it, a name and the arguments."""
    character = yield from space()
    if character == "[":
        character = ","
        while character == ",":
            if (yield from space()) != "{":
                raise NotParsed
            yield from _object(emit)
            character = yield from space()
        if character != "]":
            raise NotParsed
        return None
    name = ""
    while _NAME.match(character) and len(name) < _MAX_NAME:
        name += character
        character = yield
    if character == "[":
        yield from expect("ARGS]")
        character = yield from space()
    if not name or character != "{":
        raise NotParsed
    arguments = JsonText()
    yield from arguments.object()
    emit(name, arguments.text())
    return None


def _pythonic(emit: Emit, opening: str) -> Generator[None, str, str | None]:
    if (yield from space()) != "[":
        raise NotParsed
    character = ","
    while character == ",":
        name, character = yield from _word((yield from space()))
        if character != "(":
            raise NotParsed
        arguments: list[str] = []
        character = yield from space()
        while character != ")":
            argument, character = yield from _word(character)
            if character in " \t\n\r":
                character = yield from space()
            if character != "=":
                raise NotParsed
            value = JsonText(python=True)
            character = (yield from value.value((yield from space()))) or (yield)
            arguments.append(f'"{argument}": {value.text()}')
            if character in " \t\n\r":
                character = yield from space()
            if character == ",":
                character = yield from space()
            elif character != ")":
                raise NotParsed
        emit(name, "{" + ", ".join(arguments) + "}")
        character = yield from space()
    if character != "]":
        raise NotParsed
    return None


def _word(first: str) -> Generator[None, str, tuple[str, str]]:
    """A name that begins with ``first``, and the character after it."""
    word, character = "", first
    while _NAME.match(character) and len(word) < _MAX_NAME:
        word += character
        character = yield
    if not word:
        raise NotParsed
    return word, character


def written(value: Any) -> str:
    """JSON, piece by piece, because a megabyte in one call would keep all other threads waiting."""
    return "".join(_ENCODER.iterencode(value))


def _write_hermes(calls: Sequence[dict[str, Any]]) -> str:
    return "\n".join(f"<tool_call>\n{written(call)}\n</tool_call>" for call in calls)


def _write_llama3(calls: Sequence[dict[str, Any]]) -> str:
    return "; ".join(written({"name": call["name"], "parameters": call["arguments"]}) for call in calls)


def _write_mistral(calls: Sequence[dict[str, Any]]) -> str:
    return f"[TOOL_CALLS]{written(list(calls))}"


def _write_pythonic(calls: Sequence[dict[str, Any]]) -> str:
    def arguments(given: Any) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in given.items()) if isinstance(given, dict) else ""

    return "[" + ", ".join(f"{call['name']}({arguments(call['arguments'])})" for call in calls) + "]"


HERMES = ToolForm(
    "hermes",
    ("<tool_call>",),
    False,
    "</tool_call>",
    _hermes,
    '<tool_call>{"name": ..., "arguments": {...}}</tool_call>',
    _write_hermes,
    ("<tool_call>",),
    r'''calls: one (/\n?/ one)*
one: "<tool_call>" /\n?/ call /\n?/ "</tool_call>"''',
)
FORMS = {
    form.name: form
    for form in (
        HERMES,
        ToolForm(
            "mistral",
            ("[TOOL_CALLS]",),
            True,
            "]",
            _mistral,
            '[TOOL_CALLS][{"name": ..., "arguments": {...}}]',
            _write_mistral,
            ("[TOOL_CALLS]",),
            r'''calls: "[" call (/, ?/ call)* "]"''',
        ),
        ToolForm(
            "pythonic",
            ("<|python_tag|>",),
            True,
            "]",
            _pythonic,
            "[function_name(argument=..., another=...)]",
            _write_pythonic,
            ("[func_name1(", "[func1(", "func_name1(params_name1="),
        ),
        ToolForm(
            "llama3",
            ("<|python_tag|>",),
            True,
            "",
            _llama3,
            '{"name": ..., "parameters": {...}}',
            _write_llama3,
            ("<|python_tag|>", '"parameters": dictionary', '"parameters": '),
            r"""calls: call (/; ?/ call)*""",
        ),
    )
}


def form_of(template: str | None) -> ToolForm:
    """The form that a chat template teaches, or Hermes' if it teaches none."""
    signs = ((sign, form) for form in FORMS.values() for sign in form.signs)
    return next((form for sign, form in signs if template and sign in template), HERMES)
