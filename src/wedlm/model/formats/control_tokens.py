# SPDX-License-Identifier: Apache-2.0
"""Distinguish control tokens that a chat template writes from their spelling in a message.

A prompt is one text, and a tokenizer that reads it cannot see who wrote what: ``<|im_end|>`` in a user's message would
end their turn. So the template is rendered a second time, with other characters in place of the messages' punctuation.
Where both renderings agree, each character's origin is known, and a control token that contains a character from a
message is cut in two, which makes it ordinary text. A prompt without such a token is encoded in one piece, as usual.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import tokenizers

# How often messages may spell one; each time their text is cut, and each piece is encoded by itself.
MAX_SPELLED = 10_000
_AT_ONCE = 2**16  # characters, in one call of a library that lets no other thread run meanwhile
# Where stand-ins for characters are taken from: code points that Unicode leaves to private use.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """The text of a prompt, and between which of its characters (``cuts``, ascending) no token may reach across."""

    text: str
    cuts: tuple[int, ...] = ()

    def pieces(self, start: int = 0, end: int | None = None) -> list[str]:
        """The parts of ``text[start:end]`` that are encoded separately."""
        end = len(self.text) if end is None else end
        edges = [start, *(cut for cut in self.cuts if start < cut < end), end]
        return [self.text[a:b] for a, b in pairwise(edges)]


class ControlTokens:
    """The tokens of a tokenizer that structure a prompt instead of standing for text.

    They are the added tokens that are special, that have a name such as "eos_token", or that are written <|so|>. Others
    (Qwen's <think> and <tool_call>) are markup that replies contain, and are tokens in every text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, named: Iterable[str]) -> None:
        added = backend.get_added_tokens_decoder()
        named = set(named)
        chosen = {
            token_id: token
            for token_id, token in added.items()
            if token.special or token.content in named or re.fullmatch(r"<\|.*\|>", token.content, re.DOTALL)
        }
        others = {token_id: text for text in named if (token_id := backend.token_to_id(text)) is not None}
        self._backend = backend
        self.ids = frozenset(chosen.keys() | others.keys())
        self.spellings = frozenset(chain((token.content for token in chosen.values()), others.values())) - {""}
        self._scanner, self._scanner_ids = backend, self.ids
        if others.keys() <= chosen.keys():  # all are found before the model is asked
            self._scanner = _without_model(backend)
            found = self._scanner.get_added_tokens_decoder().items()
            self._scanner_ids = frozenset(token_id for token_id, token in found if token.content in self.spellings)
        self._normalized = backend.normalizer is not None and any(token.normalized for token in chosen.values())
        self._triggers = frozenset(chain.from_iterable(map(_triggers, self.spellings)))
        # A token may be split between two messages; the larger part has at least two characters.
        self._heads = {full[:size] for full in self.spellings for size in range(2, len(full))}
        self._tails = {full[-size:] for full in self.spellings for size in range(2, len(full))}
        self._longest = max(map(len, self.spellings), default=0)
        whole = "|".join(re.escape(text) for text in sorted(self.spellings, key=len, reverse=True))
        self._spelling = re.compile(f"(?=({whole}))") if whole else None

    def prompt(
        self,
        render: Callable[[Mapping[str, Any]], str],
        contents: Mapping[str, Any],
        constants: Callable[[], Iterable[str]],
    ) -> ChatPrompt:
        """The prompt that ``render`` makes from ``contents`` (JSON-like values), in which no control token comes from
        the contents.

        ``render`` must give the same text for the same contents; ``constants`` gives the strings that it may compare
        contents with. Raises ValueError if contents spell a control token and ``render`` rewrites them.
        """
        text = render(contents)
        strings = list(_strings(contents))
        triggers = self._triggers_in(strings)
        if self._spelling is None or not any(character in one for one in strings for character in triggers):
            return ChatPrompt(text)
        stand_ins = _stand_ins(triggers, set(text).union(*strings))
        # What the template looks for ("</think>") must be found, or it writes something else.
        kept = [one for one in constants() if len(one) > 1 and not triggers.isdisjoint(one)]
        kept = [one for one in kept if not any(one in full or full in one for full in self.spellings)]
        for mark in (_marker(stand_ins, kept), _spelling_marker(stand_ins, self._occurrences)):
            changed = {name: _map_strings(value, mark) for name, value in contents.items()}
            if changed == contents:
                return ChatPrompt(text)
            try:
                marked = render(changed)
            except ValueError:
                continue  # the template refuses what it does not know
            if _unmarked(marked, stand_ins) == text:
                return ChatPrompt(text, self._cuts(text, marked, frozenset(stand_ins.values())))
        raise ValueError(
            f"a message spells a control token ({self._first_spelling(strings)}) and the chat template rewrites it; "
            "expected messages without control tokens"
        )

    def _triggers_in(self, strings: Sequence[str]) -> frozenset[str]:
        """The characters of which every control token has at least one."""
        if not self._normalized:
            return self._triggers
        found = set(self._triggers)
        for character in set().union(*strings):
            if not character.isascii() or character.isupper():
                plain = self._backend.normalizer.normalize_str(character)
                if not plain or found & set(plain):
                    found.add(character)
        return frozenset(found)

    def _occurrences(self, text: str) -> list[tuple[int, int]]:
        """Spans of ``text`` that are control tokens, or that are parts of one at its ends."""
        found = self._spans([text])[0]
        inner = text.strip()
        before, after = text.index(inner), text.index(inner) + len(inner)
        sizes = range(2, min(len(inner), self._longest) + 1)
        found += [(before, before + size) for size in sizes if inner[:size] in self._tails]
        found += [(after - size, after) for size in sizes if inner[-size:] in self._heads]
        if 2 <= len(inner) <= self._longest and any(inner in full for full in self.spellings):
            found.append((before, after))
        return found

    def _cuts(self, text: str, marked: str, marks: frozenset[str]) -> tuple[int, ...]:
        """Where to cut ``text`` so that no control token contains a character that is one of ``marks`` in
        ``marked``."""

        def is_foreign(start: int, end: int) -> bool:
            return not marks.isdisjoint(marked[start:end])

        spelled = sum(is_foreign(*span) for span in self._spellings(text, 0, len(text)))
        if not self._normalized and not spelled:
            return ()
        cuts: set[int] = set()
        pending = [(0, len(text))]
        while pending:
            if max(spelled, len(cuts)) > MAX_SPELLED:
                raise ValueError(
                    f"the messages spell {max(spelled, len(cuts))} control tokens; expected at most {MAX_SPELLED}"
                )
            again = []
            for (start, end), spans in zip(pending, self._spans([text[a:b] for a, b in pending]), strict=True):
                new = []
                for first, last in spans:
                    if not is_foreign(start + first, start + last):
                        continue
                    spelling = text[start + first : start + last]
                    cut = start + first + len(spelling) - len(spelling.lstrip()) + 1
                    if cut >= start + last:
                        raise ValueError(
                            f"a message contains {spelling!r}, a control token of one character that cannot be written "
                            "as text; expected messages without it"
                        )
                    new.append(cut)
                cuts.update(new)
                again += list(pairwise([start, *new, end])) if new else []
            if not self._normalized:
                again = [one for one in again if any(is_foreign(*span) for span in self._spellings(text, *one))]
            pending = again
        return tuple(sorted(cuts))

    def _spellings(self, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Spans within ``text[start:end]`` that read like a control token; they may overlap."""
        assert self._spelling is not None
        for first in range(start, end, _AT_ONCE):
            for found in self._spelling.finditer(text, first, min(end, first + _AT_ONCE + self._longest - 1)):
                if found.start() < first + _AT_ONCE:
                    yield found.span(1)

    def _spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where control tokens are in each text, as the tokenizer finds them."""
        ids = self._scanner_ids
        found = self._scanner.encode_batch(texts, add_special_tokens=False)  # one text alone would keep the GIL
        return [[span for token, span in zip(one.ids, one.offsets, strict=True) if token in ids] for one in found]

    def _first_spelling(self, strings: Iterable[str]) -> str:
        found = (full for one in strings for full in sorted(self.spellings) if full in one)
        return repr(next(found, "a part of one"))


def _triggers(spelling: str) -> set[str]:
    """A spelling's punctuation. (A template that joins a role to a token joins letters.)"""
    return {one for one in spelling if not (one.isalnum() or one.isspace() or one == "_")} or {spelling.strip()[:1]}


def _without_model(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer with the added tokens of another, to which all text between them is one unknown word."""
    added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    unknown = "?" * (1 + max((len(token.content) for token in added), default=0))
    scanner = tokenizers.Tokenizer(tokenizers.models.WordLevel({unknown: 0}, unk_token=unknown))
    if backend.normalizer is not None:
        scanner.normalizer = backend.normalizer
    scanner.encode_special_tokens = backend.encode_special_tokens
    scanner.add_tokens(added)
    return scanner


def _stand_ins(triggers: frozenset[str], used: set[str]) -> dict[str, str]:
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    stand_ins = dict(zip(sorted(triggers), free, strict=False))
    if len(stand_ins) < len(triggers):
        raise ValueError("the messages use every private character of Unicode; expected some to be left")
    return stand_ins


def _unmarked(text: str, stand_ins: Mapping[str, str]) -> str:
    return _replaced(text, {mark: original for original, mark in stand_ins.items()})


def _replaced(text: str, table: Mapping[str, str]) -> str:
    """``text.translate`` for a few characters, none of which comes from another, in a tenth of the time."""
    for old, new in table.items():
        text = text.replace(old, new)
    return text


def _marker(stand_ins: Mapping[str, str], kept: Sequence[str]) -> Callable[[str], str]:
    if not kept:
        return lambda text: _replaced(text, stand_ins)
    longest_first = sorted(kept, key=len, reverse=True)
    parts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def mark(text: str) -> str:
        pieces = parts.split(text)  # every other one is kept
        return "".join(piece if number % 2 else _replaced(piece, stand_ins) for number, piece in enumerate(pieces))

    return mark


def _spelling_marker(
    stand_ins: Mapping[str, str], occurrences: Callable[[str], list[tuple[int, int]]]
) -> Callable[[str], str]:
    def mark(text: str) -> str:
        characters = list(text)
        for start, end in occurrences(text):
            characters[start:end] = _replaced(text[start:end], stand_ins)
        return "".join(characters)

    return mark


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(_strings, chain(value.keys(), value.values())))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(_strings, value))


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        changed = [_map_strings(one, change) for one in value]
        return tuple(changed) if isinstance(value, tuple) else changed
    return value
