# SPDX-License-Identifier: Apache-2.0
"""OpenAI's Responses API: ``POST /v1/responses``, and the store of answers that later requests continue from."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeAlias

from pydantic import BeforeValidator, Field

from wedlm.server.converters.base import Answer, AnswerForm, AnswerReader, Chat, chat_request, named_event, to_json
from wedlm.server.errors import ApiError
from wedlm.server.neutral import Place
from wedlm.server.protocol import MAX_MESSAGES, SHARED_FIELDS, Generation
from wedlm.server.tool_schemas import MAX_TOOLS, Schema, Strict, ToolName

if TYPE_CHECKING:  # the process that parses bodies imports this file, and must not load torch
    from wedlm.engine.outputs import GenerationOutput, StreamPiece
    from wedlm.model import Tokenizer
    from wedlm.server.answers import Job, Stream

_MAX_CONVERSATION_BYTES = 2**21
Item = dict[str, Any]  # of a conversation, in the API's form


class _Item(Strict):
    places: ClassVar[tuple[Place, ...]] = ("item",)


class Part(_Item):
    """Text, the only kind of content part."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str | None = None
    refusal: str | None = None


Content: TypeAlias = str | Annotated[list[Part], Field(fail_fast=True)]


class MessageItem(_Item):
    """A turn of the conversation."""

    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(_Item):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class OutputItem(_Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class Thought(_Item):
    """A part of a reasoning item."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(_Item):
    """The thoughts in an earlier answer."""

    type: Literal["reasoning"]
    content: list[Thought] | None = None
    summary: list[Thought] | None = None


class ReferenceItem(Strict):
    """An item of an earlier answer in the store."""

    type: Literal["item_reference"]
    id: str


def _with_type(item: Any) -> Any:
    return {"type": "message" if "role" in item else "item_reference", **item} if isinstance(item, dict) else item


InputItem: TypeAlias = Annotated[
    Annotated[
        MessageItem | CallItem | OutputItem | ReasoningItem | ReferenceItem,
        Field(discriminator="type"),
    ],
    BeforeValidator(_with_type),
]


class FunctionTool(Strict):
    """A function, the only kind of tool."""

    places: ClassVar[tuple[Place, ...]] = ("tool",)
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class FunctionChoice(Strict):
    """A function that must be called."""

    type: Literal["function"]
    name: ToolName


class TextFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: ToolName | None = None
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Strict):
    """The form of the answer's text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """How much a model that can think should think."""

    places: ClassVar[tuple[Place, ...]] = ("reasoning",)
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesRequest(Generation):
    """The body of POST /v1/responses: its own fields, and those that a chat has for sampling."""

    places: ClassVar[tuple[Place, ...]] = ("responses", "chat", "request")
    input: str | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    store: bool | None = None
    text: TextConfig | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None

    def chat(self, service: "HasStore") -> Chat:
        """Runs in a thread. Raises ApiError for an unknown earlier answer."""
        if self.n not in (None, 1):
            raise ValueError(f"n is {self.n}; expected 1")
        store = service.responses
        items = [] if self.previous_response_id is None else store.get(self.previous_response_id).items
        if isinstance(self.input, str):
            new: list[Item] = [{"type": "message", "role": "user", "content": self.input}]
        else:
            new = [_plain(item, store) for item in self.input]
        items = [*items, *new]
        messages = _messages(items)
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        fields: dict[str, Any] = {name: getattr(self, name) for name in SHARED_FIELDS if name in self.model_fields_set}
        fields |= {"model": self.model, "messages": messages, "max_completion_tokens": self.max_output_tokens}
        fields |= {"parallel_tool_calls": self.parallel_tool_calls, "stream_options": None}
        if self.tools:
            fields["tools"] = [_tool(tool) for tool in self.tools]
        if isinstance(self.tool_choice, FunctionChoice):
            fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        else:
            fields["tool_choice"] = self.tool_choice
        form = None if self.text is None else self.text.format
        if form is not None:
            schema = {"name": form.name or "answer", "schema": form.schema_}
            extra = {"json_schema": schema} if form.type == "json_schema" else {}
            fields["response_format"] = {"type": form.type, **extra}
        fields["reasoning_effort"] = None if self.reasoning is None else self.reasoning.effort
        kept = store if self.store is not False else None
        return Chat(chat_request(fields), ResponsesForm(self._head(), items, kept))

    def _head(self) -> bytes:
        """What an answer repeats from the request, as JSON without its braces."""
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        choice = self.tool_choice.model_dump() if isinstance(self.tool_choice, FunctionChoice) else self.tool_choice
        form = None if self.text is None or self.text.format is None else self.text.format
        head = {
            "object": "response",
            "background": False,
            "error": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": None if self.reasoning is None else self.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": self.store is not False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": {"type": "text"} if form is None else form.model_dump(exclude_none=True, by_alias=True)},
            "tool_choice": "auto" if choice is None else choice,
            "tools": tools,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
        }
        return to_json(head)[1:-1]


class HasStore(Protocol):
    """An object that keeps the answers."""

    @property
    def responses(self) -> "ResponseStore": ...


def _joined(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.text or part.refusal or "" for part in content)


def _plain(item: Any, store: "ResponseStore") -> Item:
    if isinstance(item, MessageItem):
        return {"type": "message", "role": item.role, "content": _joined(item.content)}
    if isinstance(item, CallItem):
        return item.model_dump()
    if isinstance(item, OutputItem):
        return {**item.model_dump(), "output": _joined(item.output)}
    if isinstance(item, ReasoningItem):
        text = "\n".join(part.text for part in [*(item.content or ()), *(item.summary or ())])
        return {"type": "reasoning", "text": text}
    return store.item(item.id)


def _messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The messages; reasoning and calls become part of the neighbouring assistant's turn."""
    messages: list[dict[str, Any]] = []
    thought = ""
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            thought = item["text"]
            continue
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
            continue
        if kind == "message":
            messages.append({"role": item["role"], "content": item["content"]})
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"], thought = thought, ""
    return messages


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Stored:
    """The conversation up to and including an answer, and the answer as it was given."""

    items: list[Item]
    body: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.body) + sum(200 + sum(len(str(value)) for value in item.values()) for item in self.items)


