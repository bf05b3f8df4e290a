# SPDX-License-Identifier: Apache-2.0
"""The two transitions of a verified step on the device, one kernel each: windows to rows, and the forward's results to
windows. The twins are ``wedlm.algorithm.verify`` and ``wedlm.algorithm.window``, whose names it uses."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from wedlm.algorithm.window import WindowParams, WindowState
from wedlm.kernels.step_output import empty_results

_ROWS_PER_TILE = 256  # of padding


@dataclass(frozen=True)
class VerifiedRows:
    """Rows of a step, packed, padded to a capacity T with rows whose keys go to the trash slot; S sequences."""

    tokens: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    target: Int[Tensor, " T"]  # the position that the row's choice stands at
    sequence: Int[Tensor, " T"]
    shared: Int[Tensor, " T"]
    own_start: Int[Tensor, " T"]
    slots: Int[Tensor, " T"]
    row_start: Int[Tensor, " S"]
    num_rows: Int[Tensor, " S"]
    cached: Int[Tensor, " S"]


@triton.jit
def _group_start(group, groups, masked):
    """The column at which a group begins: ``masked`` rows are divided among ``groups``, and the last ones get
    one more."""
    small = groups - masked % groups
    return groups + group * (masked // groups) + tl.maximum(group - small, 0)


@triton.jit(do_not_specialize=["num_sequences", "capacity"])
def _rows(
    index_ptr, cached_ptr, width_ptr, tokens_ptr, filled_ptr, table_ptr, table_width, mask_token_id, trash_slot,
    num_sequences, capacity,
    row_tokens_ptr, positions_ptr, target_ptr, sequence_ptr, shared_ptr, own_ptr, slots_ptr,
    row_start_ptr, num_rows_ptr, cached_out_ptr,
    C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    other = tl.arange(0, BLOCK_S)
    others = tl.load(index_ptr + other, mask=other < num_sequences, other=0)
    widths = tl.load(width_ptr + others, mask=other < num_sequences, other=0)
    row_start = tl.sum(tl.where(other < s, widths, 0), axis=0)
    if s == num_sequences:  # padding
        zero = tl.zeros((BLOCK_T,), tl.int64)
        for begin in range(0, capacity, BLOCK_T):
            row = begin + tl.arange(0, BLOCK_T)
            pad = (row >= row_start) & (row < capacity)
            tl.store(row_tokens_ptr + row, zero + mask_token_id, mask=pad)
            tl.store(positions_ptr + row, zero, mask=pad)
            tl.store(target_ptr + row, zero, mask=pad)
            tl.store(sequence_ptr + row, zero, mask=pad)
            tl.store(shared_ptr + row, zero, mask=pad)
            tl.store(own_ptr + row, zero, mask=pad)
            tl.store(slots_ptr + row, zero + trash_slot, mask=pad)
        return
    slot = tl.load(index_ptr + s)
    width, cached = tl.load(width_ptr + slot), tl.load(cached_ptr + slot)
    column = tl.arange(0, C).to(tl.int64)
    inside = column < width
    filled = inside & (tl.load(filled_ptr + slot * C + column, mask=inside, other=0) != 0)
    num_filled = tl.sum(filled.to(tl.int64), axis=0)
    groups = tl.maximum(num_filled, 1)
    masked = tl.maximum(width - groups, 0)
    small, size = groups - masked % groups, masked // groups
    place = tl.maximum(column - groups, 0)
    after = tl.maximum(place - small * size, 0)
    group = tl.where(place < small * size, place // tl.maximum(size, 1), small + after // (size + 1))
    start = _group_start(group, groups, masked)
    grouped = inside & (column >= num_filled)
    position = cached + tl.where(grouped, column - start + group + 1, column)
    token = tl.load(tokens_ptr + slot * C + column, mask=filled, other=0)
    key = cached + column
    page = tl.load(table_ptr + slot * table_width + key // PAGE, mask=inside, other=0)
    row = row_start + column
    inside = inside & (row < capacity)
    tl.store(row_tokens_ptr + row, tl.where(filled, token, mask_token_id), mask=inside)
    tl.store(positions_ptr + row, position, mask=inside)
    tl.store(target_ptr + row, position + filled.to(tl.int64), mask=inside)
    tl.store(sequence_ptr + row, column * 0 + s, mask=inside)
    tl.store(shared_ptr + row, tl.where(grouped, group + 1, 0), mask=inside)
    tl.store(own_ptr + row, tl.where(grouped, start, 0), mask=inside)
    tl.store(slots_ptr + row, page * PAGE + key % PAGE, mask=inside)
    tl.store(row_start_ptr + s, row_start)
    tl.store(num_rows_ptr + s, width)
    tl.store(cached_out_ptr + s, cached)


def verified_rows(
    state: WindowState,
    index: Tensor,
    page_table: Tensor,
    page_size: int,
    capacity: int,
    mask_token_id: int,
    trash_slot: int,
) -> VerifiedRows:
    """Rows of the windows ``index`` [S] of ``state``, at most ``capacity`` = T in all; ``page_table`` by window."""
    num_sequences, columns = len(index), state.tokens.shape[1]
    rows = VerifiedRows(
        *(torch.empty(capacity, dtype=torch.long, device=index.device) for _ in range(7)),
        *(torch.empty(num_sequences, dtype=torch.long, device=index.device) for _ in range(3)),
    )
    _rows[(num_sequences + 1,)](
        index, state.cached, state.width, state.tokens, state.filled.view(torch.uint8),
        page_table, page_table.shape[1], mask_token_id, trash_slot, num_sequences, capacity,
        rows.tokens, rows.positions, rows.target, rows.sequence, rows.shared, rows.own_start, rows.slots,
        rows.row_start, rows.num_rows, rows.cached,
        C=columns, PAGE=page_size, BLOCK_S=triton.next_power_of_2(len(state.width)), BLOCK_T=_ROWS_PER_TILE,
        num_warps=1,
    )  # fmt: skip
    return rows


@triton.jit
def _update(
    index_ptr, cached_ptr, width_ptr, tokens_ptr, filled_ptr, logprobs_ptr,
    budget_ptr, max_drafts_ptr, max_positions_ptr, draft_entropy_ptr,
    row_start_ptr, choice_ptr, entropy_ptr, logprob_ptr, ints_ptr, floats_ptr,
    C: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    slot, first = tl.load(index_ptr + s), tl.load(row_start_ptr + s)
    width, cached = tl.load(width_ptr + slot), tl.load(cached_ptr + slot)
    column = tl.arange(0, C).to(tl.int64)
    inside = column < width
    place = slot * C + column
    tokens = tl.load(tokens_ptr + place)
    filled = inside & (tl.load(filled_ptr + place) != 0)
    choice = tl.load(choice_ptr + first + column, mask=inside, other=0)
    before = tl.load(choice_ptr + first + column - 1, mask=inside & (column > 0), other=0)
    accepts = filled & (tokens == before)
    accepted = tl.min(tl.where((column > 0) & ~accepts, column, C), axis=0) - 1
    count = tl.where(width > 0, accepted + 1, 0)
    groups = tl.maximum(tl.sum(filled.to(tl.int64), axis=0), 1)
    masked = tl.maximum(width - groups, 0)
    source = _group_start(accepted, groups, masked) + column
    foreseen = source < _group_start(accepted + 1, groups, masked)
    entropy = tl.load(entropy_ptr + first + source, mask=foreseen, other=float("inf"))
    sure = foreseen & (entropy.to(tl.float64) < tl.load(draft_entropy_ptr + slot))
    drafts = tl.min(tl.where((column > 0) & ~sure, column, C), axis=0) - 1
    cached = cached + count
    room = tl.load(max_positions_ptr + slot) - cached
    budget, max_drafts = tl.load(budget_ptr + slot), tl.load(max_drafts_ptr + slot)
    drafts = tl.maximum(tl.minimum(tl.minimum(drafts, max_drafts), room - 1), 0)
    more = tl.where(max_drafts > 0, (drafts + 1) * (max_drafts + 1), 0)
    more = tl.minimum(tl.minimum(budget, room) - 1 - drafts, more)
    new_width = tl.maximum(tl.minimum(1 + drafts + tl.where(more > drafts + 1, more, 0), room), 0)
    new_width = tl.where(width > 0, new_width, 0)
    predicted = tl.load(choice_ptr + first + source, mask=foreseen, other=0)
    anchor = tl.load(choice_ptr + first + accepted, mask=width > 0, other=0)
    tl.store(tokens_ptr + place, tl.where(column == 0, anchor, predicted))
    tl.store(filled_ptr + place, ((column <= drafts) & (column < new_width)).to(tl.uint8))
    tl.store(logprobs_ptr + place, tl.zeros((C,), tl.float32))
    tl.store(cached_ptr + slot, cached)
    tl.store(width_ptr + slot, new_width)
    figures = ints_ptr + s * (4 + C + C // 2)
    tl.store(figures, count)
    tl.store(figures + 1, width)
    tl.store(figures + 2, cached)
    tl.store(figures + 3, groups - 1)
    tl.store(figures + 4 + column, choice)
    logprobs = tl.load(logprob_ptr + first + column, mask=inside, other=0.0)
    tl.store(floats_ptr + s * (3 * C + 8) + column, logprobs)


def update_verified(
    state: WindowState,
    params: WindowParams,
    index: Tensor,
    rows: VerifiedRows,
    choice: Tensor,
    entropy: Tensor,
    logprobs: Tensor,
) -> Tensor:
    """Advance the windows ``index`` in place, by what their rows [T] chose; ``state`` and ``params`` are by window.

    Returns results as in ``kernels/step_output.py``. ``index`` may name the empty window several times; it stays empty.
    """
    num_sequences, columns = len(index), state.tokens.shape[1]
    results, floats = empty_results(num_sequences, columns, index.device)
    _update[(num_sequences,)](
        index, state.cached, state.width, state.tokens, state.filled.view(torch.uint8), state.logprobs,
        params.row_budget, params.max_drafts, params.max_positions, params.draft_entropy,
        rows.row_start, choice, entropy, logprobs, results, floats, C=columns, num_warps=1,
    )  # fmt: skip
    return results
