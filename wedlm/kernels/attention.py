# SPDX-License-Identifier: Apache-2.0
"""Attention of packed rows over paged keys: few or many rows a sequence, query heads of a key head side by side, keys
split over programs where sequences are few.

The twin is ``wedlm.attention.sdpa``. A row's result does not depend on the other rows of the step, nor on the number
of rows; it does depend on where the keys are split, which moves only when a sequence doubles.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from wedlm.kernels.launch import begin, launch_options, overlaps

_KEYS_PER_TILE = 64


@dataclass(frozen=True)
class PagedRows:
    """S sequences' rows, packed; all on the device. Sequence s has rows row_start[s] .. + num_rows[s] - 1 over
    cached[s] keys; its pages are ``page_table[table_row[s]]``. ``shared`` and ``own_start`` as in ``RowVisibility``.

    ``max_rows``: no sequence has more. ``max_keys``: none sees more (only the number of splits depends on it).
    """

    row_start: Int[Tensor, " S"]
    num_rows: Int[Tensor, " S"]
    cached: Int[Tensor, " S"]
    table_row: Int[Tensor, " S"]
    page_table: Int[Tensor, "B P"]
    page_size: int
    max_rows: int
    max_keys: int
    shared: Int[Tensor, " T"] | None = None
    own_start: Int[Tensor, " T"] | None = None


@triton.jit
def _paged_attention(
    q_ptr, keys_ptr, values_ptr, out_ptr, part_ptr, stats_ptr,
    row_start_ptr, num_rows_ptr, cached_ptr, table_row_ptr, page_table_ptr, shared_ptr, own_start_ptr,
    table_width, scale_log2, num_rows_total,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one sequence and key head, over one part of its keys (``_add_parts`` adds them up)."""
    SHARE: tl.constexpr = HEADS // KV_HEADS
    sequence, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    tile, split = tl.program_id(1), tl.program_id(2)
    # The plan was complete before the first layer began: only queries and new keys come from the kernel before.
    num_rows = tl.load(num_rows_ptr + sequence).to(tl.int32)
    if tile * BLOCK_M >= num_rows * SHARE:
        begin(OVERLAP)
        return
    cached = tl.load(cached_ptr + sequence).to(tl.int32)
    first = tl.load(row_start_ptr + sequence).to(tl.int64)
    table = page_table_ptr + tl.load(table_row_ptr + sequence).to(tl.int64) * table_width
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m // SHARE
    real = row < num_rows
    head = kv_head * SHARE + m % SHARE
    d = tl.arange(0, D)
    place = ((first + row) * HEADS + head) * D
    if GROUPS:
        shared = tl.load(shared_ptr + first + row, mask=real, other=0).to(tl.int32)
        own = tl.load(own_start_ptr + first + row, mask=real, other=0).to(tl.int32)
    num_keys = cached + tl.minimum(num_rows, (tile + 1) * BLOCK_M // SHARE + 1)
    # Parts are a power of two of tiles long, so that a key stays in its part while the sequence grows.
    num_tiles = tl.cdiv(num_keys, BLOCK_N)
    length = BLOCK_N
    if SPLITS > 1:
        while length * SPLITS < num_tiles * BLOCK_N:
            length *= 2
        start, stop = split * length, tl.minimum((split + 1) * length, num_keys)
    else:
        start, stop = 0, num_keys
    best = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    begin(OVERLAP)
    q = tl.load(q_ptr + place[:, None] + d[None], mask=real[:, None], other=0.0)
    for tile_start in tl.range(start, stop, BLOCK_N):
        key = tile_start + tl.arange(0, BLOCK_N)
        exists = key < stop
        page = tl.load(table + key // PAGE, mask=exists, other=0).to(tl.int64)
        at = ((page * PAGE + key % PAGE) * KV_HEADS + kv_head) * D
        k = tl.load(keys_ptr + at[None] + d[:, None], mask=exists[None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * scale_log2
        new = (key - cached)[None]
        visible = (new <= row[:, None]) & exists[None]
        if GROUPS:
            visible = visible & ((new < shared[:, None]) | (new >= own[:, None]) | (new < 0))
        scores = tl.where(visible, scores, -1e30)
        higher = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.where(visible, tl.exp2(scores - higher[:, None]), 0.0)
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(values_ptr + at[:, None] + d[None], mask=exists[:, None], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher
    dtype = out_ptr.dtype.element_ty
    if SPLITS == 1:
        tl.store(out_ptr + place[:, None] + d[None], (acc / total[:, None]).to(dtype), mask=real[:, None])
    else:
        own_part = split * num_rows_total * HEADS + (first + row) * HEADS + head
        tl.store(part_ptr + own_part[:, None] * D + d[None], acc, mask=real[:, None])
        tl.store(stats_ptr + own_part * 2, best, mask=real)
        tl.store(stats_ptr + own_part * 2 + 1, total, mask=real)


@triton.jit
def _add_parts(
    part_ptr, stats_ptr, out_ptr, num_places, D: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """One row and head: its parts, of which those that had no keys weigh nothing, into the output."""
    place = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, SPLITS), tl.arange(0, D)
    begin(OVERLAP)
    index = part * num_places + place
    best = tl.load(stats_ptr + index * 2)
    total = tl.load(stats_ptr + index * 2 + 1)
    acc = tl.load(part_ptr + index[:, None] * D + d[None])
    weight = tl.exp2(best - tl.max(best, axis=0))
    acc = tl.sum(tl.where((total > 0)[:, None], acc * weight[:, None], 0.0), axis=0)
    total = tl.sum(total * weight, axis=0)
    tl.store(out_ptr + place * D + d, (acc / total).to(out_ptr.dtype.element_ty))


def num_splits(num_programs: int, max_keys: int, num_processors: int) -> int:
    """Parts of the keys so that all processors have work: a power of two, at most one a tile of keys."""
    splits = 1
    while splits * 2 * num_programs <= 2 * num_processors and splits * _KEYS_PER_TILE < max_keys and splits < 64:
        splits *= 2
    return splits


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, rows: PagedRows) -> Tensor:
    """q [T, H, D] over one layer's keys and values [A, K, D], those of the rows written already: [T, H, D].

    Rows of no sequence (padding) come out as they were in memory: any number, and nobody reads them.
    """
    num_rows, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    share, sequences = heads // kv_heads, len(rows.num_rows)
    wanted = max(16, triton.next_power_of_2(min(rows.max_rows, num_rows) * share))
    limit = 128 if q.dtype.itemsize == 2 else 64
    block = min(limit, wanted)
    tiles = triton.cdiv(min(rows.max_rows, num_rows) * share, block)
    overlap = overlaps(q.device)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    splits = num_splits(sequences * kv_heads * tiles, rows.max_keys, processors)
    out = torch.empty_like(q)
    part = stats = out
    if splits > 1:
        part = torch.empty(splits, num_rows, heads, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(splits, num_rows, heads, 2, dtype=torch.float32, device=q.device)
    groups = rows.shared is not None
    _paged_attention[(sequences * kv_heads, tiles, splits)](
        q, keys, values, out, part, stats,
        rows.row_start, rows.num_rows, rows.cached, rows.table_row, rows.page_table,
        rows.shared if groups else rows.num_rows, rows.own_start if groups else rows.num_rows,
        rows.page_table.shape[1], head_dim**-0.5 * 1.4426950408889634, num_rows,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, PAGE=rows.page_size, SPLITS=splits, GROUPS=groups,
        BLOCK_M=block, BLOCK_N=_KEYS_PER_TILE, OVERLAP=overlap,
        num_warps=8 if block == 128 else 4, num_stages=2, **launch_options(overlap),
    )  # fmt: skip
    if splits > 1:
        _add_parts[(num_rows * heads,)](
            part, stats, out, num_rows * heads, D=head_dim, SPLITS=splits, OVERLAP=overlap,
            num_warps=1 if splits * head_dim <= 1024 else 4, **launch_options(overlap),
        )  # fmt: skip
    return out
