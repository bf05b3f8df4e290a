# SPDX-License-Identifier: Apache-2.0
"""Windows of a batch of sequences, and the two transitions around one forward.

Every mode decodes over the same state: ``cached`` committed tokens with valid keys, then a window of ``width``
positions, each filled or masked. A known suffix is among the cached tokens, so the window's positions then begin that
many earlier. Streaming and block decoding fill masked columns. Verified decoding holds the anchor in column 0, then its
drafts, then groups of masked rows (``verify.row_layout``: there a column is a row, not a position). One step is
``extend`` -> rows -> forward -> ``update_windows``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.reorder import leading_run
from wedlm.algorithm.select import select_fill
from wedlm.algorithm.verify import accepted_drafts, next_drafts, verified_width

_Tensors = TypeVar("_Tensors", "WindowState", "Emitted")


@dataclass(frozen=True)
class WindowParams:
    """``DecodeParams`` of S sequences as tensors. The host knows ``any_*``, which only skip work."""

    is_verified: Bool[Tensor, " S"]
    block: Bool[Tensor, " S"]
    causal: Bool[Tensor, " S"]
    row_budget: Int[Tensor, " S"]
    max_drafts: Int[Tensor, " S"]
    max_positions: Int[Tensor, " S"]
    threshold: Float[Tensor, " S"]
    penalty: Float[Tensor, " S"]
    draft_entropy: Float[Tensor, " S"]
    suffix_length: Int[Tensor, " S"]
    by_confidence: Bool[Tensor, " S"]
    fill_schedule: Int[Tensor, "S 2"]
    any_verified: bool
    any_streaming: bool
    any_by_confidence: bool

    @classmethod
    def stack(cls, params: Sequence[DecodeParams], device: torch.device) -> "WindowParams":
        """One row per sequence."""

        def tensor(values: list, dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            is_verified=tensor([p.is_verified for p in params], torch.bool),
            block=tensor([p.decoding == "block" for p in params], torch.bool),
            causal=tensor([p.is_causal for p in params], torch.bool),
            row_budget=tensor([p.row_budget for p in params], torch.long),
            max_drafts=tensor([p.max_drafts for p in params], torch.long),
            max_positions=tensor([p.max_positions for p in params], torch.long),
            threshold=tensor([p.fill_below for p in params], torch.double),
            penalty=tensor([0.0 if p.by_confidence else p.pos_penalty for p in params], torch.double),
            draft_entropy=tensor([p.draft_entropy for p in params], torch.double),
            suffix_length=tensor([p.suffix_length for p in params], torch.long),
            by_confidence=tensor([p.by_confidence for p in params], torch.bool),
            fill_schedule=tensor([p.fill_schedule for p in params], torch.long),
            any_verified=any(p.is_verified for p in params),
            any_streaming=any(not p.is_verified for p in params),
            any_by_confidence=any(p.by_confidence for p in params),
        )


@dataclass(frozen=True)
class WindowState:
    """S windows of capacity C (at least the largest ``max_rows``). Columns at or past ``width`` are never filled.

    ``logprobs`` is the raw log-probability of each filled token under the row that chose it.
    """

    cached: Int[Tensor, " S"]
    width: Int[Tensor, " S"]
    tokens: Int[Tensor, "S C"]
    filled: Bool[Tensor, "S C"]
    logprobs: Float[Tensor, "S C"]

    @classmethod
    def empty(cls, num_sequences: int, capacity: int, device: torch.device) -> "WindowState":
        """Windows of width 0, which have no rows and never change."""
        shape = (num_sequences, capacity)
        return cls(
            cached=torch.zeros(num_sequences, dtype=torch.long, device=device),
            width=torch.zeros(num_sequences, dtype=torch.long, device=device),
            tokens=torch.zeros(shape, dtype=torch.long, device=device),
            filled=torch.zeros(shape, dtype=torch.bool, device=device),
            logprobs=torch.zeros(shape, dtype=torch.float32, device=device),
        )

    def widened(self, capacity: int) -> "WindowState":
        """The same windows with room for more columns."""
        more = (0, capacity - self.tokens.shape[1])
        wider = {name: F.pad(getattr(self, name), more) for name in ("tokens", "filled", "logprobs")}
        return replace(self, **wider)

    def take(self, index: Int[Tensor, " N"]) -> "WindowState":
        """The windows at ``index``, in that order."""
        return WindowState(*(getattr(self, f.name)[index] for f in fields(self)))

    def put(self, index: Int[Tensor, " N"], windows: "WindowState") -> None:
        """Write ``windows`` back to ``index`` in place."""
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(windows, f.name)


@dataclass(frozen=True)
class RowResults:
    """The forward's results by window column. Columns without logits may hold anything.

    ``choice``: for a masked column the token AT its position, for a filled column AR's token for the position AFTER it.
    ``entropy``: of the raw logits, in nats. ``logprobs``: the raw log-probability of the choice. The first masked
    column of a causal window has choice and log-probability of the row before it, and the entropy of its own row, or
    infinity if that row would choose another token.
    """

    choice: Int[Tensor, "S C"]
    entropy: Float[Tensor, "S C"]
    logprobs: Float[Tensor, "S C"]


@dataclass(frozen=True)
class Emitted:
    """Tokens that became final in this step: the first ``count[s]`` columns of row s."""

    tokens: Int[Tensor, "S C"]
    logprobs: Float[Tensor, "S C"]
    count: Int[Tensor, " S"]


def extend(state: WindowState, params: WindowParams) -> tuple[WindowState, Int[Tensor, " S"]]:
    """Extend each window by the number of masked positions that this step will commit, and return that number.

    Verified windows are laid out for their drafts already, so they neither extend nor commit before the forward.
    """
    run = torch.where(params.is_verified, 0, _final_run(state.filled, state.width, params.block))
    room = params.max_positions - state.cached
    return replace(state, width=torch.minimum(state.width + run, torch.maximum(room, state.width))), run


def num_drafts(state: WindowState, params: WindowParams) -> Int[Tensor, " S"]:
    """The number of drafts that the next forward verifies; 0 where nothing is verified."""
    return torch.where(params.is_verified, state.filled.sum(dim=1) - 1, 0).clamp(min=0)


def update_windows(
    state: WindowState, run: Int[Tensor, " S"], results: RowResults, params: WindowParams
) -> tuple[WindowState, Emitted]:
    """The transition after the forward over ``extend``'s window: commit, slide, fill or verify, emit."""
    if not params.any_verified:
        return _update_streaming(state, run, results, params)
    if not params.any_streaming:
        return _update_verified(state, results, params)
    streaming, verified = _update_streaming(state, run, results, params), _update_verified(state, results, params)
    return _where(params.is_verified, verified[0], streaming[0]), _where(params.is_verified, verified[1], streaming[1])


