# SPDX-License-Identifier: Apache-2.0
"""Small work between the matrix products: residual and RMSNorm in one pass, gated SiLU. Both can read products with
separate scales, and write rows in eight bits.

None of these kernels lets the next one, a product, get ready while it runs: whole steps on an H200 were up to 3.5 %
slower with that (docs/log.md, 2026-11-30).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wedlm.kernels.fp8 import (
    Fp8Rows,
    Unscaled,
    empty_rows,
    parts_of,
    to_fp8,
    to_fp8_by,
    triton_type,
    warps_for,
)
from wedlm.kernels.launch import launch_options, pdl_wait, supports_pdl

# From here on gated rows with scales are rounded by a second kernel. A program that holds a whole row for its largest
# number reads all columns' scales for it, and has a processor almost to itself: 101 µs at 2,048 rows of 12,288 on an
# H200, where two kernels take 62. Without scales one program a row is the faster way at any number (39 against 56).
MANY_ROWS = 256
_TILE_ROWS, _TILE_BLOCK = 2, 1024


@triton.jit
def _add_rms_norm(
    x_ptr, delta_ptr, row_scale_ptr, column_scale_ptr, weight_ptr, sum_ptr, out_ptr, out_scale_ptr, num_rows, size, eps,
    PARTS: tl.constexpr, SCALED: tl.constexpr, QUANTIZES: tl.constexpr, EMULATED: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    dtype = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        column_scale = tl.load(column_scale_ptr + column, mask=inside, other=0.0)
    pdl_wait(PDL, False)
    x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        delta = tl.load(delta_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            start = (part * num_rows + row) * size
            delta += tl.load(delta_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            delta = delta * tl.load(row_scale_ptr + row) * column_scale
        # Rounded as a product in the model's type would be, whatever number of parts the product came in.
        x += delta.to(dtype).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(sum_ptr + row * size + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    normed = (x * scale * weight).to(dtype)
    if QUANTIZES:
        values, out_scale = to_fp8(normed.to(tl.float32), EMULATED)
        tl.store(out_ptr + row * size + column, values, mask=inside)
        tl.store(out_scale_ptr + row, out_scale)
    else:
        tl.store(out_ptr + row * size + column, normed, mask=inside)


def add_rms_norm(
    x: Tensor, delta: Tensor | Unscaled | None, weight: Tensor, eps: float, quantizes: bool = False
) -> tuple[Tensor, Tensor | Fp8Rows]:
    """(x + delta, its RMSNorm times ``weight``). x is [T, C]; delta is [T, C] or partial sums [P, T, C], or None for
    zero. quantizes: the norm in eight bits, rounded from x's type."""
    num_rows, size = x.shape
    out = empty_rows(num_rows, size, x.device) if quantizes else torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    values, row_scale, column_scale, scaled = parts_of(x if delta is None else delta)
    parts = 0 if delta is None else values.shape[0] if values.ndim == 3 else 1
    pdl = supports_pdl(x.device)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(num_rows,)](
        x, values, row_scale, column_scale, weight, total, *(out if isinstance(out, Fp8Rows) else (out, out)),
        num_rows, size, eps,
        PARTS=parts, SCALED=scaled, QUANTIZES=quantizes, EMULATED=not x.is_cuda, BLOCK=block, PDL=pdl,
        num_warps=warps_for(block), **launch_options(pdl),
    )  # fmt: skip
    return total, out


@triton.jit
def _gated(gate, up, DTYPE: tl.constexpr):
    """silu(gate) · up in DTYPE, of float32."""
    # Rounded after SiLU as the model's own product of two tensors rounds.
    activated = (gate * tl.sigmoid(gate)).to(DTYPE).to(tl.float32)
    return (activated * up).to(DTYPE)