class ResponseStore:
    """The latest answers, in memory: at most ``max_bytes`` with their conversations, and ``max_count``. For several
    threads. Their names cannot be guessed."""

    def __init__(self, max_bytes: int = 2**26, max_count: int = 1024) -> None:
        self._max_bytes, self._max_count = max_bytes, max_count
        self._stored: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._owner: dict[str, str] = {}  # of an answer's item
        self._num_bytes = 0
        self._lock = threading.Lock()

    def put(self, name: str, stored: Stored) -> None:
        size = stored.num_bytes
        if size > _MAX_CONVERSATION_BYTES:  # no model here reads so much, and each request would go through all of it
            return
        with self._lock:
            self._stored[name] = stored, size
            self._owner.update((item["id"], name) for item in stored.items if "id" in item and item["of"] == name)
            self._num_bytes += size
            while self._stored and (self._num_bytes > self._max_bytes or len(self._stored) > self._max_count):
                self._forget(next(iter(self._stored)))

    def get(self, name: str) -> Stored:
        """The stored answer. Raises ApiError 404."""
        with self._lock:
            found = self._stored.get(name)
            if found is None:
                raise self._unknown("response", name)
            self._stored.move_to_end(name)
            return found[0]

    def delete(self, name: str) -> None:
        """Delete a stored answer. Raises ApiError 404."""
        with self._lock:
            if name not in self._stored:
                raise self._unknown("response", name)
            self._forget(name)

    def item(self, name: str) -> Item:
        """An item of a stored answer. Raises ApiError 404."""
        with self._lock:
            owner = self._owner.get(name)
            if owner is None:
                raise self._unknown("item", name)
            return next(item for item in self._stored[owner][0].items if item.get("id") == name)

    def _forget(self, name: str) -> None:
        stored, size = self._stored.pop(name)
        self._num_bytes -= size
        for item in stored.items:
            if item.get("of") == name:
                self._owner.pop(item["id"], None)

    def _unknown(self, kind: str, name: str) -> ApiError:
        message = f"the {kind} {name[:80]!r} is not stored (any more); expected one of the latest, or all of the input"
        param = "previous_response_id" if kind == "response" else "input"
        return ApiError(404, message, type="not_found_error", param=param, code="not_found")


