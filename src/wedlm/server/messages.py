# SPDX-License-Identifier: Apache-2.0
"""The messages of a conversation, in the clients' form and in that of chat templates."""

import json
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from wedlm.server.json_text import NotParsed, clean_object
from wedlm.server.neutral import Place
from wedlm.server.tool_schemas import MAX_TOOLS, Strict, ToolCall


class TextPart(Strict):
    """Text, the only kind of content part."""

    places: ClassVar[tuple[Place, ...]] = ("part",)
    type: Literal["text"]
    text: str


TextParts: TypeAlias = Annotated[list[TextPart], Field(fail_fast=True)]


class Message(Strict):
    """One message of a conversation. ``name`` goes to the chat template, which may use it."""

    places: ClassVar[tuple[Place, ...]] = ("message",)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    content: Annotated[str | TextParts | None, Field(validate_default=True)] = None
    name: str | None = None
    tool_call_id: Annotated[str | None, Field(validate_default=True)] = None
    # What an earlier answer thought, by two names that servers have for it; the chat template may use it or not.
    reasoning_content: str | None = None
    reasoning: str | None = None

    @field_validator("tool_calls")
    @classmethod
    def _only_of_the_assistant(cls, calls: list[ToolCall] | None, info: ValidationInfo) -> list[ToolCall] | None:
        if calls and info.data.get("role", "assistant") != "assistant":
            raise ValueError("calls in messages of the assistant only")
        return calls

    @field_validator("content")
    @classmethod
    def _only_calls_have_no_content(
        cls, content: str | list[TextPart] | None, info: ValidationInfo
    ) -> str | list[TextPart] | None:
        if content is None and not info.data.get("tool_calls"):
            raise PydanticKnownError("missing")
        return content

    @field_validator("tool_call_id")
    @classmethod
    def _only_of_tools(cls, name: str | None, info: ValidationInfo) -> str | None:
        if (name is None) == (info.data.get("role") == "tool"):
            raise PydanticKnownError("missing")
        return name

    def for_template(self) -> dict[str, Any]:
        """Text, and calls with their arguments as objects, as templates expect them. "developer" is OpenAI's newer word
        for "system", which templates understand."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        named = {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        message = {"role": "system" if self.role == "developer" else self.role, "content": content, **named}
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        return message


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(clean_object(call.function.arguments.strip()))
    except (NotParsed, ValueError):
        arguments = call.function.arguments  # as it is: what a model once wrote need not be JSON
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
