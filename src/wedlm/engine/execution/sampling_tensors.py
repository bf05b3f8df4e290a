# SPDX-License-Identifier: Apache-2.0
"""Parameters of several windows as tensors, for one step or for all slots."""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.sample import SamplingBatch
from wedlm.algorithm.window import WindowParams

_Stacked = TypeVar("_Stacked")


@dataclass(frozen=True)
class BatchParams:
    """One row per window; ``flags`` only skip work."""

    window: WindowParams
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor
    stop_tokens: Tensor  # padded with -1
    min_eos_position: Tensor
    is_adaptive: Tensor  # a step may lower its rows
    flags: "BatchFlags"

    @classmethod
    def stack(
        cls, params: list[DecodeParams], device: torch.device, num_stop_tokens: int | None = None
    ) -> "BatchParams":
        """``num_stop_tokens`` is the number of columns of ``stop_tokens``, by default as many as the window with most
        of them needs."""
        num_stop_tokens = max(len(p.stop_token_ids) for p in params) if num_stop_tokens is None else num_stop_tokens
        ends = [[*p.stop_token_ids, *[-1] * (num_stop_tokens - len(p.stop_token_ids))] for p in params]
        return cls(
            window=WindowParams.stack(params, device),
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.long, device=device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
            seed=torch.tensor([p.seed for p in params], dtype=torch.long, device=device),
            stop_tokens=torch.tensor(ends, dtype=torch.long, device=device).reshape(len(params), num_stop_tokens),
            min_eos_position=torch.tensor([p.min_eos_position for p in params], dtype=torch.long, device=device),
            is_adaptive=torch.tensor([p.is_adaptive for p in params], device=device),
            flags=BatchFlags.of(params),
        )

    def limited(self, row_budget: int, max_drafts: int) -> WindowParams:
        """The window parameters with at most ``row_budget`` rows and ``max_drafts`` drafts for adaptive windows."""
        if not self.flags.adaptive:
            return self.window
        rows = torch.where(self.is_adaptive, self.window.row_budget.clamp(max=row_budget), self.window.row_budget)
        most = self.window.max_drafts.clamp(max=max_drafts)
        return replace(
            self.window, row_budget=rows, max_drafts=torch.where(self.is_adaptive, most, self.window.max_drafts)
        )

    def sampling(self, index: Tensor, position: Tensor, flags: "BatchFlags") -> SamplingBatch:
        """How to choose the tokens for ``position`` [L] of the windows ``index`` [L]."""
        return SamplingBatch(
            temperature=self.temperature[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            seed=self.seed[index],
            position=position,
            any_sampled=flags.sampled,
            any_truncated=flags.truncated,
        )

    def take(self, index: Tensor, flags: "BatchFlags") -> "BatchParams":
        """The rows at ``index``, whose flags are ``flags``."""
        window = replace(
            _map(self.window, lambda t: t[index]),
            any_verified=flags.verified,
            any_streaming=flags.streaming,
            any_by_confidence=flags.by_confidence,
        )
        return replace(_map(self, lambda t: t[index]), window=window, flags=flags)

    def pairs(self, others: "BatchParams") -> list[tuple[Tensor, Tensor]]:
        """Each tensor together with the same tensor of ``others``."""
        both = ((self, others), (self.window, others.window))
        named = [(getattr(mine, f.name), getattr(its, f.name)) for mine, its in both for f in fields(mine)]
        return [pair for pair in named if isinstance(pair[0], Tensor)]


@dataclass(frozen=True)
class BatchFlags:
    """What decides the work of a step, besides its sizes."""

    verified: bool
    streaming: bool
    sampled: bool
    truncated: bool
    eos_banned: bool
    groups: bool
    entropy: bool
    adaptive: bool
    by_confidence: bool

    @classmethod
    def of(cls, params: list[DecodeParams]) -> "BatchFlags":
        sampled = [p for p in params if p.temperature > 0]
        return cls(
            verified=any(p.is_verified for p in params),
            streaming=any(not p.is_verified for p in params),
            sampled=bool(sampled),
            truncated=any(p.top_k > 0 or p.top_p < 1 for p in sampled),
            eos_banned=any(p.min_eos_position > 0 for p in params),
            groups=any(p.is_verified and p.max_drafts > 0 for p in params),
            entropy=any(p.row_budget > 1 or not p.is_verified for p in params),
            adaptive=any(p.is_adaptive for p in params),
            by_confidence=any(p.by_confidence for p in params),
        )


def _map(stacked: _Stacked, function) -> _Stacked:  # type: ignore[no-untyped-def]
    """The dataclass with ``function`` applied to its tensors."""
    values = {f.name: getattr(stacked, f.name) for f in fields(stacked)}  # type: ignore[arg-type]
    return replace(stacked, **{n: function(v) for n, v in values.items() if isinstance(v, Tensor)})  # type: ignore
