# SPDX-License-Identifier: Apache-2.0
"""What a user may ask of one request, checked where it is made."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

from wedlm.algorithm.params import DECODINGS, Decoding

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one request; every value is checked on construction (ValueError naming field, value, expectation).

    temperature: 0 takes the most probable token; otherwise sampled after top_k, then top_p, then temperature.
    top_k: keep the k most probable tokens; 0 or -1 keeps all. top_p: keep the smallest set with this probability mass.
    max_tokens: cut of the output; the model's length cuts too. min_tokens: no end before so many tokens.
    stop: strings that end the text and are removed from it. stop_token_ids: end tokens besides the checkpoint's own.
    ignore_eos: go on after the checkpoint's end tokens. seed: same seed, same text; None draws one.
    logprobs: report the log-probability of each token and of this many most probable ones (0 to 20).
    decoding: "streaming", "verified", "block" or "autoregressive"; None is the engine's default for its checkpoint.
    wedlm_window_size: W of streaming and block decoding, rows a step of verified; None is the engine's.
    wedlm_entropy_threshold: τ in nats; None fills one position a step. wedlm_pos_penalty_factor: λ, nats per position.
    wedlm_draft_entropy: verified decoding drafts up to the first masked row whose entropy reaches this (nats).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    min_tokens: int = 0
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    decoding: Decoding | None = None
    wedlm_window_size: int | None = None
    wedlm_entropy_threshold: float | None = 0.4
    wedlm_pos_penalty_factor: float = 0.02
    wedlm_draft_entropy: float = 1.5

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, low=0.0)
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature is {self.temperature!r}; expected a finite number >= 0")
        _number("top_p", self.top_p, low=0.0, high=1.0)
        if self.top_p == 0:
            raise ValueError("top_p is 0; expected a number in (0, 1]")
        _integer("top_k", self.top_k, low=-1)
        _integer("max_tokens", self.max_tokens, low=1)
        _integer("min_tokens", self.min_tokens, low=0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; expected at most max_tokens, {self.max_tokens}")
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        ids = tuple(self.stop_token_ids or ())
        for token in ids:
            _integer("stop_token_ids", token, low=0)
        object.__setattr__(self, "stop_token_ids", ids)
        if self.seed is not None:
            _integer("seed", self.seed, low=-(2**63), high=2**63 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        if self.decoding is not None and self.decoding not in DECODINGS:
            raise ValueError(f"decoding is {self.decoding!r}; expected one of {', '.join(DECODINGS)}")
        if self.wedlm_window_size is not None:
            _integer("wedlm_window_size", self.wedlm_window_size, low=1)
        if self.wedlm_entropy_threshold is not None:
            _number("wedlm_entropy_threshold", self.wedlm_entropy_threshold, low=0.0)
        _number("wedlm_pos_penalty_factor", self.wedlm_pos_penalty_factor, low=0.0)
        _number("wedlm_draft_entropy", self.wedlm_draft_entropy, low=0.0)


def _number(name: str, value: object, low: float, high: float = math.inf) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= float(value) <= high:
        upper = "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name} is {value!r}; expected a number >= {low:g}{upper}")


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    ok = isinstance(value, Integral) and not isinstance(value, bool)
    if not ok or int(value) < low or (high is not None and int(value) > high):  # type: ignore[call-overload]
        upper = "" if high is None else f" and <= {high}"
        raise ValueError(f"{name} is {value!r}; expected an integer >= {low}{upper}")


def _strings(name: str, value: str | Iterable[str] | None) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"{name} contains {string!r}; expected non-empty strings")
    return strings
