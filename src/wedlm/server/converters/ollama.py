# SPDX-License-Identifier: Apache-2.0
"""Ollama's API: ``POST /api/chat`` and ``/api/generate``, and the models for ``/api/tags``."""

import json
import time
from collections.abc import Container, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from wedlm.server.converters.base import Answer, AnswerForm, AnswerReader, Chat, chat_request, to_json
from wedlm.server.errors import ApiError, ollama_body
from wedlm.server.neutral import Place
from wedlm.server.protocol import MAX_MESSAGES, MAX_STOPS, CompletionRequest, StopString
from wedlm.server.readers import Delta
from wedlm.server.tool_schemas import MAX_TOOLS, Schema, Strict, Tool

if TYPE_CHECKING:  # the process that parses bodies imports this file, and must not load torch
    from wedlm.engine.outputs import GenerationOutput, StreamPiece
    from wedlm.model import Tokenizer
    from wedlm.server.answers import Job, Stream

# Ollama's own defaults, which its clients rely on.
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
_NANOSECONDS = 10**9


class OllamaFunction(Strict):
    """A function, and its arguments as an object."""

    places: ClassVar[tuple[Place, ...]] = ("call",)
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class OllamaCall(Strict):
    """A call that an earlier answer made."""

    places: ClassVar[tuple[Place, ...]] = ("call",)
    id: str | None = None
    type: Literal["function"] | None = None
    function: OllamaFunction


class OllamaMessage(Strict):
    """One turn."""

    places: ClassVar[tuple[Place, ...]] = ("message",)
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaOptions(Strict):
    """How to generate; options about the machine have no effect."""

    places: ClassVar[tuple[Place, ...]] = ("ollama_options",)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    num_predict: int | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class _Request(Strict):
    places: ClassVar[tuple[Place, ...]] = ("ollama", "request")
    model: str
    stream: bool | None = None
    format: Literal["json", ""] | Schema | None = None
    options: OllamaOptions | None = None
    think: bool | Literal["low", "medium", "high"] | None = None

    def _fields(self, known: Container[str]) -> dict[str, Any]:
        """The fields in OpenAI's words. Ollama's model names end in a tag."""
        options = self.options or OllamaOptions()
        names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")
        given = {name: value for name in names if (value := getattr(options, name)) is not None}
        untagged = self.model.removesuffix(":latest")
        fields = {**_DEFAULTS, **given, "model": untagged if untagged in known else self.model}
        fields |= {"stream": self.stream is not False, "repetition_penalty": options.repeat_penalty}
        if options.num_predict is not None and options.num_predict >= 0:  # below: as much as there is room for
            fields["max_tokens"] = max(1, options.num_predict)
        return fields

    def _chat_fields(self, known: Container[str]) -> dict[str, Any]:
        fields = self._fields(known)
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            schema = {"name": "answer", "schema": self.format}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.think is not None:
            effort = "medium" if self.think else "none"
            fields["reasoning_effort"] = self.think if isinstance(self.think, str) else effort
        return fields


class OllamaChatRequest(_Request):
    """The body of POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None

    def chat(self, service: Any) -> Chat:
        messages: list[dict[str, Any]] = []
        waiting: list[str] = []  # calls without a result
        for message in self.messages:
            new: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.role == "tool":
                name = message.tool_call_id or (waiting.pop(0) if waiting else "call")
                new["tool_call_id"] = name
            if message.tool_calls:
                calls = [_openai_call(call, len(messages), i) for i, call in enumerate(message.tool_calls)]
                waiting = [call["id"] for call in calls]
                new["tool_calls"] = calls
            if message.thinking:
                new["reasoning_content"] = message.thinking
            messages.append(new)
        fields = {**self._chat_fields(service.names), "messages": messages}
        if self.tools:
            fields["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return Chat(chat_request(fields), OllamaForm("chat", self.model))


class OllamaGenerateRequest(_Request):
    """The body of POST /api/generate."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None

    def chat(self, service: Any) -> Chat:
        form = OllamaForm("generate", self.model)
        if self.raw:
            if self.system or self.format or self.think:
                raise ValueError("raw is true with system, format or think; expected only the prompt")
            fields = self._fields(service.names)
            given = {name: value for name, value in fields.items() if value is not None}
            return Chat(CompletionRequest.model_validate({"max_tokens": None, **given, "prompt": self.prompt}), form)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": self.prompt})
        return Chat(chat_request({**self._chat_fields(service.names), "messages": messages}), form)


