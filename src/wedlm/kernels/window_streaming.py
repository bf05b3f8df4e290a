# SPDX-License-Identifier: Apache-2.0
"""The transitions of a step that streams (or fills blocks) on the device, one kernel each: windows to rows, and the
forward's results to windows. The twins are ``wedlm.algorithm.window`` and ``wedlm.algorithm.reorder``."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from wedlm.algorithm.window import WindowParams, WindowState
from wedlm.kernels.step_output import empty_results

_SEQUENCES_PER_TILE = 32
_ROWS_PER_TILE = 256


@dataclass(frozen=True)
class StreamingRows:
    """Rows of a step, packed, a window's filled ones before its masked ones, padded to a capacity T with rows whose
    keys go to the trash slot. L logits belong to the masked ones, in causal streaming each window's after the row that
    gives the next token, then to padding. S sequences."""

    tokens: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    slots: Int[Tensor, " T"]
    logits_indices: Int[Tensor, " L"]  # the row that has them
    sequence: Int[Tensor, " L"]
    target: Int[Tensor, " L"]
    row_start: Int[Tensor, " S"]
    num_rows: Int[Tensor, " S"]
    cached: Int[Tensor, " S"]
    run: Int[Tensor, " S"]  # rows that this step commits
    logits_start: Int[Tensor, " S"]


@triton.jit
def _final_run(filled, column, width, block, C: tl.constexpr):
    """The leading filled run of each window [N, C]; a block is final only as a whole."""
    run = tl.min(tl.where(filled, C, column), axis=1)
    return tl.where((block != 0) & (run < width), 0, run)


@triton.jit
def _extended(
    slot, inside, cached_ptr, width_ptr, filled_ptr, block_ptr, causal_ptr, max_positions_ptr, C: tl.constexpr
):
    """(filled [N, C], cached, run, width after ``extend``, filled columns, whether a filled row gives the next token)
    of the windows ``slot`` [N]."""
    column = tl.arange(0, C)[None].to(tl.int64)
    width = tl.load(width_ptr + slot, mask=inside, other=0)
    cached = tl.load(cached_ptr + slot, mask=inside, other=0)
    block = tl.load(block_ptr + slot, mask=inside, other=0)
    room = tl.load(max_positions_ptr + slot, mask=inside, other=0) - cached
    here = inside[:, None] & (column < width[:, None])
    filled = here & (tl.load(filled_ptr + slot[:, None] * C + column, mask=here, other=0) != 0)
    run = _final_run(filled, column, width, block, C)
    width = tl.minimum(width + run, tl.maximum(room, width))
    gives_next = (tl.load(causal_ptr + slot, mask=inside, other=0) != 0) & (run < width)
    return filled, cached, run, width, tl.sum(filled.to(tl.int64), axis=1), gives_next.to(tl.int64)


@triton.jit(do_not_specialize=["num_sequences", "capacity", "num_logits"])
def _rows(
    index_ptr, cached_ptr, width_ptr, tokens_ptr, filled_ptr, block_ptr, causal_ptr,
    max_positions_ptr, suffix_length_ptr,
    table_ptr, table_width, mask_token_id, trash_slot, num_sequences, capacity, num_logits,
    row_tokens_ptr, positions_ptr, slots_ptr, logits_indices_ptr, sequence_ptr, target_ptr,
    row_start_ptr, num_rows_ptr, cached_out_ptr, run_ptr, logits_start_ptr,
    C: tl.constexpr, PAGE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    row_start = tl.full((), 0, tl.int64)
    logits_start = tl.full((), 0, tl.int64)
    for begin in range(0, s, BLOCK_S):
        other = begin + tl.arange(0, BLOCK_S)
        before = other < s
        slot = tl.load(index_ptr + other, mask=before, other=0)
        _filled, _cached, _run, width, num_filled, gives_next = _extended(
            slot, before, cached_ptr, width_ptr, filled_ptr, block_ptr, causal_ptr, max_positions_ptr, C
        )
        row_start += tl.sum(width, axis=0)
        logits_start += tl.sum(width - num_filled + gives_next, axis=0)
    if s == num_sequences:  # padding
        zero = tl.zeros((BLOCK_T,), tl.int64)
        for begin in range(0, capacity, BLOCK_T):
            row = begin + tl.arange(0, BLOCK_T)
            pad = (row >= row_start) & (row < capacity)
            tl.store(row_tokens_ptr + row, zero + mask_token_id, mask=pad)
            tl.store(positions_ptr + row, zero, mask=pad)
            tl.store(slots_ptr + row, zero + trash_slot, mask=pad)
        for begin in range(0, num_logits, BLOCK_T):
            row = begin + tl.arange(0, BLOCK_T)
            pad = (row >= logits_start) & (row < num_logits)
            tl.store(logits_indices_ptr + row, zero, mask=pad)
            tl.store(sequence_ptr + row, zero, mask=pad)
            tl.store(target_ptr + row, zero, mask=pad)
        return
    only = tl.arange(0, 1)
    slot = tl.load(index_ptr + s + only)
    filled, cached, run, width, num_filled, gives_next = _extended(
        slot, only == 0, cached_ptr, width_ptr, filled_ptr, block_ptr, causal_ptr, max_positions_ptr, C
    )
    column = tl.arange(0, C)[None].to(tl.int64)
    masked = (column < width[:, None]) & ~filled
    rank_filled = tl.cumsum(filled.to(tl.int64), axis=1) - 1
    rank_masked = tl.cumsum(masked.to(tl.int64), axis=1) - 1
    row = tl.where(filled, rank_filled, num_filled[:, None] + rank_masked)
    key = cached[:, None] + row
    place = row_start + row
    inside = (column < width[:, None]) & (place < capacity)
    token = tl.load(tokens_ptr + slot[:, None] * C + column, mask=filled, other=0)
    page = tl.load(table_ptr + slot[:, None] * table_width + key // PAGE, mask=inside, other=0)
    position = cached[:, None] - tl.load(suffix_length_ptr + slot)[:, None] + column
    tl.store(row_tokens_ptr + place, tl.where(filled, token, mask_token_id), mask=inside)
    tl.store(positions_ptr + place, position, mask=inside)
    tl.store(slots_ptr + place, page * PAGE + key % PAGE, mask=inside)
    # Causal: the last row of the leading run gives the token of the first masked position.
    is_next = (gives_next[:, None] != 0) & (column == run[:, None] - 1)
    logits_row = logits_start + tl.where(is_next, 0, gives_next[:, None] + rank_masked)
    picked = (masked | is_next) & inside & (logits_row < num_logits)
    tl.store(logits_indices_ptr + logits_row, place, mask=picked)
    tl.store(sequence_ptr + logits_row, column * 0 + s, mask=picked)
    tl.store(target_ptr + logits_row, position + is_next, mask=picked)
    tl.store(row_start_ptr + s + only, row_start + only * 0)
    tl.store(logits_start_ptr + s + only, logits_start + only * 0)
    tl.store(num_rows_ptr + s + only, width)
    tl.store(cached_out_ptr + s + only, cached)
    tl.store(run_ptr + s + only, run)


def streaming_rows(
    state: WindowState,
    params: WindowParams,
    index: Tensor,
    page_table: Tensor,
    page_size: int,
    capacity: int,
    num_logits: int,
    mask_token_id: int,
    trash_slot: int,
) -> StreamingRows:
    """Rows of the windows ``index`` [S] after ``extend``: at most ``capacity`` = T in all, L = ``num_logits`` with
    logits.

    ``state``, ``params`` and ``page_table`` by window; ``state`` stays as it is.
    """
    num_sequences, columns = len(index), state.tokens.shape[1]
    sizes = (*[capacity] * 3, *[num_logits] * 3, *[num_sequences] * 5)
    rows = StreamingRows(*(torch.empty(size, dtype=torch.long, device=index.device) for size in sizes))
    _rows[(num_sequences + 1,)](
        index, state.cached, state.width, state.tokens, state.filled.view(torch.uint8),
        params.block.view(torch.uint8), params.causal.view(torch.uint8), params.max_positions, params.suffix_length,
        page_table, page_table.shape[1], mask_token_id, trash_slot, num_sequences, capacity, num_logits,
        rows.tokens, rows.positions, rows.slots, rows.logits_indices, rows.sequence, rows.target,
        rows.row_start, rows.num_rows, rows.cached, rows.run, rows.logits_start,
        C=columns, PAGE=page_size, BLOCK_S=min(_SEQUENCES_PER_TILE, triton.next_power_of_2(num_sequences)),
        BLOCK_T=_ROWS_PER_TILE, num_warps=4 if num_sequences > 4 else 1,
    )  # fmt: skip
    return rows


@triton.jit
def _update(
    index_ptr, cached_ptr, width_ptr, tokens_ptr, filled_ptr, logprobs_ptr,
    block_ptr, causal_ptr, threshold_ptr, penalty_ptr,
    num_rows_ptr, run_ptr, logits_start_ptr, choice_ptr, entropy_ptr, logprob_ptr, ints_ptr, floats_ptr,
    C: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    slot, first_row = tl.load(index_ptr + s), tl.load(logits_start_ptr + s)
    old_width, width, run = tl.load(width_ptr + slot), tl.load(num_rows_ptr + s), tl.load(run_ptr + s)
    cached = tl.load(cached_ptr + slot) + run
    column = tl.arange(0, C).to(tl.int64)
    place = slot * C + column
    filled = (column < old_width) & (tl.load(filled_ptr + place) != 0)
    tokens, logprobs = tl.load(tokens_ptr + place), tl.load(logprobs_ptr + place)
    masked = (column < width) & ~filled
    first = tl.min(tl.where(masked, column, C), axis=0)
    # Causal: the row before decides the first masked column, whose own row is uncertain if it differs.
    is_causal = tl.load(causal_ptr + slot) != 0
    is_next = masked & (column == first) & is_causal
    row = first_row + is_causal.to(tl.int64) + tl.cumsum(masked.to(tl.int64), axis=0) - 1
    deciding = tl.where(is_next, first_row, row)
    choice = tl.load(choice_ptr + deciding, mask=masked, other=0)
    differs = is_next & (choice != tl.load(choice_ptr + row, mask=masked, other=0))
    tokens = tl.where(filled, tokens, choice)
    logprobs = tl.where(filled, logprobs, tl.load(logprob_ptr + deciding, mask=masked, other=0.0))
    # Which masked columns to fill: select_fill, in the same precision.
    entropy = tl.load(entropy_ptr + row, mask=masked, other=0.0).to(tl.float64)
    distance = (column - first).to(tl.float64)
    adjusted = entropy + tl.load(penalty_ptr + slot) * distance
    infinite = tl.full((C,), float("inf"), tl.float64)
    adjusted = tl.where(masked & (adjusted == adjusted) & ~differs, adjusted, infinite)  # nan is least certain
    below = adjusted < tl.load(threshold_ptr + slot)
    smallest = masked & (adjusted == tl.min(adjusted, axis=0))
    leftmost = smallest & (column == tl.min(tl.where(smallest, column, C), axis=0))
    some = tl.max(below.to(tl.int32), axis=0) > 0
    stop = tl.min(tl.where(masked & ~below, column, C), axis=0)
    run_below = is_next | (masked & (column < stop))
    filled = filled | tl.where(is_causal, run_below, tl.where(some, below, leftmost))
    # The committed run leaves on the left; what is final now may be delivered.
    width -= run
    count = tl.min(tl.where(filled & (column >= run) | (column < run), C, column), axis=0) - run
    count = tl.where((tl.load(block_ptr + slot) != 0) & (count < width), 0, tl.minimum(count, width))
    tl.debug_barrier()  # columns move to places that other threads have read
    stays, target = column >= run, column - run
    tl.store(tokens_ptr + place - run, tokens, mask=stays)
    tl.store(logprobs_ptr + place - run, logprobs, mask=stays)
    tl.store(filled_ptr + place - run, filled.to(tl.uint8), mask=stays)
    tl.store(filled_ptr + place, tl.zeros((C,), tl.uint8), mask=column >= C - run)
    tl.store(cached_ptr + slot, cached)
    tl.store(width_ptr + slot, width)
    figures = ints_ptr + s * (4 + C + C // 2)
    tl.store(figures, count)
    tl.store(figures + 1, width + run)
    tl.store(figures + 2, cached)
    tl.store(figures + 3, cached * 0)
    tl.store(figures + 4 + target, tokens, mask=stays)
    tl.store(floats_ptr + s * (3 * C + 8) + target, logprobs, mask=stays)


def update_streaming(
    state: WindowState,
    params: WindowParams,
    index: Tensor,
    rows: StreamingRows,
    choice: Tensor,
    entropy: Tensor,
    logprobs: Tensor,
) -> Tensor:
    """Advance the windows ``index`` in place, by what their masked rows [L] chose; ``state`` and ``params`` are by
    window.

    Returns results as in ``kernels/step_output.py``, without drafts; the values after the emitted tokens are arbitrary.
    ``index`` may name the empty window several times; it stays empty.
    """
    num_sequences, columns = len(index), state.tokens.shape[1]
    results, floats = empty_results(num_sequences, columns, index.device)
    _update[(num_sequences,)](
        index, state.cached, state.width, state.tokens, state.filled.view(torch.uint8), state.logprobs,
        params.block.view(torch.uint8), params.causal.view(torch.uint8), params.threshold, params.penalty,
        rows.num_rows, rows.run, rows.logits_start, choice, entropy, logprobs, results, floats,
        C=columns, num_warps=1,
    )  # fmt: skip
    return results
