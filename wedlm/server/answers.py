# SPDX-License-Identifier: Apache-2.0
"""The JSON of answers: whole ones, chunks of streams, and the figures in ``usage``."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Any, Literal

from wedlm.engine.outputs import GenerationOutput, StreamPiece
from wedlm.engine.sampling_params import SamplingParams

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Job:
    """A request, understood: its sequences in the order of its choices, ``num_choices`` for each prompt."""

    kind: Literal["chat", "text"]
    model: str
    sequences: list[tuple[list[int], SamplingParams]]
    num_choices: int
    streams: bool
    wants_usage: bool
    watches: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", ("chatcmpl-" if self.kind == "chat" else "cmpl-") + token_hex(12))

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
        "prompt_tokens": job.num_prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": job.num_prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "forwards": forwards,
        "rows": rows,
        "tokens_per_forward": tokens / forwards if forwards else 0.0,
        "p_cache": tokens / rows if rows else 0.0,
        "decoding": stats[0].decoding if stats else None,
    }


def whole(job: Job, outputs: Sequence[GenerationOutput]) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    choices = []
    for index, output in enumerate(outputs):
        content: dict[str, Any] = {"text": output.text}
        if job.kind == "chat":
            content = {"message": {"role": "assistant", "content": output.text, "refusal": None}}
        choices.append({"index": index, **content, "logprobs": None, "finish_reason": output.finish_reason})
    kind = "chat.completion" if job.kind == "chat" else "text_completion"
    return {**_head(job, kind), "choices": choices, "usage": usage(job, outputs)}


def opening(job: Job) -> bytes:
    """What a stream begins with: each choice of a chat names its role."""
    if job.kind == "text":
        return b""
    delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return b"".join(event(_chunk(job, [{"index": index, **delta}])) for index in range(len(job.sequences)))


def piece_event(job: Job, index: int, piece: StreamPiece, decode: Decode) -> bytes:
    """The chunk of one piece. ``wedlm`` says which forward made which tokens final."""
    reason = None if piece.output is None else piece.output.finish_reason
    content: dict[str, Any] = {"text": piece.text}
    if job.kind == "chat":
        content = {"delta": {"content": piece.text}}
    chunk = _chunk(job, [{"index": index, **content, "logprobs": None, "finish_reason": reason}])
    chunk["wedlm"] = {"step": piece.step, "token_ids": piece.token_ids, "tokens": piece.token_texts}
    if piece.window is not None:
        chunk["wedlm"]["window"] = _window(piece, len(job.sequences[index][0]), decode)
    return event(chunk)


def usage_event(job: Job, outputs: Sequence[GenerationOutput]) -> bytes:
    """The last chunk of a stream that asked for the figures."""
    return event({**_chunk(job, []), "usage": usage(job, outputs)})


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


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
