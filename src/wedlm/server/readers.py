# SPDX-License-Identifier: Apache-2.0
"""Turn the text of an answer, as it comes, into content and calls."""

import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Protocol

from wedlm.server.json_text import JsonText, NotParsed
from wedlm.server.tool_forms import ToolForm

THINK = ("<think>", "</think>")
_FORCED_OPENING = re.compile(r'\s*\{\s*"name"\s*:\s*("[^"]*")\s*,\s*"arguments"\s*:\s*(\S)')


@dataclass(slots=True)
class Delta:
    """What some more text adds to a message: content, calls (or more of their arguments) in OpenAI's form,
    reasoning."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""

    def add(self, other: "Delta") -> None:
        """Add what ``other`` adds; arguments of a known call are appended to it."""
        self.content += other.content
        self.reasoning += other.reasoning
        known = {call["index"]: call for call in self.calls}
        for call in other.calls:
            if call["index"] in known:
                known[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            else:
                self.calls.append(call)


class Reader(Protocol):
    """Turns the text of one choice into content and calls."""

    def push(self, text: str) -> Delta:
        """More text, which is final."""

    def finish(self, reason: str) -> Delta:
        """No more text follows, for ``reason``."""

    @property
    def called(self) -> bool: ...


class PlainReader:
    """All text is content."""

    called = False

    def push(self, text: str) -> Delta:
        return Delta(text)

    def finish(self, reason: str) -> Delta:
        return Delta()


class CallReader:
    """Calls of known functions in the form of the model; everything else is content.

    If text that began as a call turns out not to be one, it becomes content and reading continues after it. Its inside
    is not read as a call again, so that each character is read a few times at most.
    """

    def __init__(self, form: ToolForm, names: Sequence[str], parallel: bool) -> None:
        self._form, self._names, self._most = form, frozenset(names), 2**31 if parallel else 1
        self._longest = max(map(len, form.tags))
        self._held = ""  # what may become a tag
        self._beginning = True  # white space before a call is not content either
        self._attempt: Generator[None, str, str | None] | None = None
        self._raw: list[str] = []  # of the attempt, since its last call
        self._num_calls, self._behind_call = 0, False  # white space after a call is not content
        self._delta = Delta()

    @property
    def called(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str) -> Delta:
        pending = self._held + text
        self._held = ""
        while pending:
            pending = self._scan(pending) if self._attempt is None else self._read(pending)
        return self._take()

    def finish(self, reason: str) -> Delta:
        raw, self._held, self._attempt = "".join(self._raw) + self._held, "", None
        if not (self.called and self._form.close.startswith(raw.strip())):
            self._content(raw)
        return self._take()

    def _take(self) -> Delta:
        delta, self._delta = self._delta, Delta()
        return delta

    def _content(self, text: str) -> None:
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        self._delta.content += text

    def _scan(self, text: str) -> str:
        """Yield content up to where a call may begin; return the rest."""
        if self._beginning:
            start = len(text) - len(text.lstrip())
            first = text[start:]
            opened = next((tag for tag in self._form.tags if first.startswith(tag)), "")
            if not opened and any(tag.startswith(first) for tag in self._form.tags):  # or first is empty
                self._held = text
                return ""
            self._beginning = False
            if opened or self._form.bare:
                end = start + len(opened)
                return self._begin(text[:end], text[end:])
        places = [(place, tag) for tag in self._form.tags if (place := text.find(tag)) >= 0]
        if places:
            place, tag = min(places)
            self._content(text[:place])
            return self._begin(tag, text[place + len(tag) :])
        sizes = range(min(self._longest - 1, len(text)), 0, -1)
        kept = next((size for size in sizes if any(tag.startswith(text[-size:]) for tag in self._form.tags)), 0)
        free = len(text) - kept
        self._content(text[:free])
        self._held = text[free:]
        return ""

    def _begin(self, opening: str, rest: str) -> str:
        self._raw, self._attempt = [opening], self._form.grammar(self._emit, opening)
        next(self._attempt)
        return rest

    def _read(self, text: str) -> str:
        """Give text to the attempt until it ends, one way or the other; return the rest."""
        assert self._attempt is not None
        for index, character in enumerate(text):
            self._raw.append(character)
            try:
                self._attempt.send(character)
            except StopIteration:
                self._raw, self._attempt = [], None
                return text[index + 1 :]
            except NotParsed:
                self._attempt = None
                raw, self._raw = self._raw, []
                tail = min(self._longest, len(raw) - 1)
                self._content("".join(raw[: len(raw) - tail]))
                return "".join(raw[len(raw) - tail :]) + text[index + 1 :]
        return ""

    def _emit(self, name: str, arguments: str) -> None:
        if name not in self._names:
            raise NotParsed
        self._raw, self._behind_call = [""], True
        if self._num_calls < self._most:
            self._num_calls += 1
            self._delta.calls.append(_opening(self._num_calls - 1, name, arguments))


class ThinkReader:
    """Splits off what stands between <think> and </think> at the beginning as reasoning, without the white space around
    it; ``inner`` reads the rest. ``inside``: the prompt has opened it. Without the closing tag everything is reasoning.
    """

    def __init__(self, inner: Reader, inside: bool) -> None:
        self._inner, self._held = inner, ""
        self._state = "inside" if inside else "before"
        self._empty = True  # no reasoning yet

    @property
    def called(self) -> bool:
        return self._inner.called

    def push(self, text: str) -> Delta:
        self._held += text
        delta = Delta()
        opening, closing = THINK
        if self._state == "before":
            begun = self._held.lstrip()
            if begun.startswith(opening):
                self._state, self._held = "inside", begun[len(opening) :]
            elif not opening.startswith(begun):
                self._state = "behind"
        if self._state == "inside":
            thought, found, rest = self._held.partition(closing)
            delta.reasoning, self._held = self._thought(thought) if found else self._shown(thought)
            if found:
                self._state, self._held = "after", rest
        if self._state == "after":  # white space between the two belongs to neither
            self._held = self._held.lstrip()
            self._state = "behind" if self._held else "after"
        if self._state == "behind" and self._held:
            delta.add(self._inner.push(self._held))
            self._held = ""
        return delta

    def finish(self, reason: str) -> Delta:
        delta = Delta()
        if self._state == "inside":
            delta.reasoning = self._thought(self._held)[0]
        elif self._state == "before":
            delta.add(self._inner.push(self._held))
        delta.add(self._inner.finish(reason))
        return delta

    def _thought(self, text: str) -> tuple[str, str]:
        return (text.strip() if self._empty else text.rstrip()), ""

    def _shown(self, text: str) -> tuple[str, str]:
        """The part of the reasoning that certainly belongs to it, and the rest, which is white space or may become the
        tag."""
        text = text.lstrip() if self._empty else text
        closing = THINK[1]
        kept = next((size for size in range(len(closing) - 1, 0, -1) if text.endswith(closing[:size])), 0)
        end = len(text[: len(text) - kept].rstrip())
        self._empty = self._empty and end == 0
        return text[:end], text[end:]


class ForcedReader:
    """The text is one call, whose arguments are passed on as they come; a text that is cut before them is not
    a call."""

    def __init__(self) -> None:
        self._head, self._arguments = "", JsonText()
        self._parser: Generator[None, str, str | None] | None = None
        self.called = False

    def push(self, text: str) -> Delta:
        delta = Delta()
        if not self.called:
            self._head += text
            match = _FORCED_OPENING.match(self._head)
            if match is None:
                return delta
            self.called, text = True, self._head[match.end() :]
            delta.calls.append(_opening(0, json.loads(match[1]), ""))
            self._parser = self._arguments.value(match[2])
            next(self._parser)
        for character in text:
            if self._parser is None:
                break
            try:
                self._parser.send(character)
            except (StopIteration, NotParsed):
                self._parser = None
        more = self._arguments.text()
        self._arguments.out.clear()
        if more:
            delta.add(Delta(calls=[{"index": 0, "function": {"arguments": more}}]))
        return delta

    def finish(self, reason: str) -> Delta:
        return Delta()


def _opening(index: int, name: str, arguments: str) -> dict[str, Any]:
    return {
        "index": index,
        "id": f"call_{token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def message(delta: Delta) -> Mapping[str, Any]:
    """A whole answer's message."""
    calls = [{name: value for name, value in call.items() if name != "index"} for call in delta.calls]
    content = None if calls and not delta.content else delta.content
    whole = {"role": "assistant", "content": content, "refusal": None}
    if delta.reasoning:
        whole["reasoning_content"] = delta.reasoning
    return {**whole, "tool_calls": calls} if calls else whole
