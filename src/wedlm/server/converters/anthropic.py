# SPDX-License-Identifier: Apache-2.0
"""Anthropic's Messages API: ``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from wedlm.server.converters.base import Answer, AnswerForm, AnswerReader, Chat, chat_request, named_event
from wedlm.server.errors import ApiError, anthropic_body
from wedlm.server.neutral import Place
from wedlm.server.protocol import MAX_MESSAGES, MAX_STOPS, StopString
from wedlm.server.tool_schemas import MAX_TOOLS, Schema, Strict, ToolName

if TYPE_CHECKING:  # the process that parses bodies imports this file, and must not load torch
    from wedlm.engine.outputs import GenerationOutput, StreamPiece
    from wedlm.model import Tokenizer
    from wedlm.server.answers import Job, Stream

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class _Block(Strict):
    places: ClassVar[tuple[Place, ...]] = ("block",)


class TextBlock(_Block):
    """Text."""

    type: Literal["text"]
    text: str


class ToolUseBlock(_Block):
    """A call that an earlier answer made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(_Block):
    """The result of a call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] = ""
    is_error: bool | None = None


class ThinkingBlock(_Block):
    """The thoughts in an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(_Block):
    """Thoughts that only their author can read."""

    type: Literal["redacted_thinking"]
    data: str


Block: TypeAlias = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock, Field(discriminator="type")
]
Blocks: TypeAlias = Annotated[list[Block], Field(fail_fast=True)]


class InputMessage(Strict):
    """One turn."""

    places: ClassVar[tuple[Place, ...]] = ("message",)
    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class InputTool(Strict):
    """A function that may be called."""

    places: ClassVar[tuple[Place, ...]] = ("tool",)
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Schema
    strict: bool | None = None


