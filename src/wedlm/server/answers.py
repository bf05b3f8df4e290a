# SPDX-License-Identifier: Apache-2.0
"""The JSON of answers: whole ones, chunks of streams, and the figures in ``usage``."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from secrets import token_hex
from typing import Any, Literal

from wedlm.engine.constraints.grammar import Compiled
from wedlm.engine.outputs import GenerationOutput, StreamPiece
from wedlm.engine.request import TopLogprobs
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Tokenizer
from wedlm.server.logprobs import Decode, chat_logprobs, text_logprobs
from wedlm.server.readers import PlainReader, Reader, message

_AT_ONCE = 64  # tokens


@dataclass(frozen=True, slots=True)
class Job:
    """A request, understood: its sequences in the order of its choices, ``num_choices`` for each prompt."""

    kind: Literal["chat", "text"]
    model: str
    sequences: list[tuple[list[int], SamplingParams]]
    num_choices: int
    streams: bool
    wants_usage: bool
    counts_always: bool  # each chunk has the figures so far
    watches: bool
    warning: str | None = None
    grammar: Compiled | None = None  # held until the answer has ended
    new_reader: Callable[[], Reader] = PlainReader
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", ("chatcmpl-" if self.kind == "chat" else "cmpl-") + token_hex(12))

    @property
    def entries_per_token(self) -> int:
        """How many texts, with or without a number, an answer has for each of its tokens."""
        logprobs = self.sequences[0][1].logprobs
        return 1 if logprobs is None else 2 + logprobs

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counts once, however many choices it has."""
        return sum(len(prompt) for prompt, _ in self.sequences[:: self.num_choices])


def usage(job: Job, outputs: Sequence[GenerationOutput]) -> dict[str, Any]:
    """OpenAI's counts, then ours over all choices: forwards and rows are those after the prompt's."""
    stats = [output.stats for output in outputs if output.stats is not None]
    tokens, forwards, rows = (sum(getattr(s, n) for s in stats) for n in ("num_tokens", "num_forwards", "num_rows"))
    cached = sum(s.num_reused_tokens for s in stats[:: job.num_choices])
    return {
        **_counts(job.num_prompt_tokens, tokens),
        "prompt_tokens_details": {"cached_tokens": cached},
        "forwards": forwards,
        "rows": rows,
        "tokens_per_forward": tokens / forwards if forwards else 0.0,
        "p_cache": tokens / rows if rows else 0.0,
        "decoding": stats[0].decoding if stats else None,
    }


def _counts(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole(job: Job, outputs: Sequence[GenerationOutput], tokenizer: Tokenizer) -> bytes:
    """The body of an answer that is not streamed."""
    kind = "chat.completion" if job.kind == "chat" else "text_completion"
    head, end = _head(job, kind), {"usage": usage(job, outputs)}
    return b'%b,"choices":[%b],%b' % (
        _json(head)[:-1],
        b",".join(_choice(job, index, output, tokenizer) for index, output in enumerate(outputs)),
        _json(end)[1:],
    )


def _choice(job: Job, index: int, output: GenerationOutput, tokenizer: Tokenizer) -> bytes:
    content: dict[str, Any] = {"text": output.text}
    reason: str | None = output.finish_reason
    if job.kind == "chat":
        reader = job.new_reader()
        delta = reader.push(output.text)
        delta.add(reader.finish(output.finish_reason))
        content, reason = {"message": message(delta)}, _reason(reader, reason)
    logprobs = b"null"
    if output.logprobs is not None:
        top, offsets = output.top_logprobs or [], output.text_offsets or []
        logprobs = _written(_logprobs(job, output.token_ids, output.logprobs, top, offsets, tokenizer))
    choice = _json({"index": index, **content, "finish_reason": reason})
    return b'%b,"logprobs":%b}' % (choice[:-1], logprobs)


def _written(logprobs: dict[str, Any]) -> bytes:
    """The JSON of log-probabilities, whose lists may have 100,000 entries, piece by piece: json.dumps lets no other
    thread run before it is done."""
    fields = []
    for name, value in logprobs.items():
        if isinstance(value, list):
            pieces = [_json(value[start : start + _AT_ONCE])[1:-1] for start in range(0, len(value), _AT_ONCE)]
            fields.append(b"%b:[%b]" % (_json(name), b",".join(pieces)))
        else:
            fields.append(b"%b:%b" % (_json(name), _json(value)))
    return b"{%b}" % b",".join(fields)


def opening(job: Job) -> bytes:
    """What a stream begins with: each choice of a chat names its role."""
    if job.kind == "text":
        return b""
    delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return b"".join(event(_chunk(job, [{"index": index, **delta}])) for index in range(len(job.sequences)))


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
        logprobs = self._logprobs(piece) if job.sequences[self._index][1].logprobs is not None else None
        chunk = _chunk(job, [{"index": self._index, **content, "logprobs": logprobs, "finish_reason": reason}])
        self._num_tokens += len(piece.token_ids)
        if job.counts_always:
            chunk["usage"] = _counts(len(job.sequences[self._index][0]), self._num_tokens)
        chunk["wedlm"] = {"step": piece.step, "token_ids": piece.token_ids, "tokens": piece.token_texts}
        if piece.window is not None:
            chunk["wedlm"]["window"] = _window(piece, len(job.sequences[self._index][0]), self._tokenizer.decode)
        return event(chunk)

    def _delta(self, text: str, reason: str | None) -> dict[str, Any]:
        delta = self._reader.push(text)
        if reason is not None:
            delta.add(self._reader.finish(reason))
        content = {"content": delta.content} if delta.content or not delta.calls else {}
        return {**content, "tool_calls": delta.calls} if delta.calls else content

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
    decode = partial(tokenizer.decode, skip_special_tokens=False)
    if job.kind == "chat":
        return chat_logprobs(tokens, logprobs, top, decode)
    return text_logprobs(tokens, logprobs, top, offsets, decode)


def usage_event(job: Job, outputs: Sequence[GenerationOutput]) -> bytes:
    """The last chunk of a stream that asked for the figures."""
    return event({**_chunk(job, []), "usage": usage(job, outputs)})


def events(choices: Sequence[ChoiceStream], news: Sequence[tuple[int, StreamPiece]]) -> bytes:
    """The chunks of all pieces that arrived together."""
    return b"".join(choices[index].event(piece) for index, piece in news)


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _json(body) + b"\n\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


DONE = b"data: [DONE]\n\n"


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
