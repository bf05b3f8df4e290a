# SPDX-License-Identifier: Apache-2.0
"""Attention of packed rows over paged keys, for few or many rows per sequence. Query heads of a key head run side by
side, and keys are split over programs if sequences are few.

The twin is ``wedlm.attention.sdpa``. A row's result depends on where the keys are split, and for few rows on which
instruction multiplies. In fixed parts it depends neither on the other rows of the step nor on the number of rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wedlm.kernels.launch import launch_options, pdl_wait, processors, supports_descriptors, supports_pdl


@dataclass(frozen=True)
class Tile:
    """At most this many rows (query heads of a key head count as rows) over this many keys at once. ``halves``: keys
    that every row of a tile sees go through a separate loop, which masks nothing. ``copies``: both loops copy keys and
    values tile by tile, through tensor descriptors (Hopper's bulk copies); a page must hold whole tiles."""

    rows: int
    keys: int
    warps: int
    stages: int
    halves: bool = False
    copies: bool = False


# Of windows, of chunks, and of chunks long enough that large tiles occupy all processors. Measured: docs/log.md.
SHORT, MIDDLE, LONG = Tile(64, 64, 4, 2), Tile(64, 64, 4, 3, halves=True), Tile(256, 64, 8, 3, halves=True)
# The same where keys can be copied in whole tiles.
COPIED = {
    SHORT: Tile(64, 64, 4, 2, halves=True, copies=True),
    MIDDLE: Tile(64, 64, 4, 2, halves=True, copies=True),
    LONG: Tile(128, 64, 4, 2, halves=True, copies=True),
}
# Of single rows where not all programs find a place at once, three a processor. Tiles that are copied take a third
# longer there, between other kernels; with fewer programs they are the faster ones (docs/log.md, 2026-11-30).
SINGLE = Tile(16, 64, 4, 2, halves=True)
FLOAT32 = Tile(32, 64, 4, 2)  # without tensor cores products are unrolled: 64 rows are 580 kB of code, 2 s to compile
MAX_SPLITS = 64
# A hidden key's score lies so far below the lowest maximum that its weight is 0 without further ado.
_HIDDEN, _LOWEST = tl.constexpr(-1e30), tl.constexpr(-1e20)


@dataclass(frozen=True)
class PagedRows:
    """S sequences' rows, packed, on the device. Sequence s has rows row_start[s] .. + num_rows[s] - 1 over cached[s]
    keys; its pages are ``page_table[table_row[s]]``. ``shared`` and ``own_start`` are as in ``RowVisibility``.

    ``max_rows``: no sequence has more. ``max_keys``: none sees more (it only decides the number of splits). ``within``:
    all rows come before this one of the packed rows (None: anywhere).
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
    within: int | None = None


@triton.jit
def _fixed_start(part):
    """The first key of a fixed part. Parts have 128 keys each up to 1,024, 256 up to 4,096, and 1,024 beyond."""
    short, middle = part * 128, 1024 + (part - 8) * 256
    return tl.where(part <= 8, short, tl.where(part <= 20, middle, 4096 + (part - 20) * 1024))


@triton.jit
def _is_fixed_start(key):
    """Whether a fixed part begins with this key."""
    return key % tl.where(key < 1024, 128, tl.where(key < 4096, 256, 1024)) == 0


@triton.jit
def _fixed_parts(num_keys):
    """How many fixed parts have keys."""
    middle, long = 8 + tl.cdiv(num_keys - 1024, 256), 20 + tl.cdiv(num_keys - 4096, 1024)
    return tl.where(num_keys <= 1024, tl.cdiv(num_keys, 128), tl.where(num_keys <= 4096, middle, long))


def num_fixed_parts(num_keys: int) -> int:
    """``_fixed_parts`` on the host."""
    if num_keys <= 1024:
        return -(-num_keys // 128)
    return 8 + -(-(num_keys - 1024) // 256) if num_keys <= 4096 else 20 + -(-(num_keys - 4096) // 1024)


@triton.jit
def _merged(best, total, best_p, total_p):
    """Merge the softmax over some keys with that of a part: (best, total, factor of the former, factor of the part)."""
    higher = tl.maximum(best, best_p)
    old, new = tl.exp2(best - higher), tl.exp2(best_p - higher)
    return higher, tl.fma(total, old, total_p * new), old, new


@triton.jit
def _part_length(num_keys, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """Keys of a part: a power of two of tiles, so that a key stays in its part while the sequence grows."""
    length = BLOCK_N
    while length * SPLITS < tl.cdiv(num_keys, BLOCK_N) * BLOCK_N:
        length *= 2
    return length


@triton.jit
def _keys_of_tile(num_rows, cached, tile, BLOCK_M: tl.constexpr, SHARE: tl.constexpr):
    """The keys that the last row of a tile sees."""
    return cached + tl.minimum(num_rows, (tile + 1) * BLOCK_M // SHARE + 1)


@triton.jit
def _add_keys(
    q, best, total, acc, first_key, stop, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr, value_scale_ptr,
    table, kv_head, row, cached, shared, own, scale_log2,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Extend the softmax over the keys so far by a tile of keys from ``first_key`` on."""
    d = tl.arange(0, D)
    key = first_key + tl.arange(0, BLOCK_N)
    exists = key < stop
    slot = 0
    if COPIES:
        slot = tl.load(table + first_key // PAGE).to(tl.int32) * PAGE + first_key % PAGE
        k = keys_copy.load([slot, kv_head * D]).T
    else:
        if MASKED:
            page = tl.load(table + key // PAGE, mask=exists, other=0).to(tl.int64)
        else:
            page = tl.load(table + key // PAGE).to(tl.int64)
        place = (page * PAGE + key % PAGE) * KV_HEADS + kv_head
        at = place * D
        if MASKED:
            k = tl.load(keys_ptr + at[None] + d[:, None], mask=exists[None], other=0.0)
        else:
            k = tl.load(keys_ptr + at[None] + d[:, None])
    if FP8:  # exact in any type that queries have
        k = k.to(q.dtype)
    scores = tl.dot(q, k, input_precision="ieee")
    if FP8:
        scores *= tl.load(key_scale_ptr + place, mask=exists, other=0.0)[None]
    if MASKED:
        new = (key - cached)[None]
        visible = (new <= row[:, None]) & exists[None]
        if GROUPS:
            visible = visible & ((new < shared[:, None]) | (new >= own[:, None]) | (new < 0))
        scores = tl.where(visible, scores, _HIDDEN)
    higher = tl.maximum(best, tl.max(scores, axis=1) * scale_log2)
    # Written as one operation, so that both loops round alike.
    weights = tl.exp2(tl.fma(scores, scale_log2, -higher[:, None]))
    shrink = tl.exp2(best - higher)
    total = total * shrink + tl.sum(weights, axis=1)
    if COPIES:
        v = values_copy.load([slot, kv_head * D])
        if MASKED:  # a page's other slots may hold anything, and 0 times that may be NaN
            v = tl.where(exists[:, None], v, 0.0)
    elif MASKED:
        v = tl.load(values_ptr + at[:, None] + d[None], mask=exists[:, None], other=0.0)
    else:
        v = tl.load(values_ptr + at[:, None] + d[None])
    if FP8:
        weights *= tl.load(value_scale_ptr + place, mask=exists, other=0.0)[None]
        v = v.to(q.dtype)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _part_of_keys(
    q, start, stop, seen, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr, value_scale_ptr, table, kv_head,
    row, cached, shared, own, scale_log2,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, COPIES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax over keys ``start`` .. ``stop`` - 1: (maximum, sum of weights, sum of weighted values). All rows of the
    tile see the keys before ``seen``."""
    best = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    middle = start
    if HALVES:
        middle = start + tl.maximum(tl.minimum(seen, stop) - start, 0) // BLOCK_N * BLOCK_N
        for first_key in tl.range(start, middle, BLOCK_N, num_stages=STAGES):
            best, total, acc = _add_keys(
                q, best, total, acc, first_key, stop, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr,
                value_scale_ptr, table, kv_head, row, cached, shared, own, scale_log2,
                KV_HEADS, D, PAGE, BLOCK_N, False, GROUPS, FP8, COPIES,
            )  # fmt: skip
    for first_key in tl.range(middle, stop, BLOCK_N, num_stages=STAGES):
        best, total, acc = _add_keys(
            q, best, total, acc, first_key, stop, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr,
            value_scale_ptr, table, kv_head, row, cached, shared, own, scale_log2,
            KV_HEADS, D, PAGE, BLOCK_N, True, GROUPS, FP8, COPIES,
        )  # fmt: skip
    return best, total, acc


@triton.jit
def _after_part(best, total, acc, best_p, total_p, acc_p):
    """Merge a part into the softmax over the parts before it."""
    best, total, old, new = _merged(best, total, best_p, total_p)
    return best, total, tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), acc_p * new[:, None])


@triton.jit
def _begin_part(first_key, best, total, acc, best_p, total_p, acc_p, BLOCK_M: tl.constexpr, D: tl.constexpr):
    """Where a fixed part begins, merge the one before it, and begin with no keys; elsewhere nothing changes."""
    if _is_fixed_start(first_key) & (first_key > 0):
        best, total, acc = _after_part(best, total, acc, best_p, total_p, acc_p)
        best_p = tl.full((BLOCK_M,), _LOWEST, tl.float32)
        total_p = tl.zeros((BLOCK_M,), tl.float32)
        acc_p = tl.zeros((BLOCK_M, D), tl.float32)
    return best, total, acc, best_p, total_p, acc_p


@triton.jit
def _all_fixed_parts(
    q, stop, seen, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr, value_scale_ptr, table, kv_head, row,
    cached, shared, own, scale_log2,
    KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, COPIES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What ``_part_of_keys`` gives for all fixed parts, merged in their order. Tiles of all parts are in one loop, so
    that those of the next part are on their way while a part ends."""
    best = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    best_p, total_p, acc_p = best, total, acc
    middle = 0
    if HALVES:
        middle = tl.minimum(seen, stop) // BLOCK_N * BLOCK_N
        for first_key in tl.range(0, middle, BLOCK_N, num_stages=STAGES):
            best, total, acc, best_p, total_p, acc_p = _begin_part(
                first_key, best, total, acc, best_p, total_p, acc_p, BLOCK_M, D
            )
            best_p, total_p, acc_p = _add_keys(
                q, best_p, total_p, acc_p, first_key, stop, keys_ptr, values_ptr, keys_copy, values_copy,
                key_scale_ptr, value_scale_ptr, table, kv_head, row, cached, shared, own, scale_log2,
                KV_HEADS, D, PAGE, BLOCK_N, False, GROUPS, FP8, COPIES,
            )  # fmt: skip
    for first_key in tl.range(middle, stop, BLOCK_N, num_stages=STAGES):
        best, total, acc, best_p, total_p, acc_p = _begin_part(
            first_key, best, total, acc, best_p, total_p, acc_p, BLOCK_M, D
        )
        best_p, total_p, acc_p = _add_keys(
            q, best_p, total_p, acc_p, first_key, stop, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr,
            value_scale_ptr, table, kv_head, row, cached, shared, own, scale_log2,
            KV_HEADS, D, PAGE, BLOCK_N, True, GROUPS, FP8, COPIES,
        )  # fmt: skip
    return _after_part(best, total, acc, best_p, total_p, acc_p)


@triton.jit
def _paged_attention(
    q_ptr, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr, value_scale_ptr, out_ptr, part_ptr, stats_ptr,
    row_start_ptr, num_rows_ptr, cached_ptr, table_row_ptr, page_table_ptr, shared_ptr, own_start_ptr,
    table_width, scale_log2, num_rows_total,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, COPIES: tl.constexpr,
    STAGES: tl.constexpr, FP8: tl.constexpr, FIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one sequence and key head, over one part of its keys (``_add_parts`` adds them up).
    ``FIXED``: over every ``SPLITS``th of the fixed parts, each separately; with one split they are added up here."""
    SHARE: tl.constexpr = HEADS // KV_HEADS
    sequence, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    # The last rows see most keys: their tiles begin first.
    tile, split = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    # The plan was complete before the first layer began: only queries and new keys come from the kernel before.
    num_rows = tl.load(num_rows_ptr + sequence).to(tl.int32)
    if tile * BLOCK_M >= num_rows * SHARE:
        pdl_wait(PDL)
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
    shared, own = row, row
    if GROUPS:
        shared = tl.load(shared_ptr + first + row, mask=real, other=0).to(tl.int32)
        own = tl.load(own_start_ptr + first + row, mask=real, other=0).to(tl.int32)
    num_keys = _keys_of_tile(num_rows, cached, tile, BLOCK_M, SHARE)
    start, stop = 0, num_keys
    parts = 1
    if FIXED:
        parts = _fixed_parts(num_keys)
        if split >= parts:
            pdl_wait(PDL)
            return
    elif SPLITS > 1:
        length = _part_length(num_keys, BLOCK_N, SPLITS)
        start, stop = split * length, tl.minimum((split + 1) * length, num_keys)
        if start >= stop:  # _add_parts knows that there is nothing
            pdl_wait(PDL)
            return
    pdl_wait(PDL)
    q = tl.load(q_ptr + place[:, None] + d[None], mask=real[:, None], other=0.0)
    # All rows of the tile see the cached keys and, in plain order, those of the rows before the tile.
    seen = cached if GROUPS else cached + tile * BLOCK_M // SHARE
    dtype = out_ptr.dtype.element_ty
    if FIXED and SPLITS == 1:
        best, total, acc = _all_fixed_parts(
            q, stop, seen, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr, value_scale_ptr, table, kv_head,
            row, cached, shared, own, scale_log2,
            KV_HEADS, D, PAGE, GROUPS, FP8, BLOCK_M, BLOCK_N, HALVES, COPIES, STAGES,
        )  # fmt: skip
        tl.store(out_ptr + place[:, None] + d[None], (acc / total[:, None]).to(dtype), mask=real[:, None])
    elif FIXED:
        for part in range(split, parts, SPLITS):
            best, total, acc = _part_of_keys(
                q, _fixed_start(part), tl.minimum(_fixed_start(part + 1), num_keys), seen, keys_ptr, values_ptr,
                keys_copy, values_copy, key_scale_ptr, value_scale_ptr, table, kv_head, row, cached, shared, own,
                scale_log2, KV_HEADS, D, PAGE, GROUPS, FP8, BLOCK_M, BLOCK_N, HALVES, COPIES, STAGES,
            )  # fmt: skip
            own_part = (part * num_rows_total + first + row) * HEADS + head
            tl.store(part_ptr + own_part[:, None] * D + d[None], acc, mask=real[:, None])
            tl.store(stats_ptr + own_part * 2, best, mask=real)
            tl.store(stats_ptr + own_part * 2 + 1, total, mask=real)
    else:
        best, total, acc = _part_of_keys(
            q, start, stop, seen, keys_ptr, values_ptr, keys_copy, values_copy, key_scale_ptr, value_scale_ptr, table,
            kv_head, row, cached, shared, own, scale_log2,
            KV_HEADS, D, PAGE, GROUPS, FP8, BLOCK_M, BLOCK_N, HALVES, COPIES, STAGES,
        )  # fmt: skip
        if SPLITS == 1:
            tl.store(out_ptr + place[:, None] + d[None], (acc / total[:, None]).to(dtype), mask=real[:, None])
        else:
            own_part = (split * num_rows_total + first + row) * HEADS + head
            tl.store(part_ptr + own_part[:, None] * D + d[None], acc, mask=real[:, None])
            tl.store(stats_ptr + own_part * 2, best, mask=real)
            tl.store(stats_ptr + own_part * 2 + 1, total, mask=real)


@triton.jit
def _add_parts(
    part_ptr, stats_ptr, out_ptr, row_start_ptr, num_rows_ptr, cached_ptr, num_rows_total,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIXED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add the parts that have keys, for one row and head of a sequence, to the output. ``FIXED``: one after the other,
    in the order of ``_paged_attention``."""
    SHARE: tl.constexpr = HEADS // KV_HEADS
    sequence, row, head = tl.program_id(0), tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    num_rows = tl.load(num_rows_ptr + sequence).to(tl.int32)
    if row >= num_rows:
        pdl_wait(PDL)
        return
    cached = tl.load(cached_ptr + sequence).to(tl.int32)
    place = (tl.load(row_start_ptr + sequence).to(tl.int64) + row) * HEADS + head
    tile = (row * SHARE + head % SHARE) // BLOCK_M
    num_keys = _keys_of_tile(num_rows, cached, tile, BLOCK_M, SHARE)
    d = tl.arange(0, D)
    dtype = out_ptr.dtype.element_ty
    if FIXED:
        parts = _fixed_parts(num_keys)
        pdl_wait(PDL)
        best = tl.full((1,), _LOWEST, tl.float32)
        total = tl.zeros((1,), tl.float32)
        acc = tl.zeros((D,), tl.float32)
        for part in tl.range(0, parts, num_stages=4):
            index = part * num_rows_total * HEADS + place + tl.arange(0, 1)
            best_p, total_p = tl.load(stats_ptr + index * 2), tl.load(stats_ptr + index * 2 + 1)
            acc_p = tl.load(part_ptr + (part * num_rows_total * HEADS + place) * D + d)
            best, total, old, new = _merged(best, total, best_p, total_p)
            acc = tl.fma(acc, tl.broadcast_to(old, acc.shape), acc_p * new)
        tl.store(out_ptr + place * D + d, (acc / total).to(dtype))
    else:
        part = tl.arange(0, SPLITS)
        has_keys = part * _part_length(num_keys, BLOCK_N, SPLITS) < num_keys
        pdl_wait(PDL)
        index = part * num_rows_total * HEADS + place
        best = tl.load(stats_ptr + index * 2, mask=has_keys, other=_LOWEST)
        total = tl.load(stats_ptr + index * 2 + 1, mask=has_keys, other=0.0)
        acc = tl.load(part_ptr + index[:, None] * D + d[None], mask=has_keys[:, None], other=0.0)
        weight = tl.exp2(best - tl.max(best, axis=0))
        acc = tl.sum(acc * weight[:, None], axis=0)
        total = tl.sum(total * weight, axis=0)
        tl.store(out_ptr + place * D + d, (acc / total).to(dtype))


def num_splits(num_programs: int, max_keys: int, num_processors: int, tile_keys: int) -> int:
    """The number of parts of the keys that keeps all processors busy: a power of two, at most one per tile of keys."""
    splits = 1
    while splits * 2 * num_programs <= 2 * num_processors and splits * tile_keys < max_keys and splits < MAX_SPLITS:
        splits *= 2
    return splits


def tile_for(
    most: int,
    total: int,
    row_bytes: int,
    num_processors: int,
    shared_bytes: int,
    fixed: bool = False,
    copies: bool = False,
) -> Tile:
    """The tile for sequences of at most ``most`` rows (heads count), ``total`` for all key heads, of ``row_bytes``
    each. ``fixed``: sums are held twice. ``copies``: whole tiles of keys can be copied."""
    short, middle, long = (COPIED.get(tile, tile) if copies else tile for tile in (SHORT, MIDDLE, LONG))
    if copies and not fixed and most <= SINGLE.rows and total // most > 3 * num_processors:
        return SINGLE
    if most <= short.rows:
        return short
    # Two programs share a processor where copied tiles leave room for both.
    enough = (2 if long.copies else 1) * num_processors
    fitting = [tile for tile in (long, middle) if _shared_bytes(tile, row_bytes) <= shared_bytes]
    if long in fitting and (fixed or total // long.rows < enough):
        fitting.remove(long)
    return fitting[0] if fitting else short


def _shared_bytes(tile: Tile, row_bytes: int) -> int:
    """Queries, keys and values in flight, and a little more."""
    return (tile.rows + 2 * tile.stages * tile.keys) * row_bytes + 4096


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: PagedRows,
    out: Tensor | None = None,
    fixed: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of q [T, H, D] over one layer's keys and values [A, K, D], in which those of the rows are already
    written: [T, H, D].

    fixed: compute in parts that only key indices decide, and with one instruction, so that no bit of a row's result
    depends on the rest of the step. scales: of keys and values in FP8, [A, K] each.

    Rows of no sequence (padding, or sequences that ``rows`` does not name) keep what is in ``out``, or what is in
    memory, which may be any number.
    """
    num_rows, heads, head_dim = q.shape
    num_rows = num_rows if rows.within is None else rows.within
    kv_heads = keys.shape[1]
    share, sequences = heads // kv_heads, len(rows.num_rows)
    most = min(rows.max_rows, num_rows) * share
    pdl = supports_pdl(q.device)
    number, shared_bytes = processors(q.device)
    row_bytes = head_dim * q.dtype.itemsize
    copies = scales is None and rows.page_size % MIDDLE.keys == 0 and supports_descriptors(q.device)
    tile = tile_for(most, kv_heads * num_rows * share, row_bytes, number, shared_bytes, fixed, copies)
    tile = tile if q.dtype.itemsize == 2 else FLOAT32
    # A key's tile is one block of the cache, seen as slots by heads' numbers.
    copied = [
        TensorDescriptor.from_tensor(one.flatten(1), [tile.keys, head_dim]) if tile.copies else one
        for one in (keys, values)
    ]
    block = tile.rows if fixed else min(tile.rows, max(16, triton.next_power_of_2(most)))
    tiles = triton.cdiv(most, block)
    busy = min(sequences * tiles, num_rows * share // block + sequences)  # tiles that can have rows
    splits = num_splits(busy * kv_heads, rows.max_keys, number, tile.keys)
    out = torch.empty_like(q) if out is None else out
    part = stats = out
    if splits > 1:
        parts = num_fixed_parts(rows.max_keys) if fixed else splits
        part = torch.empty(parts, num_rows, heads, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(parts, num_rows, heads, 2, dtype=torch.float32, device=q.device)
    groups = rows.shared is not None
    shape = {"HEADS": heads, "KV_HEADS": kv_heads, "D": head_dim, "SPLITS": splits, "BLOCK_M": block}
    _paged_attention[(sequences * kv_heads, tiles, splits)](
        q, keys, values, *copied, *(scales or (q, q)), out, part, stats,
        rows.row_start, rows.num_rows, rows.cached, rows.table_row, rows.page_table,
        rows.shared if groups else rows.num_rows, rows.own_start if groups else rows.num_rows,
        rows.page_table.shape[1], head_dim**-0.5 * 1.4426950408889634, num_rows,
        **shape, PAGE=rows.page_size, GROUPS=groups, BLOCK_N=tile.keys, HALVES=tile.halves, COPIES=tile.copies,
        STAGES=tile.stages, FP8=scales is not None, FIXED=fixed, PDL=pdl, num_warps=tile.warps, **launch_options(pdl),
    )  # fmt: skip
    if splits > 1:
        _add_parts[(sequences, min(rows.max_rows, num_rows) * heads)](
            part, stats, out, rows.row_start, rows.num_rows, rows.cached, num_rows,
            **shape, BLOCK_N=tile.keys, FIXED=fixed, PDL=pdl,
            num_warps=1 if fixed or splits * head_dim <= 1024 else 4, **launch_options(pdl),
        )  # fmt: skip
    return out
