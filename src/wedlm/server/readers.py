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
    """What some more text adds to a message: content, calls (or more of their arguments) in OpenAI's form and in the
    order of their ``index``, reasoning."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    reasoning: str = ""

    def add(self, other: "Delta") -> None:
        """Add what ``other`` adds; arguments of a known call are appended to it."""
        self.content += other.content
        self.reasoning += other.reasoning
        for call in other.calls:
            place = call["index"] - self.calls[0]["index"] if self.calls else 0
            if place < len(self.calls):
                self.calls[place]["function"]["arguments"] += call["function"]["arguments"]
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
        self._lead: list[str] = []  # white space at the beginning: before a call it is not content
        self._beginning = True
        self._attempt: Generator[None, str, str | None] | None = None
        self._raw: list[str] = []  # of the attempt, since its last call
        self._num_calls, self._behind_call = 0, False  # white space after a call is not content
        self._contents: list[str] = []
        self._calls: list[dict[str, Any]] = []

    @property
    def called(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str) -> Delta:
        text, place = self._held + text, 0
        self._held = ""
        while place < len(text):
            if self._attempt is None:
                place = self._scan(text, place)
            else:
                text, place = self._read(text, place)
        return self._take()

    def finish(self, reason: str) -> Delta:
        raw = "".join([*self._lead, *self._raw, self._held])
        self._lead, self._raw, self._held, self._attempt = [], [], "", None
        if not (self.called and self._form.close.startswith(raw.strip())):
            self._content(raw)
        return self._take()

    def _take(self) -> Delta:
        delta = Delta("".join(self._contents), self._calls)
        self._contents, self._calls = [], []
        return delta

    def _content(self, text: str) -> None:
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        self._contents.append(text)

    def _scan(self, text: str, place: int) -> int:
        """Take content up to where a call may begin; return the place to continue at."""
        if self._beginning:
            return self._scan_beginning(text)
        places = [(found, tag) for tag in self._form.tags if (found := text.find(tag, place)) >= 0]
        if places:
            found, tag = min(places)
            self._content(text[place:found])
            self._begin(tag)
            return found + len(tag)
        sizes = range(min(self._longest - 1, len(text) - place), 0, -1)
        kept = next((size for size in sizes if any(tag.startswith(text[-size:]) for tag in self._form.tags)), 0)
        free = len(text) - kept
        self._content(text[place:free])
        self._held = text[free:]
        return len(text)

    def _scan_beginning(self, text: str) -> int:
        """As ``_scan``, for the beginning of the answer."""
        first = text.lstrip()
        start = len(text) - len(first)
        self._lead.append(text[:start])
        opened = next((tag for tag in self._form.tags if first.startswith(tag)), "")
        if not opened and any(tag.startswith(first) for tag in self._form.tags):  # or first is empty
            self._held = first
            return len(text)
        self._beginning, lead, self._lead = False, "".join(self._lead), []
        if opened or self._form.bare:
            self._begin(lead + opened)
        else:
            self._content(lead)
        return start + len(opened)

    def _begin(self, opening: str) -> None:
        self._raw, self._attempt = [opening], self._form.grammar(self._emit, opening)
        next(self._attempt)

    def _read(self, text: str, place: int) -> tuple[str, int]:
        """Give text to the attempt until it ends, one way or the other; return the text and where to continue."""
        assert self._attempt is not None
        raw, send = self._raw, self._attempt.send
        for index in range(place, len(text)):
            character = text[index]
            raw.append(character)
            try:
                send(character)
            except StopIteration:
                self._raw, self._attempt = [], None
                return text, index + 1
            except NotParsed:
                self._raw, self._attempt = [], None
                tail = min(self._longest, len(raw) - 1)
                self._content("".join(raw[: len(raw) - tail]))
                if tail <= index + 1:
                    return text, index + 1 - tail
                earlier = raw[len(raw) - tail : len(raw) - index - 1]  # was not in this text
                return "".join(earlier) + text, 0
        return text, len(text)

    def _emit(self, name: str, arguments: str) -> None:
        if name not in self._names:
            raise NotParsed
        self._raw[:], self._behind_call = [""], True
        if self._num_calls < self._most:
            self._num_calls += 1
            self._calls.append(_opening(self._num_calls - 1, name, arguments))


class ThinkReader:
    """Splits off what stands between <think> and </think> at the beginning as reasoning, without the white space around
    it; ``inner`` reads the rest. ``inside``: the prompt has opened it. Without the closing tag everything is reasoning.
    """

    def __init__(self, inner: Reader, inside: bool) -> None:
        self._inner, self._held = inner, ""  # what may become a tag
        self._spaces: list[str] = []  # white space before it, which may belong to the reasoning or not
        self._state = "inside" if inside else "before"
        self._empty = True  # no reasoning yet

    @property
    def called(self) -> bool:
        return self._inner.called

    def push(self, text: str) -> Delta:
        text, self._held = self._held + text, ""
        delta = Delta()
        if self._state == "before":
            text = self._begin(text)
        if self._state == "inside":
            delta.reasoning, text = self._think(text)
        if self._state == "after":  # white space between the two belongs to neither
            text = text.lstrip()
            self._state = "behind" if text else "after"
        if self._state == "behind" and text:
            delta.add(self._inner.push(text))
        return delta

    def finish(self, reason: str) -> Delta:
        rest = "".join([*self._spaces, self._held])
        delta = Delta()
        if self._state == "inside" and self._held:
            delta.reasoning = self._held if self._empty else rest
        elif self._state == "before":
            delta.add(self._inner.push(rest))
        delta.add(self._inner.finish(reason))
        return delta

    def _begin(self, text: str) -> str:
        """Find out whether there is reasoning at all; return what is left to read."""
        opening, begun = THINK[0], text.lstrip()
        self._spaces.append(text[: len(text) - len(begun)])
        if begun.startswith(opening):
            self._state, self._spaces = "inside", []
            return begun[len(opening) :]
        if opening.startswith(begun):
            self._held = begun
            return ""
        self._state, before, self._spaces = "behind", "".join(self._spaces), []
        return before + begun

    def _think(self, text: str) -> tuple[str, str]:
        """The part of the text that certainly belongs to the reasoning, and what stands after the closing tag."""
        thought, closing, rest = text.partition(THINK[1])
        if not closing:
            kept = next((size for size in range(len(THINK[1]) - 1, 0, -1) if text.endswith(THINK[1][:size])), 0)
            thought, self._held = text[: len(text) - kept], text[len(text) - kept :]
        shown = thought.rstrip()
        end = thought[len(shown) :]
        if shown:
            shown = shown.lstrip() if self._empty else "".join([*self._spaces, shown])
            self._empty, self._spaces = False, []
        self._spaces.append(end)
        if closing:
            self._state, self._spaces = "after", []
        return shown, rest


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
