# SPDX-License-Identifier: Apache-2.0
"""The messages of a conversation, as clients send them and as chat templates take them."""

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from wedlm.engine.sampling_params import MAX_SCHEMA_DEPTH, depth_within
from wedlm.server.tool_schemas import MAX_TOOLS, Strict, ToolCall

Nothing: TypeAlias = None


class TextPart(Strict):
    """The only kind of content part."""

    type: Literal["text"]
    text: str


TextParts: TypeAlias = Annotated[list[TextPart], Field(fail_fast=True)]


class Message(Strict):
    """One message of a conversation; ``name`` goes to the chat template, which may use it or not."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    content: Annotated[str | TextParts | None, Field(validate_default=True)] = None
    name: str | None = None
    tool_call_id: Annotated[str | None, Field(validate_default=True)] = None
    # What OpenAI's answers have, and clients send back.
    refusal: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

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
        """Text, and calls with their arguments as objects, as templates expect them; "developer" is OpenAI's newer word
        for "system", which templates know."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        named = {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        message = {"role": "system" if self.role == "developer" else self.role, "content": content, **named}
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        return message


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or not depth_within(arguments, MAX_SCHEMA_DEPTH):
        arguments = call.function.arguments  # as it is: what a model once wrote need not be JSON
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
