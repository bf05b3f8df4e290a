# SPDX-License-Identifier: Apache-2.0
"""A request: what the caller asked for, which never changes, and four records of its progress, each with one writer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from wedlm.algorithm.lookup import Proposal
from wedlm.algorithm.params import DecodeParams
from wedlm.engine.adapters import LoadedAdapter, slot_of
from wedlm.engine.adaptive.lookup_budget import RequestLookup
from wedlm.engine.constraints.rules import Constraint
from wedlm.engine.original_names import ByName
from wedlm.engine.sampling_params import SamplingParams
from wedlm.engine.text import TextStream

FinishReason = Literal["stop", "length", "abort"]
TopLogprobs = list[tuple[int, float]]  # (token id, log-probability), most probable first


@dataclass(frozen=True, slots=True)
class WindowSnapshot:
    """A decoding window outside the device: what survives a preemption, and what a new request starts from.

    ``cached`` committed tokens must have keys before the window may run; ``tokens`` holds None where masked.
    ``top_logprobs`` are those of filled tokens by position, for requests that asked for them.
    """

    cached: int
    tokens: tuple[int | None, ...]
    logprobs: tuple[float, ...]
    top_logprobs: dict[int, TopLogprobs] = field(default_factory=dict)

    @classmethod
    def initial(cls, prompt: list[int], params: DecodeParams) -> "WindowSnapshot":
        """The window after the prompt, all masked, except that an anchor, the prompt's last token, is in column 0, and
        a block begins with what the prompt has of it."""
        cached = params.num_before_window(len(prompt))
        width, known = params.width(0, params.max_positions - cached), prompt[cached:]
        return cls(cached, (*known, *(None,) * (width - len(known))), (0.0,) * width)


@dataclass(slots=True)
class RequestOutput:
    """What the request has produced. Written by the engine alone. ``tokens`` is the prompt and all emitted tokens."""

    tokens: list[int]
    text: TextStream | None = None
    constraint: Constraint | None = None  # advanced with each emitted token
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    token_steps: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class RequestCounters:
    """Forwards and rows of windows, and their drafts, and times in seconds of the engine's clock. Drafts from the text
    (``lookup``) are included in all drafts. Written by the engine alone."""

    arrival_time: float
    num_forwards: int = 0
    num_rows: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_lookup_drafted: int = 0
    num_lookup_accepted: int = 0
    start_time: float | None = None  # when its first step was planned
    first_token_time: float | None = None
    finish_time: float | None = None


@dataclass(slots=True)
class RequestProgress:
    """Where the request stands in the cache and in the queue. Written by the scheduler alone.

    ``num_cached`` of its tokens have valid keys. ``window`` is current while the request is not loaded on the device.
    """

    window: WindowSnapshot
    num_cached: int = 0
    num_reused: int = 0
    num_preemptions: int = 0
    last_step: int = -1


@dataclass(slots=True)
class RequestLimits:
    """What the load allows a request, and what its text proposes. Written by the controller alone.

    ``max_rows``: of its next window step, with its own drafts. ``longest_draft``: how many of those are possible, given
    what the last step left it. ``proposal``: drafts from the text to use in their place, found by ``lookup``.
    """

    max_rows: int
    longest_draft: int = 0
    proposal: Proposal | None = None
    lookup: RequestLookup | None = None


@dataclass(frozen=True, slots=True)
class PlacedTokens:
    """Tokens of a text with a suffix, by slot. Each number also encodes how far the token stands from its slot, so that
    no page is mistaken for one of a text without a gap, or with another gap."""

    tokens: list[int]
    decode: DecodeParams

    def __getitem__(self, part: slice) -> list[int]:
        positions = self.decode.positions(part.start, part.stop)
        both = zip(self.tokens[part], positions, strict=True)
        return [token + ((position - slot) << 32) for slot, (token, position) in enumerate(both, part.start)]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request from arrival to finish.

    ``prompt_token_ids``: all known tokens, a suffix last. ``order``: its place in the line of all requests, smallest
    first; unique (``Engine.add``). ``streamed``: the caller reads the tokens as they come. ``watched``: the caller
    looks at the window after each step. ``adapter``: None means the model without an adapter.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    decode: DecodeParams
    max_tokens: int
    order: tuple[int, int, int]
    streamed: bool
    watched: bool
    output: RequestOutput
    counters: RequestCounters
    progress: RequestProgress
    limits: RequestLimits
    adapter: LoadedAdapter | None = None

    @property
    def adapter_slot(self) -> int:
        """The slot of the adapter's factors in the model; 0 for none."""
        return slot_of(self.adapter)

    @property
    def needs_host(self) -> bool:
        """Whether the host must see a step of this request before the next one starts."""
        return self.watched or self.output.constraint is not None or self.params.logprobs is not None

    @property
    def placed_tokens(self) -> "Sequence[int] | PlacedTokens":
        """The tokens by slot, as the prefix cache distinguishes them."""
        return PlacedTokens(self.output.tokens, self.decode) if self.decode.suffix_length else self.output.tokens

    @property
    def next_position(self) -> int:
        """The position of the next token to be emitted."""
        return len(self.output.tokens) - self.decode.suffix_length

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.output.finish_reason

    @property
    def output_token_ids(self) -> list[int]:
        return self.output.tokens[len(self.prompt_token_ids) :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.output.tokens) - len(self.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class RequestStats(ByName):
    """Figures of one request.

    ``tokens_per_forward`` and ``p_cache`` (tokens per row run) belong together, because many rows may buy few tokens.
    Forwards, rows and drafts are those of windows, so rows exclude the prompt's, and a forward counts if it ran the
    window; drafts from the text (``lookup``) are included in all drafts. Times are in seconds: ``queue_s`` from the
    arrival to the first step, ``elapsed_s`` to the end.

    The two speeds under the original's names are lower bounds, because a step may hold prompts and windows: prompt
    tokens over the time to the first token, and all tokens over the time to the end, both counted from the arrival.
    """

    also: ClassVar = {
        "prefill_tokens": lambda stats: stats.num_prompt_tokens,
        "decode_tokens": lambda stats: stats.num_tokens,
        "decode_forwards": lambda stats: stats.num_forwards,
        "prefill_speed": lambda stats: ratio(stats.num_prompt_tokens, stats.time_to_first_token_s),
        "decode_speed": lambda stats: stats.tokens_per_second,
    }

    num_prompt_tokens: int
    num_reused_tokens: int
    num_tokens: int
    num_forwards: int
    num_rows: int
    num_drafted: int
    num_accepted: int
    num_lookup_drafted: int
    num_lookup_accepted: int
    num_preemptions: int
    tokens_per_forward: float
    p_cache: float
    queue_s: float
    time_to_first_token_s: float
    elapsed_s: float
    tokens_per_second: float
    decoding: str

    @classmethod
    def of(cls, request: Request) -> "RequestStats":
        """The figures of a finished request."""
        tokens, counters, progress = request.num_output_tokens, request.counters, request.progress
        assert counters.finish_time is not None
        first = counters.finish_time if counters.first_token_time is None else counters.first_token_time
        elapsed = counters.finish_time - counters.arrival_time
        started = counters.finish_time if counters.start_time is None else counters.start_time
        return cls(
            num_prompt_tokens=len(request.prompt_token_ids),
            num_reused_tokens=progress.num_reused,
            num_tokens=tokens,
            num_forwards=counters.num_forwards,
            num_rows=counters.num_rows,
            num_drafted=counters.num_drafted,
            num_accepted=counters.num_accepted,
            num_lookup_drafted=counters.num_lookup_drafted,
            num_lookup_accepted=counters.num_lookup_accepted,
            num_preemptions=progress.num_preemptions,
            tokens_per_forward=ratio(tokens, counters.num_forwards),
            p_cache=ratio(tokens, counters.num_rows),
            queue_s=started - counters.arrival_time,
            time_to_first_token_s=first - counters.arrival_time,
            elapsed_s=elapsed,
            tokens_per_second=ratio(tokens, elapsed),
            decoding=request.decode.decoding,
        )


def ratio(value: float, unit: float) -> float:
    """``value`` for each ``unit``; 0 where there is none."""
    return value / unit if unit > 0 else 0.0