def _update_streaming(
    state: WindowState, run: Int[Tensor, " S"], results: RowResults, params: WindowParams
) -> tuple[WindowState, Emitted]:
    # The window covers W positions again, as far as the model reaches.
    room = params.max_positions - state.cached - run
    width = torch.where(state.width > 0, torch.minimum(params.row_budget, room).clamp(min=0), 0)
    inside = torch.arange(state.tokens.shape[1], device=run.device) < width[:, None]
    filled = shift_left(state.filled, run) & inside
    uncertainty, least, masked = results.entropy, None, inside & ~filled
    if params.any_by_confidence:
        uncertainty = torch.where(params.by_confidence[:, None], -results.logprobs, uncertainty)
        each, longer = params.fill_schedule.unbind(dim=1)
        least = each + (filled.sum(dim=1) < longer)
    uncertainty = shift_left(uncertainty, run)
    chosen = select_fill(uncertainty, masked, params.threshold, params.penalty, params.causal, least)
    state = WindowState(
        cached=state.cached + run,
        width=width,
        tokens=shift_left(torch.where(state.filled, state.tokens, results.choice), run),
        filled=filled | chosen,
        logprobs=shift_left(torch.where(state.filled, state.logprobs, results.logprobs), run),
    )
    return state, Emitted(state.tokens, state.logprobs, _final_run(state.filled, width, params.block))


def _update_verified(state: WindowState, results: RowResults, params: WindowParams) -> tuple[WindowState, Emitted]:
    column = torch.arange(state.tokens.shape[1], device=state.cached.device)
    accepted = accepted_drafts(state.tokens, state.filled, results.choice)
    alive = state.width > 0
    count = torch.where(alive, accepted + 1, 0)
    cached = state.cached + count
    room = params.max_positions - cached
    tokens, drafts = next_drafts(
        results.choice, results.entropy, state.filled, state.width, accepted, params.draft_entropy
    )
    drafts = torch.minimum(torch.minimum(drafts, params.max_drafts), room - 1).clamp(min=0)
    width = torch.where(alive, verified_width(drafts, params.row_budget, params.max_drafts, room), 0)
    # Column 0 becomes AR's next token, whatever was predicted for its position.
    tokens[:, 0] = results.choice.gather(1, accepted[:, None])[:, 0]
    filled = (column <= drafts[:, None]) & (column < width[:, None])
    state_after = WindowState(cached, width, tokens, filled, torch.zeros_like(state.logprobs))
    return state_after, Emitted(results.choice, results.logprobs, count)


def shift_left(columns: Tensor, by: Int[Tensor, " S"]) -> Tensor:
    """Move each row left by its own number of columns; zeros (False) enter on the right. [S, C] -> [S, C]"""
    source = torch.arange(columns.shape[1], device=columns.device) + by[:, None]
    inside = source < columns.shape[1]
    return columns.gather(1, torch.where(inside, source, 0)).masked_fill(~inside, 0)


def _final_run(filled: Bool[Tensor, "S C"], width: Int[Tensor, " S"], block: Bool[Tensor, " S"]) -> Int[Tensor, " S"]:
    """The leading filled run, which is final; a block is final only as a whole."""
    run = leading_run(filled)
    return torch.where(block & (run < width), 0, run)


def _where(condition: Bool[Tensor, " S"], yes: _Tensors, no: _Tensors) -> _Tensors:
    """Choose row by row between two dataclasses of tensors."""
    values = []
    for f in fields(yes):
        a, b = getattr(yes, f.name), getattr(no, f.name)
        values.append(torch.where(condition if a.ndim == 1 else condition[:, None], a, b))
    return type(yes)(*values)