class ResponsesForm(AnswerForm):
    """``head``: what the answer repeats. ``items``: the conversation that it answers; ``store``, if any, keeps both."""

    def __init__(self, head: bytes, items: list[Item], store: ResponseStore | None) -> None:
        self._head, self._items, self._store = head, items, store

    def whole(
        self,
        job: "Job",
        outputs: "Sequence[GenerationOutput]",
        tokenizer: "Tokenizer",
        unwanted: Callable[[], bool] = lambda: False,
    ) -> bytes:
        answer = AnswerReader(job).read_whole(outputs[0])
        output = _output(answer)
        body = self.response(job, answer, output, tokenizer)
        self.keep(job, output, body)
        return body

    def stream(self, job: "Job", tokenizer: "Tokenizer") -> "Stream":
        return ResponsesStream(self, job, tokenizer)

    def response(self, job: "Job", answer: Answer | None, output: list[Item], tokenizer: "Tokenizer") -> bytes:
        """The object ``response``; without an answer it has just begun."""
        cut = answer is not None and answer.reason == "length"
        done = {
            "id": name_of(job),
            "created_at": job.created,
            "model": job.model,
            "status": "in_progress" if answer is None else "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": None if answer is None else _usage(answer, tokenizer),
        }
        return b"{%b,%b" % (self._head, to_json(done)[1:])

    def keep(self, job: "Job", output: list[Item], body: bytes) -> None:
        """Store the answer, if it may be."""
        if self._store is None:
            return
        new = [{**_stored(item), "id": item["id"], "of": name_of(job)} for item in output]
        self._store.put(name_of(job), Stored([*self._items, *new], body))


def name_of(job: "Job") -> str:
    return f"resp_{job.id.rpartition('-')[2]}"


def _stored(item: Item) -> Item:
    """An item of an answer as an item of a conversation."""
    if item["type"] == "message":
        return {"type": "message", "role": "assistant", "content": item["content"][0]["text"]}
    if item["type"] == "reasoning":
        return {"type": "reasoning", "text": item["content"][0]["text"]}
    return {name: item[name] for name in ("type", "call_id", "name", "arguments")}


def _usage(answer: Answer, tokenizer: "Tokenizer") -> dict[str, Any]:
    """The usage; the reasoning is encoded again to count its tokens."""
    prompt, made, cached = answer.num_prompt_tokens, answer.num_tokens, answer.num_cached
    thought = answer.said.reasoning
    num_thought = min(made, len(tokenizer.encode(thought, add_special_tokens=False))) if thought else 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": prompt - cached},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": num_thought},
        "total_tokens": prompt + made,
    }


def _message_item(name: str, text: str, status: str) -> Item:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": [part]}


def _reasoning_item(name: str, text: str, status: str) -> Item:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": name, "type": "reasoning", "summary": [], "content": content, "status": status}


def _call_item(call: tuple[str, str, str], status: str) -> Item:
    call_id, name, arguments = call
    head = {"id": call_id.replace("call_", "fc_", 1), "type": "function_call", "call_id": call_id}
    return {**head, "name": name, "arguments": arguments, "status": status}


def _output(answer: Answer) -> list[Item]:
    """The items of a whole answer; an empty answer has a message without text."""
    status = "incomplete" if answer.reason == "length" else "completed"
    items = []
    if answer.said.reasoning:
        items.append(_reasoning_item(f"rs_{token_hex(12)}", answer.said.reasoning, status))
    if answer.said.content or not (answer.said.calls or items):
        items.append(_message_item(f"msg_{token_hex(12)}", answer.said.content, status))
    return [*items, *(_call_item(call, status) for call in answer.calls)]


