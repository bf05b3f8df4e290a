# SPDX-License-Identifier: Apache-2.0
"""Plain data that the engine's parts pass to each other."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from wedlm.algorithm.params import DecodeParams
from wedlm.engine.constraints.rules import Constraint
from wedlm.engine.sampling_params import SamplingParams
from wedlm.engine.text import TextStream

FinishReason = Literal["stop", "length", "abort"]
Alternatives = list[tuple[int, float]]  # (token id, log-probability), most probable first


@dataclass(frozen=True, slots=True)
class WindowSnapshot:
    """A decoding window outside the device: what survives a preemption, and what a new request starts from.

    ``cached`` committed tokens must have keys before the window may run; ``tokens`` holds None where masked.
    ``alternatives`` are the top log-probabilities of filled tokens by position, for requests that asked for them.
    """

    cached: int
    tokens: tuple[int | None, ...]
    logprobs: tuple[float, ...]
    alternatives: dict[int, Alternatives] = field(default_factory=dict)

    @classmethod
    def initial(cls, prompt: list[int], params: DecodeParams) -> "WindowSnapshot":
        """All masked after the prompt; when verifying, the prompt's last token is the anchor in column 0."""
        cached = len(prompt) - params.verifies
        width = params.width(0, params.max_positions - cached)
        tokens: list[int | None] = [None] * width
        if params.verifies:
            tokens[0] = prompt[-1]
        return cls(cached, tuple(tokens), (0.0,) * width)


@dataclass(slots=True, eq=False)
class Request:
    """One request from arrival to finish. ``tokens`` is the prompt and all emitted tokens; the scheduler keeps
    ``num_cached``, how many of them have valid keys, and the engine appends to the outputs."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    decode: DecodeParams
    max_tokens: int
    window: WindowSnapshot
    arrival: int
    tokens: list[int]
    text: TextStream | None = None
    constraint: Constraint | None = None
    num_cached: int = 0
    num_reused: int = 0
    last_step: int = -1
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    token_steps: list[int] = field(default_factory=list)
    num_forwards: int = 0
    num_rows: int = 0
    num_preemptions: int = 0
    arrival_time: float = field(default_factory=time.perf_counter)
    first_token_time: float | None = None
    finish_reason: FinishReason | None = None
    watched: bool = False  # somebody looks at the window after each step
    streamed: bool = True  # somebody reads the tokens as they come
    row_bound: int | None = None  # most rows of the next step, where the engine has lowered them
    longest_draft: int = 0  # drafts that the next step could have, by what the last one left it

    @property
    def needs_host(self) -> bool:
        """Whether the host must see a step of this request before the next one starts."""
        return self.watched or self.constraint is not None or self.params.logprobs is not None

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[len(self.prompt_token_ids) :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt_token_ids)


@dataclass(slots=True)  # made for each window of each step, and four times slower to make if frozen
class Work:
    """One request's share of a step: a chunk of tokens to cache (``count`` of them from ``start`` on), or its decoding
    window, for which both are upper bounds. ``pages`` covers slots 0 .. start + count - 1.
    """

    request: Request
    decodes: bool
    count: int
    pages: list[int]
    start: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one forward does, windows first. ``row_budget``: the most rows that this step leaves to a window of auto
    decoding for the next one, or the width that it leaves to one of auto streaming."""

    work: list[Work]
    row_budget: int = 1


@dataclass(slots=True)  # as ``Work``
class WindowResult:
    """What a step did to one window: tokens that became final, rows it ran, tokens that now have valid keys."""

    tokens: list[int]
    logprobs: list[float]
    alternatives: Sequence[Alternatives]
    num_rows: int
    num_cached: int
    num_drafts: int  # that the step verified


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Figures of one request. ``tokens_per_forward`` and ``p_cache`` (tokens per row run) always go together:
    many rows may buy few tokens. Forwards and rows are those after the prompt's. Times in seconds."""

    num_prompt_tokens: int
    num_reused_tokens: int
    num_tokens: int
    num_forwards: int
    num_rows: int
    num_preemptions: int
    tokens_per_forward: float
    p_cache: float
    time_to_first_token_s: float
    tokens_per_second: float
    decoding: str

    @classmethod
    def of(cls, request: Request, now: float) -> "RequestStats":
        tokens = request.num_output_tokens
        first = request.first_token_time if request.first_token_time is not None else now
        elapsed = now - request.arrival_time
        return cls(
            num_prompt_tokens=len(request.prompt_token_ids),
            num_reused_tokens=request.num_reused,
            num_tokens=tokens,
            num_forwards=request.num_forwards,
            num_rows=request.num_rows,
            num_preemptions=request.num_preemptions,
            tokens_per_forward=tokens / request.num_forwards if request.num_forwards else 0.0,
            p_cache=tokens / request.num_rows if request.num_rows else 0.0,
            time_to_first_token_s=first - request.arrival_time,
            tokens_per_second=tokens / elapsed if elapsed > 0 else 0.0,
            decoding=request.decode.decoding,
        )
