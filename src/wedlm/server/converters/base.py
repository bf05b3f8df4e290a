# SPDX-License-Identifier: Apache-2.0
"""What the converters share: an answer of one choice as content, reasoning and calls, whole or as it comes."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from wedlm.server.errors import explain
from wedlm.server.protocol import ChatRequest, CompletionRequest
from wedlm.server.readers import Delta

if TYPE_CHECKING:  # the process that parses bodies imports this file, and must not load torch
    from wedlm.engine.outputs import GenerationOutput, StreamPiece
    from wedlm.model import Tokenizer
    from wedlm.server.answers import Form, Job


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation (or a text) to answer, and in which form; None means OpenAI's."""

    body: ChatRequest | CompletionRequest
    form: "Form | None" = None


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """The chat of a converted request. Raises ApiError 400 about the first error."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        raise explain(error.errors(include_url=False)[0], given) from None


@dataclass
class Answer:
    """The content of an answer, so far or as a whole. ``reason``: OpenAI's finish reason, "" until it ends. ``stop``:
    the stop string that ended it, if one did and its request left it in the text."""

    said: Delta = field(default_factory=Delta)
    reason: str = ""
    stop: str | None = None
    output: "GenerationOutput | None" = None

    @property
    def num_prompt_tokens(self) -> int:
        return 0 if self.output is None or self.output.stats is None else self.output.stats.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return 0 if self.output is None else len(self.output.token_ids)

    @property
    def num_cached(self) -> int:
        """How many of the prompt's tokens had their keys in the cache."""
        return 0 if self.output is None or self.output.stats is None else self.output.stats.num_reused_tokens

    @property
    def calls(self) -> list[tuple[str, str, str]]:
        """Id, name and arguments of each call."""
        return [(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in self.said.calls]


class AnswerReader:
    """Reads the pieces of a job's only sequence."""

    def __init__(self, job: "Job") -> None:
        self._reader, self._params = job.new_reader(), job.sequences[0][1]
        self.answer = Answer()

    def read(self, piece: "StreamPiece") -> Delta:
        """What the piece adds."""
        return self._add(piece.text, piece.output)

    def read_whole(self, output: "GenerationOutput") -> Answer:
        self._add(output.text, output)
        return self.answer

    def _add(self, text: str, output: "GenerationOutput | None") -> Delta:
        answer = self.answer
        if output is not None and output.finish_reason == "stop" and self._params.include_stop_str_in_output:
            stops = self._params.stop or ()
            answer.stop = max((one for one in stops if text.endswith(one)), key=len, default=None)
            text = text.removesuffix(answer.stop or "")
        delta = self._reader.push(text)
        if output is not None:
            delta.add(self._reader.finish(output.finish_reason))
            called = self._reader.called and output.finish_reason == "stop"
            answer.reason, answer.output = "tool_calls" if called else output.finish_reason, output
        answer.said.add(Delta(delta.content, [_copy(call) for call in delta.calls], delta.reasoning))
        return delta


def _copy(call: dict[str, Any]) -> dict[str, Any]:
    """A copy, because arguments are appended to calls."""
    return {**call, "function": dict(call["function"])}


class AnswerForm:
    """A ``Form`` whose ``body`` is written from a whole answer."""

    stream_type = "text/event-stream"

    def whole(
        self,
        job: "Job",
        outputs: "Sequence[GenerationOutput]",
        tokenizer: "Tokenizer",
        unwanted: Callable[[], bool] = lambda: False,
    ) -> bytes:
        return to_json(self.body(job, AnswerReader(job).read_whole(outputs[0]), tokenizer))

    def body(self, job: "Job", answer: Answer, tokenizer: "Tokenizer") -> Any:
        raise NotImplementedError


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def named_event(name: str, body: dict[str, Any]) -> bytes:
    """A server-sent event with a name, which is also the type in its body."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json({"type": name, **body}))