class ResponsesStream:
    """The Responses API's events: items one after the other, each added, continued and done."""

    def __init__(self, form: ResponsesForm, job: "Job", tokenizer: "Tokenizer") -> None:
        self._form, self._job, self._tokenizer = form, job, tokenizer
        self._reader = AnswerReader(job)
        self._number = 0
        self._done: list[Item] = []
        self._item: Item | None = None  # the one under way

    def opening(self) -> bytes:
        begun = self._form.response(self._job, None, [], self._tokenizer)
        return b"".join(self._about("response." + name, begun) for name in ("created", "in_progress"))

    def pieces(self, news: "Sequence[tuple[int, StreamPiece]]") -> bytes:
        events = b""
        for _, piece in news:
            delta = self._reader.read(piece)
            if delta.reasoning:
                events += self._text("reasoning", delta.reasoning)
            if delta.content:
                events += self._text("message", delta.content)
            for call in delta.calls:
                if "id" in call:
                    named = (call["id"], call["function"]["name"], "")
                    events += self._finish() + self._begin(_call_item(named, "in_progress"))
                events += self._arguments(call["function"]["arguments"])
        return events

    def closing(self, outputs: "Sequence[GenerationOutput]") -> bytes:
        answer = self._reader.answer
        cut = answer.reason == "length"
        events = b""
        if self._item is None and not self._done:
            events += self._text("message", "")
        events += self._finish("incomplete" if cut else "completed")
        body = self._form.response(self._job, answer, self._done, self._tokenizer)
        self._form.keep(self._job, self._done, body)
        return events + self._about("response.incomplete" if cut else "response.completed", body)

    def failure(self, error: ApiError) -> bytes:
        begun = json.loads(self._form.response(self._job, None, self._done, self._tokenizer))
        code = "server_error" if error.status >= 500 else error.detail.code
        begun |= {"status": "failed", "error": {"code": code, "message": error.detail.message}}
        return self._about("response.failed", to_json(begun))

    def _about(self, name: str, response: bytes) -> bytes:
        """An event with the whole object, which may be large and is already JSON."""
        head = to_json({"type": name, "sequence_number": self._next()})
        return b'event: %b\ndata: %b,"response":%b}\n\n' % (name.encode(), head[:-1], response)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        """An event about the current item."""
        assert self._item is not None
        place = {"output_index": len(self._done), "sequence_number": self._next()}
        item = {} if name.startswith("output_item") else {"item_id": self._item["id"]}
        return named_event(f"response.{name}", {**place, **item, **fields})

    def _begin(self, item: Item) -> bytes:
        self._item = item
        bare = {**item, "content": []} if "content" in item else item
        return self._event("output_item.added", {"item": bare})

    def _text(self, kind: str, text: str) -> bytes:
        events = b""
        if self._item is None or self._item["type"] != kind:
            name, make = ("rs", _reasoning_item) if kind == "reasoning" else ("msg", _message_item)
            events += self._finish() + self._begin(make(f"{name}_{token_hex(12)}", "", "in_progress"))
            assert self._item is not None
            part = dict(self._item["content"][0])
            events += self._event("content_part.added", {"content_index": 0, "part": part})
        assert self._item is not None
        part = self._item["content"][0]
        part["text"] += text
        if not text:
            return events
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return events + self._event(f"{part['type']}.delta", {"content_index": 0, "delta": text, **extra})

    def _arguments(self, text: str) -> bytes:
        assert self._item is not None
        self._item["arguments"] += text
        return self._event("function_call_arguments.delta", {"delta": text}) if text else b""

    def _finish(self, status: str = "completed") -> bytes:
        """End the current item, if there is one."""
        item = self._item
        if item is None:
            return b""
        item["status"] = status
        if item["type"] == "function_call":
            events = self._event("function_call_arguments.done", {"arguments": item["arguments"], "name": item["name"]})
        else:
            part = item["content"][0]
            extra: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            events = self._event(f"{part['type']}.done", {"content_index": 0, "text": part["text"], **extra})
            events += self._event("content_part.done", {"content_index": 0, "part": part})
        events += self._event("output_item.done", {"item": item})
        self._done.append(item)
        self._item = None
        return events