def _openai_call(call: OllamaCall, message: int, index: int) -> dict[str, Any]:
    arguments = json.dumps(call.function.arguments, ensure_ascii=False)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or f"call_{message}_{index}", "type": "function", "function": function}


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class OllamaForm(AnswerForm):
    """Ollama's objects, one per line when streamed. ``kind``: chat or generate. ``model``: as the client named it."""

    stream_type = "application/x-ndjson"

    def __init__(self, kind: Literal["chat", "generate"], model: str) -> None:
        self._kind, self._model, self._start = kind, model, time.perf_counter()

    def body(self, job: "Job", answer: Answer, tokenizer: "Tokenizer") -> dict[str, Any]:
        return {**self.part(answer.said), **self.end(answer)}

    def stream(self, job: "Job", tokenizer: "Tokenizer") -> "Stream":
        return OllamaStream(self, job)

    def part(self, said: Delta) -> dict[str, Any]:
        """A part of the answer, or all of it."""
        head: dict[str, Any] = {"model": self._model, "created_at": now()}
        thinking = {"thinking": said.reasoning} if said.reasoning else {}
        if self._kind == "generate":
            return {**head, "response": said.content, **thinking, "done": False}
        calls = [{"function": _called(call["function"])} for call in said.calls]
        called = {"tool_calls": calls} if calls else {}
        return {**head, "message": {"role": "assistant", "content": said.content, **thinking, **called}, "done": False}

    def end(self, answer: Answer) -> dict[str, Any]:
        """How the answer ended, and the figures; times are in nanoseconds, from the client's point of view."""
        total = int((time.perf_counter() - self._start) * _NANOSECONDS)
        stats = None if answer.output is None else answer.output.stats
        reading = 0 if stats is None else int(stats.time_to_first_token_s * _NANOSECONDS)
        return {
            "done": True,
            "done_reason": "length" if answer.reason == "length" else "stop",
            "total_duration": total,
            "load_duration": 0,
            "prompt_eval_count": answer.num_prompt_tokens,
            "prompt_eval_duration": min(reading, total),
            "eval_count": answer.num_tokens,
            "eval_duration": max(1, total - reading),
        }


def _called(function: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:  # cut by length
        arguments = {}
    return {"name": function["name"], "arguments": arguments}


class OllamaStream:
    """A line for each piece that adds something. Calls, whose arguments are objects, come whole at the end."""

    def __init__(self, form: OllamaForm, job: "Job") -> None:
        self._form, self._reader = form, AnswerReader(job)

    def opening(self) -> bytes:
        return b""

    def pieces(self, news: "Sequence[tuple[int, StreamPiece]]") -> bytes:
        lines = b""
        for _, piece in news:
            delta = self._reader.read(piece)
            if delta.content or delta.reasoning:
                lines += to_json(self._form.part(Delta(delta.content, [], delta.reasoning))) + b"\n"
        return lines

    def closing(self, outputs: "Sequence[GenerationOutput]") -> bytes:
        answer = self._reader.answer
        lines = to_json(self._form.part(Delta("", answer.said.calls))) + b"\n" if answer.said.calls else b""
        return lines + to_json({**self._form.part(Delta()), **self._form.end(answer)}) + b"\n"

    def failure(self, error: ApiError) -> bytes:
        return to_json(ollama_body(error.detail)) + b"\n"
