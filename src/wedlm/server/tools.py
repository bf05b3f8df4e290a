# SPDX-License-Identifier: Apache-2.0
"""Conversations in the form of a chat template, which may or may not support tools and a system role; the schema of a
forced call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wedlm.server.tool_forms import HERMES, ToolForm, written
from wedlm.server.tool_schemas import Tool

if TYPE_CHECKING:  # the process that parses bodies imports this file, and must not load torch
    from wedlm.model import Tokenizer

_INSTRUCTIONS = (
    "You can call these tools, given as JSON, one a line:\n{tools}\n"
    "To call one, write {example} and nothing else. Its result then comes in a message."
)

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What a chat template does with its input."""

    takes_tools: bool
    takes_system: bool

    @classmethod
    def of(cls, tokenizer: "Tokenizer") -> "TemplateTraits":
        user = {"role": "user", "content": "x"}
        probe = [{"type": "function", "function": {"name": "probe_name", "description": "", "parameters": {}}}]
        with_system = [{"role": "system", "content": "probe_system"}, user]
        return cls(
            takes_tools=_has(tokenizer, "probe_name", [user], tools=probe),
            takes_system=_has(tokenizer, "probe_system", with_system) or not _has(tokenizer, "x", [user]),
        )


def _has(tokenizer: "Tokenizer", word: str, messages: Sequence[Message], **variables: Any) -> bool:
    try:
        return word in tokenizer.apply_chat_template(messages, **variables)
    except ValueError:
        return False


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation for a template without a system role: the system's text stands in the first turn of the user."""
    said = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    if not said:
        return rest
    place = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if place is None:
        return [{"role": "user", "content": "\n\n".join(said)}, *rest]
    first = {**rest[place], "content": "\n\n".join([*said, rest[place]["content"]])}
    return [*rest[:place], first, *rest[place + 1 :]]


def in_plain_words(messages: Sequence[Message], tools: Sequence[Tool], form: ToolForm = HERMES) -> list[Message]:
    """The conversation for a template without tools: the system message describes them, and calls and results are text.
    Successive results, and the user's text after them, form one turn of the user."""
    plain: list[Message] = []
    previous = ""
    for message in messages:
        new = _plain(message, form)
        if previous == "tool" and new["role"] == "user":
            plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{new['content']}"}
        else:
            plain.append(new)
        previous = message["role"]
    if not tools:
        return plain
    described = "\n".join(written(_described(tool)) for tool in tools)
    told = _INSTRUCTIONS.format(tools=described, example=form.example)
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _plain(message: Message, form: ToolForm) -> Message:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [call["function"] for call in message.get("tool_calls", ())]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    as_text = [form.write(calls)] if calls else []
    return {**rest, "content": "\n".join([*([message["content"]] if message["content"] else []), *as_text])}


def _described(tool: Tool) -> dict[str, Any]:
    return tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True)


def for_template(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as chat templates expect them."""
    defaults = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return [{"type": "function", "function": {**defaults, **_described(tool)}} for tool in tools]


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The schema of one call of one of the tools. Each tool's parameters stand under ``$defs``, where references within
    them still work."""
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
