# SPDX-License-Identifier: Apache-2.0
"""The JSON of answers: whole ones, chunks of streams, and the figures in ``usage``."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Any, Literal, Protocol

from wedlm.engine.constraints.grammar import Compiled
from wedlm.engine.outputs import GenerationOutput, StreamPiece, Totals
from wedlm.engine.prompt_logprobs import PromptLogprobs
from wedlm.engine.request import TopLogprobs
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Tokenizer
from wedlm.server.errors import ApiError
from wedlm.server.logprobs import LOWEST, Decode, chat_logprobs, text_logprobs
from wedlm.server.readers import PlainReader, Reader, message

_AT_ONCE = 64  # tokens
_DONE = b"data: [DONE]\n\n"


class Stream(Protocol):
    """The parts of a streamed answer, in the order of its methods. ``failure`` may come at any time, and is
    the last."""

    def opening(self) -> bytes: ...

    def pieces(self, news: "Sequence[tuple[int, StreamPiece]]") -> bytes:
        """Pieces that arrived together, each with the index of its sequence."""

    def closing(self, outputs: Sequence[GenerationOutput]) -> bytes: ...

    def failure(self, error: ApiError) -> bytes: ...


class Form(Protocol):
    """How an API writes an answer. ``stream_type`` is the media type of streams."""

    @property
    def stream_type(self) -> str: ...

    def whole(
        self,
        job: "Job",
        outputs: Sequence[GenerationOutput],
        tokenizer: Tokenizer,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> bytes:
        """A whole answer. Raises Unwanted, between two choices, once ``unwanted`` says so."""

    def stream(self, job: "Job", tokenizer: Tokenizer) -> Stream: ...


class OpenAIForm:
    """OpenAI's form, for chats and completions."""

    stream_type = "text/event-stream"

    def whole(
        self,
        job: "Job",
        outputs: Sequence[GenerationOutput],
        tokenizer: Tokenizer,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> bytes:
        return whole(job, outputs, tokenizer, unwanted)

    def stream(self, job: "Job", tokenizer: Tokenizer) -> Stream:
        return OpenAIStream(job, tokenizer)


OPENAI = OpenAIForm()


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """What an answer says about one prompt. ``text``: the repeated prompt before its own text, if requested. ``shown``:
    the prompt's log-probabilities stand before those of the answer; ``listed``: they stand separately."""

    token_ids: list[int]
    text: str | None
    scores: PromptLogprobs | None
    shown: int | None
    listed: int | None


@dataclass(frozen=True, slots=True)
class Job:
    """An understood request: its sequences in the order of its choices, ``num_choices`` for each prompt, of which the
    answer has the ``num_kept`` most probable ones."""

    kind: Literal["chat", "text"]
    model: str
    sequences: list[tuple[list[int], SamplingParams]]
    num_choices: int
    num_kept: int
    shows_logprobs: bool
    streams: bool
    wants_usage: bool
    counts_always: bool  # each chunk has the figures so far
    watches: bool
    warning: str | None = None
    grammar: Compiled | None = None  # held until the answer has ended
    new_reader: Callable[[], Reader] = PlainReader
    echoes: list[PromptEcho] = field(default_factory=list)  # of each prompt, if asked for
    only_prompt: bool = False
    form: Form = OPENAI
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", ("chatcmpl-" if self.kind == "chat" else "cmpl-") + token_hex(12))

    def echo_of(self, index: int) -> PromptEcho | None:
        """The echo of the prompt that a kept choice answers."""
        return self.echoes[index // self.num_kept] if self.echoes else None

    @property
    def num_echoed(self) -> int:
        """How many texts and numbers of the prompts an answer has."""
        alternatives = [2 + max(one.shown or 0, one.listed or 0) for one in self.echoes if one.scores is not None]
        return sum(len(one.token_ids) * most for one, most in zip(self.echoes, alternatives, strict=False))

    @property
    def entries_per_token(self) -> int:
        """How many texts, with or without a number, an answer has for each of its tokens."""
        logprobs = self.sequences[0][1].logprobs
        return 1 if logprobs is None else 2 + logprobs

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, however many choices it has."""
        return sum(self.num_known(index) for index in range(0, len(self.sequences), self.num_choices))

    def num_known(self, index: int) -> int:
        """The tokens of a sequence's prompt, including its suffix."""
        prompt, params = self.sequences[index]
        return len(prompt) + len(params.suffix_token_ids or ())


def usage(job: Job, outputs: Sequence[GenerationOutput]) -> dict[str, Any]:
    """OpenAI's counts, then ours over all choices, without the prompt's forwards and rows."""
    stats = [output.stats for output in outputs if output.stats is not None]
    totals = Totals.of(outputs)
    cached = sum(s.num_reused_tokens for s in stats[:: job.num_choices])
    return {
        **_counts(job.num_prompt_tokens, totals.num_tokens),
        "prompt_tokens_details": {"cached_tokens": cached},
        "forwards": totals.num_forwards,
        "rows": totals.num_rows,
        "tokens_per_forward": totals.tokens_per_forward,
        "p_cache": totals.p_cache,
        "decoding": stats[0].decoding if stats else None,
    }


def _counts(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Unwanted(Exception):
    """The client has left."""


def whole(
    job: Job, outputs: Sequence[GenerationOutput], tokenizer: Tokenizer, unwanted: Callable[[], bool] = lambda: False
) -> bytes:
    """The body of an answer that is not streamed. Raises Unwanted, between two choices, once ``unwanted`` says so."""
    kind = "chat.completion" if job.kind == "chat" else "text_completion"
    head, end = _head(job, kind), {"usage": usage(job, outputs)}
    choices = []
    for index, output in enumerate(_kept(job, outputs)):
        if unwanted():
            raise Unwanted
        choices.append(_choice(job, index, output, tokenizer))
    return b'%b,"choices":[%b],%b' % (_json(head)[:-1], b",".join(choices), _json(end)[1:])


def _kept(job: Job, outputs: Sequence[GenerationOutput]) -> list[GenerationOutput]:
    """For each prompt the choices with the highest log-probability per token; all, in their order, if all are kept."""
    if job.num_kept == job.num_choices:
        return list(outputs)

    def mean(output: GenerationOutput) -> float:
        return sum(output.logprobs or ()) / max(1, len(output.logprobs or ()))

    groups = (outputs[start : start + job.num_choices] for start in range(0, len(outputs), job.num_choices))
    return [one for group in groups for one in sorted(group, key=mean, reverse=True)[: job.num_kept]]


def _choice(job: Job, index: int, output: GenerationOutput, tokenizer: Tokenizer) -> bytes:
    echo = job.echo_of(index)
    content: dict[str, Any] = {"text": (echo.text or "" if echo else "") + output.text}
    if echo is not None and echo.listed is not None:
        content["prompt_logprobs"] = _listed(echo, tokenizer)
    reason: str | None = output.finish_reason
    if job.kind == "chat":
        reader = job.new_reader()
        delta = reader.push(output.text)
        delta.add(reader.finish(output.finish_reason))
        content, reason = {"message": message(delta)}, _reason(reader, reason)
    logprobs = b"null"
    if job.shows_logprobs and output.logprobs is not None:
        top, offsets = output.top_logprobs or [], output.text_offsets or []
        shown = _logprobs(job, output.token_ids, output.logprobs, top, offsets, tokenizer)
        logprobs = in_pieces(_behind(echo, shown, tokenizer) if echo is not None else shown)
    choice = _json({"index": index, **content, "finish_reason": reason})
    return b'%b,"logprobs":%b}' % (choice[:-1], logprobs)


def _decoder(tokenizer: Tokenizer) -> Decode:
    return partial(tokenizer.decode, skip_special_tokens=False)


def _behind(echo: PromptEcho, answer: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """A completion's log-probabilities after those of its prompt, whose first token has none."""
    if echo.shown is None or echo.scores is None:
        return answer
    decode, ids, scores = _decoder(tokenizer), echo.token_ids, echo.scores
    offsets, text = [], echo.text or ""
    place = 0
    for token in ids:
        offsets.append(min(place, len(text)))
        place += len(decode([token]))
    top = [one[: echo.shown] for one in scores.top] if echo.shown else []
    prompt = text_logprobs(ids[1:], scores.logprobs, top, offsets[1:], decode)
    first: dict[str, list[Any]] = {"tokens": [decode(ids[:1])], "text_offset": offsets[:1]}
    first |= {"token_logprobs": [None], "top_logprobs": [None]}
    both = {name: [*first[name], *(prompt[name] or [])] for name in first}
    whole = {name: [*both[name], *(answer[name] or [])] for name in first}
    whole["text_offset"] = [*both["text_offset"], *(len(text) + offset for offset in answer["text_offset"])]
    return whole if echo.shown else {**whole, "top_logprobs": None}


def _listed(echo: PromptEcho, tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: by token of the prompt, ids with log-probability, rank and text."""
    assert echo.scores is not None
    decode = _decoder(tokenizer)
    found: list[dict[str, Any] | None] = [None]
    rows = zip(echo.token_ids[1:], echo.scores.logprobs, echo.scores.ranks, echo.scores.top, strict=True)
    for token, logprob, rank, top in rows:
        ranked = {token: (logprob, rank)} | {
            other: (value, i) for i, (other, value) in enumerate(top[: echo.listed], 1)
        }
        found.append(
            {
                str(other): {"logprob": max(value, LOWEST), "rank": place, "decoded_token": decode([other])}
                for other, (value, place) in ranked.items()
            }
        )
    return found


def in_pieces(body: dict[str, Any]) -> bytes:
    """The JSON of an object whose lists may have 100,000 entries, piece by piece, because json.dumps lets no other
    thread run before it is done."""
    fields = []
    for name, value in body.items():
        if isinstance(value, list):
            pieces = [_json(value[start : start + _AT_ONCE])[1:-1] for start in range(0, len(value), _AT_ONCE)]
            fields.append(b"%b:[%b]" % (_json(name), b",".join(pieces)))
        else:
            fields.append(b"%b:%b" % (_json(name), _json(value)))
    return b"{%b}" % b",".join(fields)


class ChoiceStream:
    """The chunks of one choice."""

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer) -> None:
        self._job, self._index, self._tokenizer = job, index, tokenizer
        self._reader, self._offset, self._num_tokens = job.new_reader(), 0, 0

    def event(self, piece: StreamPiece) -> bytes:
        """The chunk of one piece. ``wedlm`` says which forward made which tokens final."""
        job = self._job
        reason = None if piece.output is None else piece.output.finish_reason
        content: dict[str, Any] = {"text": piece.text}
        if job.kind == "chat":
            content, reason = {"delta": self._delta(piece.text, reason)}, _reason(self._reader, reason)
        logprobs = self._logprobs(piece) if job.shows_logprobs else None
        chunk = _chunk(job, [{"index": self._index, **content, "logprobs": logprobs, "finish_reason": reason}])
        self._num_tokens += len(piece.token_ids)
        if job.counts_always:
            chunk["usage"] = _counts(job.num_known(self._index), self._num_tokens)
        chunk["wedlm"] = {"step": piece.step, "token_ids": piece.token_ids, "tokens": piece.token_texts}
        if piece.window is not None:
            chunk["wedlm"]["window"] = _window(piece, job.num_known(self._index), self._tokenizer.decode)
        return event(chunk)

    def _delta(self, text: str, reason: str | None) -> dict[str, Any]:
        delta = self._reader.push(text)
        if reason is not None:
            delta.add(self._reader.finish(reason))
        changed = {"reasoning_content": delta.reasoning, "tool_calls": delta.calls}
        content = {"content": delta.content} if delta.content or not any(changed.values()) else {}
        return {**content, **{name: value for name, value in changed.items() if value}}

    def _logprobs(self, piece: StreamPiece) -> dict[str, Any]:
        offsets = [self._offset]
        for text in piece.token_texts:
            offsets.append(offsets[-1] + len(text))
        self._offset = offsets.pop()
        return _logprobs(self._job, piece.token_ids, piece.logprobs, piece.top_logprobs, offsets, self._tokenizer)


def _reason(reader: Reader, reason: str | None) -> str | None:
    return "tool_calls" if reader.called and reason == "stop" else reason


def _logprobs(
    job: Job,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    top: Sequence[TopLogprobs],
    offsets: Sequence[int],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    decode = _decoder(tokenizer)
    if job.kind == "chat":
        return chat_logprobs(tokens, logprobs, top, decode)
    return text_logprobs(tokens, logprobs, top, offsets, decode)


class OpenAIStream:
    """The chunks of all choices, the figures if requested, and OpenAI's end mark."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._choices = [ChoiceStream(job, index, tokenizer) for index in range(len(job.sequences))]

    def opening(self) -> bytes:
        """Each choice of a chat names its role; each choice of a completion repeats its prompt, if requested."""
        if self._job.kind == "text":
            return b"".join(self._echo(index) for index in range(len(self._choices)))
        delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return b"".join(event(_chunk(self._job, [{"index": index, **delta}])) for index in range(len(self._choices)))

    def _echo(self, index: int) -> bytes:
        echo = self._job.echo_of(index)
        if echo is None:
            return b""
        choice = {"index": index, "text": echo.text or "", "logprobs": None, "finish_reason": None}
        return event(_chunk(self._job, [choice]))

    def pieces(self, news: Sequence[tuple[int, StreamPiece]]) -> bytes:
        return b"".join(self._choices[index].event(piece) for index, piece in news)

    def closing(self, outputs: Sequence[GenerationOutput]) -> bytes:
        job = self._job
        last = event({**_chunk(job, []), "usage": usage(job, outputs)}) if job.wants_usage else b""
        return last + _DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body) + _DONE


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _json(body) + b"\n\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _window(piece: StreamPiece, num_prompt_tokens: int, decode: Decode) -> dict[str, Any]:
    """The window after the step: where it starts in the answer (-1: at the prompt's last token), and what is filled."""
    assert piece.window is not None
    ids = piece.window.tokens
    texts = [None if token is None else decode([token]) for token in ids]
    return {"start": piece.window.cached - num_prompt_tokens, "token_ids": list(ids), "tokens": texts}


def _chunk(job: Job, choices: list[dict[str, Any]]) -> dict[str, Any]:
    chunk = {**_head(job, "chat.completion.chunk" if job.kind == "chat" else "text_completion"), "choices": choices}
    return {**chunk, "usage": None} if job.wants_usage else chunk


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model, "system_fingerprint": None}