class ToolChoice(Strict):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    """Whether a model that can think should do so."""

    places: ClassVar[tuple[Place, ...]] = ("thinking",)
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Strict):
    """A JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: Annotated[Schema, Field(alias="schema")]


class OutputConfig(Strict):
    """The form of the answer, and the effort."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class CountRequest(Strict):
    """The body of POST /v1/messages/count_tokens, and what it shares with messages."""

    places: ClassVar[tuple[Place, ...]] = ("anthropic", "request")
    model: str
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    tools: Annotated[list[InputTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat(self, service: Any) -> Chat:
        return Chat(chat_request(self._fields()))

    def _fields(self) -> dict[str, Any]:
        """The fields in OpenAI's words."""
        messages = [one for message in self.messages for one in _messages(message)]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": _text(self.system)})
        fields: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.tools:
            fields["tools"] = [_tool(tool) for tool in self.tools]
        if self.tool_choice is not None:
            fields["tool_choice"] = _choice(self.tool_choice)
            fields["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        if self.messages[-1].role == "assistant":  # the answer goes on where it ends
            fields["continue_final_message"] = True
        config = self.output_config or OutputConfig()
        fields["reasoning_effort"] = config.effort
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        if config.format is not None:
            schema = {"name": "answer", "schema": config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages."""

    max_tokens: int
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def chat(self, service: Any) -> Chat:
        names = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        fields = {**self._fields(), **{name: getattr(self, name) for name in names}}
        fields |= {"stop": self.stop_sequences or None, "include_stop_str_in_output": True}  # to say which one it was
        return Chat(chat_request(fields), MessagesForm())


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _messages(message: InputMessage) -> list[dict[str, Any]]:
    """The messages; results of calls become separate messages, before the user's other text."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, texts, thoughts = [], [], []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ToolResultBlock):
            content = _text(block.content)
            content = f"Error: {content}" if block.is_error else content
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
    said: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        said["tool_calls"] = calls
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    return results if results and not texts else [*results, said]


def _tool(tool: InputTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    return {"any": "required"}.get(choice.type, choice.type)


class MessagesForm(AnswerForm):
    """The answer as one of Anthropic's messages."""

    def body(self, job: "Job", answer: Answer, tokenizer: "Tokenizer") -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if answer.said.reasoning:
            content.append({"type": "thinking", "thinking": answer.said.reasoning, "signature": ""})
        if answer.said.content:
            content.append({"type": "text", "text": answer.said.content})
        for name, function, arguments in answer.calls:
            content.append({"type": "tool_use", "id": name, "name": function, "input": _input(arguments)})
        return {**_message(job, content), **_end(answer), "usage": _usage(answer)}

    def stream(self, job: "Job", tokenizer: "Tokenizer") -> "Stream":
        return MessagesStream(job)


def _input(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:  # cut by length
        return {}


def _message(job: "Job", content: list[dict[str, Any]]) -> dict[str, Any]:
    head = {"id": f"msg_{job.id.rpartition('-')[2]}", "type": "message", "role": "assistant", "model": job.model}
    return {**head, "content": content, "stop_reason": None, "stop_sequence": None}


def _end(answer: Answer) -> dict[str, Any]:
    reason = "stop_sequence" if answer.stop is not None else _STOP_REASONS.get(answer.reason, "end_turn")
    return {"stop_reason": reason, "stop_sequence": answer.stop}


def _usage(answer: Answer) -> dict[str, Any]:
    """The usage, in which tokens read from the cache do not count as input."""
    read = answer.num_prompt_tokens - answer.num_cached
    counts = {"input_tokens": read, "output_tokens": answer.num_tokens}
    return {**counts, "cache_read_input_tokens": answer.num_cached, "cache_creation_input_tokens": 0}


class MessagesStream:
    """Anthropic's events: blocks one after the other, each begun, continued and ended."""

    def __init__(self, job: "Job") -> None:
        self._job, self._reader = job, AnswerReader(job)
        self._index, self._open = -1, ""

    def opening(self) -> bytes:
        usage = {"input_tokens": self._job.num_prompt_tokens, "output_tokens": 0}
        return named_event("message_start", {"message": {**_message(self._job, []), "usage": usage}})

    def pieces(self, news: "Sequence[tuple[int, StreamPiece]]") -> bytes:
        events = b""
        for _, piece in news:
            delta = self._reader.read(piece)
            if delta.reasoning:
                events += self._block("thinking", {"thinking": "", "signature": ""})
                events += self._delta("thinking_delta", "thinking", delta.reasoning)
            if delta.content:
                events += self._block("text", {"text": ""}) + self._delta("text_delta", "text", delta.content)
            for call in delta.calls:
                if "id" in call:
                    head = {"id": call["id"], "name": call["function"]["name"], "input": {}}
                    events += self._close() + self._block("tool_use", head)
                if call["function"]["arguments"]:
                    events += self._delta("input_json_delta", "partial_json", call["function"]["arguments"])
        return events

    def closing(self, outputs: "Sequence[GenerationOutput]") -> bytes:
        answer = self._reader.answer
        return (
            self._close()
            + named_event("message_delta", {"delta": _end(answer), "usage": _usage(answer)})
            + named_event("message_stop", {})
        )

    def failure(self, error: ApiError) -> bytes:
        return named_event("error", anthropic_body(error.status, error.detail))

    def _block(self, kind: str, fields: dict[str, Any]) -> bytes:
        """Begin a block of this kind, if none is open."""
        if self._open == kind:
            return b""
        events, self._open = self._close(), kind
        self._index += 1
        block = {"type": kind, **fields}
        return events + named_event("content_block_start", {"index": self._index, "content_block": block})

    def _delta(self, kind: str, name: str, text: str) -> bytes:
        return named_event("content_block_delta", {"index": self._index, "delta": {"type": kind, name: text}})

    def _close(self) -> bytes:
        closed, self._open = self._open, ""
        return named_event("content_block_stop", {"index": self._index}) if closed else b""