@triton.jit
def _silu_mul(
    gate_up_ptr, row_scale_ptr, column_scale_ptr, out_ptr, out_scale_ptr, size,
    SCALED: tl.constexpr, QUANTIZES: tl.constexpr, EMULATED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    if SCALED:
        gate_scale = tl.load(column_scale_ptr + column, mask=inside, other=0.0)
        up_scale = tl.load(column_scale_ptr + size + column, mask=inside, other=0.0)
    pdl_wait(PDL, False)
    gate = tl.load(gate_up_ptr + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        row_scale = tl.load(row_scale_ptr + row)
        gate = (gate * row_scale * gate_scale).to(DTYPE).to(tl.float32)
        up = (up * row_scale * up_scale).to(DTYPE).to(tl.float32)
    gated = _gated(gate, up, DTYPE)
    if QUANTIZES:
        values, out_scale = to_fp8(gated.to(tl.float32), EMULATED)
        tl.store(out_ptr + row * size + column, values, mask=inside)
        tl.store(out_scale_ptr + row, out_scale)
    else:
        tl.store(out_ptr + row * size + column, gated, mask=inside)


@triton.jit
def _silu_mul_tiles(
    gate_up_ptr, row_scale_ptr, column_scale_ptr, out_ptr, largest_ptr, num_rows, size,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) · up of a product without its scales, and the largest number of each row in each block of columns
    [T, blocks]. The scales of columns are read once for all rows of a tile."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pdl_wait(PDL, False)
    inside_row, inside = row < num_rows, column < size
    mask = inside_row[:, None] & inside[None]
    place = gate_up_ptr + row[:, None] * 2 * size + column[None]
    gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(place + size, mask=mask, other=0.0).to(tl.float32)
    gate_scale = tl.load(column_scale_ptr + column, mask=inside, other=0.0)[None]
    up_scale = tl.load(column_scale_ptr + size + column, mask=inside, other=0.0)[None]
    row_scale = tl.load(row_scale_ptr + row, mask=inside_row, other=0.0)[:, None]
    gate = (gate * row_scale * gate_scale).to(DTYPE).to(tl.float32)
    up = (up * row_scale * up_scale).to(DTYPE).to(tl.float32)
    gated = _gated(gate, up, DTYPE)
    tl.store(out_ptr + row[:, None] * size + column[None], gated, mask=mask)
    largest = tl.max(tl.abs(gated.to(tl.float32)), axis=1)
    tl.store(largest_ptr + row * tl.num_programs(1) + tl.program_id(1), largest, mask=inside_row)


@triton.jit
def _round_by_largest(
    x_ptr, largest_ptr, out_ptr, scale_ptr, size, num_blocks,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, EMULATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Round a block of a row, the largest number of whose blocks are given."""
    row = tl.program_id(0).to(tl.int64)
    column, block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    inside = column < size
    pdl_wait(PDL, False)
    largest = tl.load(largest_ptr + row * num_blocks + block, mask=block < num_blocks, other=0.0)
    x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
    values, scale = to_fp8_by(x, tl.max(largest, axis=0), EMULATED)
    tl.store(out_ptr + row * size + column, values, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + row, scale)


def silu_mul(gate_up: Tensor | Unscaled, quantizes: bool = False, dtype: torch.dtype | None = None) -> Tensor | Fp8Rows:
    """silu(gate) · up of [T, 2 I], gate first: [T, I], rounded to ``dtype`` (None: gate_up's). quantizes: in eight
    bits, rounded from that type."""
    values, row_scale, column_scale, scaled = parts_of(gate_up)
    num_rows, size = values.shape[0], values.shape[1] // 2
    dtype = dtype or values.dtype
    read = (values, row_scale, column_scale)
    pdl = supports_pdl(values.device)
    kind = {"DTYPE": triton_type(dtype), "PDL": pdl, **launch_options(pdl)}
    out = empty_rows(num_rows, size, values.device) if quantizes else values.new_empty(num_rows, size, dtype=dtype)
    emulated = not values.is_cuda
    if isinstance(out, Fp8Rows) and scaled and num_rows >= MANY_ROWS:
        gated = values.new_empty(num_rows, size, dtype=dtype)
        blocks = triton.cdiv(size, _TILE_BLOCK)
        largest = torch.empty(num_rows, blocks, dtype=torch.float32, device=values.device)
        _silu_mul_tiles[(triton.cdiv(num_rows, _TILE_ROWS), blocks)](
            *read, gated, largest, num_rows, size, **kind, ROWS=_TILE_ROWS, BLOCK=_TILE_BLOCK, num_warps=4
        )
        block = min(4096, triton.next_power_of_2(size))
        _round_by_largest[(num_rows, triton.cdiv(size, block))](
            gated, largest, *out, size, blocks, BLOCKS=triton.next_power_of_2(blocks), BLOCK=block,
            EMULATED=emulated, PDL=pdl, num_warps=4, **launch_options(pdl),
        )  # fmt: skip
        return out
    block = triton.next_power_of_2(size)  # a row's scale needs all of it
    block = block if quantizes else min(1024, block)
    _silu_mul[(num_rows, triton.cdiv(size, block))](
        *read, *(out if isinstance(out, Fp8Rows) else (out, out)), size, **kind, SCALED=scaled, QUANTIZES=quantizes,
        EMULATED=emulated, BLOCK=block, num_warps=warps_for(block) if quantizes else 4,
    )  # fmt: skip
    return out
