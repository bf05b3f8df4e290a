# SPDX-License-Identifier: Apache-2.0
"""Tools: how the prompt tells of them, the schema of a forced call, and calls read from the text as it comes."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Protocol

from wedlm.server.tool_schemas import Tool

if TYPE_CHECKING:  # the process that parses bodies imports this file, and must not load torch
    from wedlm.model import Tokenizer

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_INSTRUCTIONS = (
    "You can call these tools, given as JSON, one a line:\n{tools}\n"
    f'To call one, write {OPEN}{{{{"name": ..., "arguments": {{{{...}}}}}}}}{CLOSE} and nothing else. '
    "Its result then comes in a message."
)
_FORCED_OPENING = re.compile(r'\s*\{\s*"name"\s*:\s*("[^"]*")\s*,\s*"arguments"\s*:\s*(?=\S)')
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_SURROGATE = re.compile("[\ud800-\udfff]")

Message = dict[str, Any]


def takes_tools(tokenizer: "Tokenizer") -> bool:
    """Whether the chat template writes the tools that it is given."""
    messages = [{"role": "user", "content": "x"}]
    probe = [{"type": "function", "function": {"name": "probe_name", "description": "", "parameters": {}}}]
    try:
        return "probe_name" in tokenizer.apply_chat_template(messages, tools=probe)
    except ValueError:
        return False


def in_plain_words(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation for a template that knows no tools: told in the system message, calls and results as text."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    told = _INSTRUCTIONS.format(tools="\n".join(_written(_described(tool)) for tool in tools))
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _plain(message: Message) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [f"{OPEN}\n{_written(call['function'])}\n{CLOSE}" for call in message.get("tool_calls", ())]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join([*([message["content"]] if message["content"] else []), *calls])}


def _written(value: Any) -> str:
    """JSON, piece by piece: a megabyte in one call would keep all other threads waiting."""
    return "".join(_ENCODER.iterencode(value))


def _described(tool: Tool) -> dict[str, Any]:
    return tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as chat templates expect them."""
    defaults = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return [{"type": "function", "function": {**defaults, **_described(tool)}} for tool in tools]


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of one call of one of the tools. Each tool's parameters stand under ``$defs``, where what they refer
    to inside themselves is found again."""
    definitions = {
        f"tool{i}": _moved(tool.function.parameters or {"type": "object"}, f"#/$defs/tool{i}")
        for i, tool in enumerate(tools)
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": f"#/$defs/tool{i}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    return {"$defs": definitions, **(calls[0] if len(calls) == 1 else {"anyOf": calls})}


def _moved(schema: Any, root: str) -> Any:
    """A schema whose references to itself start at ``root``."""
    if isinstance(schema, list):
        return [_moved(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: root + value[1:]
        if name == "$ref" and isinstance(value, str) and value[:1] == "#"
        else _moved(value, root)
        for name, value in schema.items()
    }


@dataclass(slots=True)
class Delta:
    """What some more text adds to a message: content, and calls (or more of their arguments) in OpenAI's form."""

    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: "Delta") -> None:
        """Take over what ``other`` adds; arguments of a call that is here already are appended to it."""
        self.content += other.content
        known = {call["index"]: call for call in self.calls}
        for call in other.calls:
            if call["index"] in known:
                known[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            else:
                self.calls.append(call)


class Reader(Protocol):
    """Turns the text of one choice into content and calls."""

    def push(self, text: str) -> Delta:
        """More text, none of which will change."""

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


class TaggedReader:
    """Calls stand between tags, as JSON; everything else is content, also a call that is none of the known tools'."""

    def __init__(self, names: Sequence[str], parallel: bool) -> None:
        self._names, self._most = frozenset(names), 2**31 if parallel else 1
        self._held, self._inside, self._num_calls = "", False, 0

    @property
    def called(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str) -> Delta:
        self._held += text
        delta = Delta()
        while True:
            tag = CLOSE if self._inside else OPEN
            before, found, after = self._held.partition(tag)
            if not found:
                break
            delta.add(self._call(before, CLOSE) if self._inside else self._content(before))
            self._held, self._inside = after, not self._inside
        if not self._inside:
            sizes = range(min(len(OPEN) - 1, len(self._held)), 0, -1)
            kept = next((size for size in sizes if self._held.endswith(OPEN[:size])), 0)
            free = len(self._held) - kept
            delta.add(self._content(self._held[:free]))
            self._held = self._held[free:]
        return delta

    def finish(self, reason: str) -> Delta:
        held, self._held = self._held, ""
        return self._call(held, "") if self._inside else self._content(held)

    def _content(self, text: str) -> Delta:
        return Delta("" if self.called and not text.strip() else text)  # white space around calls is no content

    def _call(self, text: str, close: str) -> Delta:
        try:
            call = json.loads(text)
            arguments = _arguments(call)
        except (ValueError, RecursionError):
            call = None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self._names or not isinstance(call, dict):
            return self._content(OPEN + text + close)
        if self._num_calls == self._most:
            return Delta()
        self._num_calls += 1
        return Delta(calls=[_opening(self._num_calls - 1, name, arguments)])


def _arguments(call: Any) -> str:
    """A call's arguments as JSON. ValueError if they hold a number that JSON has none for, such as NaN or 1e999."""
    given = call.get("arguments", {}) if isinstance(call, dict) else {}
    text = json.dumps(given, ensure_ascii=False, allow_nan=False)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)  # half a pair has no UTF-8, but an escape


class ForcedReader:
    """The text is one call, whose arguments are passed on as they come; a text cut before them is no call."""

    def __init__(self) -> None:
        self._text, self._sent = "", 0
        self.called = False

    def push(self, text: str) -> Delta:
        self._text += text
        delta = Delta()
        if not self.called:
            match = _FORCED_OPENING.match(self._text)
            if match is None:
                return delta
            self.called, self._sent = True, match.end()
            delta.add(Delta(calls=[_opening(0, json.loads(match[1]), "")]))
        # The last brace may be the call's own.
        delta.add(self._up_to(len(self._text.rstrip(" ").removesuffix("}").rstrip(" "))))
        return delta

    def finish(self, reason: str) -> Delta:
        return Delta() if not self.called or _is_json(self._text) else self._up_to(len(self._text))

    def _up_to(self, end: int) -> Delta:
        more, self._sent = self._text[self._sent : end], max(self._sent, end)
        return Delta(calls=[{"index": 0, "function": {"arguments": more}}] if more else [])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


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
    return {**whole, "tool_calls": calls} if calls else whole
