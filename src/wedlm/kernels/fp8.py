# SPDX-License-Identifier: Apache-2.0
"""Eight-bit floats (e4m3): rows of inputs with a scale each, and products whose scales the next kernel applies.

The twin of the rounding is ``quantize`` in ``model/inference/quantization.py``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wedlm.kernels.launch import launch_options, pdl_wait, supports_pdl

FP8 = torch.float8_e4m3fn
_LARGEST = tl.constexpr(448.0)
_SMALLEST_SCALED = tl.constexpr(1e-30)  # rows of less are as zeros: 448 over it is still a float32


class Fp8Rows(NamedTuple):
    """Rows [T, C]: row t of ``values`` (e4m3) is to be multiplied by ``scale[t]`` (float32)."""

    values: Tensor
    scale: Tensor


class Unscaled(NamedTuple):
    """A product [T, N] whose element (t, n) is ``values[t, n]`` times ``row[t]`` times ``column[n]`` (float32)."""

    values: Tensor
    row: Tensor
    column: Tensor


def parts_of(product: Tensor | Unscaled) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(values, row scales, column scales, whether there are scales): arguments of a kernel that reads a product."""
    if isinstance(product, Unscaled):
        return product.values, product.row, product.column, True
    return product, product, product, False


def empty_rows(num_rows: int, size: int, device: torch.device) -> Fp8Rows:
    """Memory for quantised rows [T, C]."""
    scale = torch.empty(num_rows, dtype=torch.float32, device=device)
    return Fp8Rows(torch.empty(num_rows, size, dtype=FP8, device=device), scale)


@triton.jit
def _rounded(x, EMULATED: tl.constexpr):
    """x in e4m3. ``EMULATED``: round here and leave nothing for the conversion to round, because Triton's interpreter
    loses the carry into the exponent."""
    if EMULATED:
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power, 0.015625) * 1572864.0  # 1.5 · 2^20: leaves three bits after the first
        x = (x + shift) - shift
    return x.to(tl.float8e4nv)


@triton.jit
def to_fp8(x, EMULATED: tl.constexpr):
    """(values, scale) of one row x in float32, which is zero outside the row."""
    return to_fp8_by(x, tl.max(tl.abs(x), axis=0), EMULATED)


@triton.jit
def to_fp8_by(x, largest, EMULATED: tl.constexpr):
    """(values, scale) of a part of a row in float32, whose largest number is given."""
    largest = tl.maximum(largest, _SMALLEST_SCALED)
    return _rounded(x * tl.math.div_rn(_LARGEST, largest), EMULATED), tl.math.div_rn(largest, _LARGEST)


@triton.jit
def heads_to_fp8(x, EMULATED: tl.constexpr):
    """(values, scales [H, 1]) of heads x [H, D] in float32."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), _SMALLEST_SCALED)[:, None]
    top = tl.full(largest.shape, _LARGEST, tl.float32)
    return _rounded(x * tl.math.div_rn(top, largest), EMULATED), tl.math.div_rn(largest, top)


@triton.jit
def _quantize_rows(x_ptr, out_ptr, scale_ptr, size, BLOCK: tl.constexpr, EMULATED: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    pdl_wait(PDL)
    values, scale = to_fp8(tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32), EMULATED)
    tl.store(out_ptr + row * size + column, values, mask=inside)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Round x [T, C], each row by its own largest number."""
    num_rows, size = x.shape
    out = empty_rows(num_rows, size, x.device)
    pdl = supports_pdl(x.device)
    block = triton.next_power_of_2(size)
    _quantize_rows[(num_rows,)](
        x, *out, size, BLOCK=block, EMULATED=not x.is_cuda, PDL=pdl,
        num_warps=warps_for(block), **launch_options(pdl),
    )  # fmt: skip
    return out


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name for a type that activations may have."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def warps_for(block: int) -> int:
    """The warps of a program that holds a row of ``block`` numbers."""
    return min(16, max(1, block // 256))


@triton.jit
def _multiply_scales(
    product_ptr, row_ptr, column_ptr, bias_ptr, out_ptr, size,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(column_ptr + column, mask=inside, other=0.0)
    pdl_wait(PDL)
    x = tl.load(product_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.load(row_ptr + row) * scale
    if BIAS:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + column, x.to(out_ptr.dtype.element_ty), mask=inside)


def multiply_scales(product: Unscaled, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product [T, N] with its scales applied, plus ``bias`` [N], for readers that cannot apply them."""
    num_rows, size = product.values.shape
    out = product.values.new_empty(num_rows, size, dtype=dtype)
    pdl = supports_pdl(out.device)
    block = min(1024, triton.next_power_of_2(size))
    _multiply_scales[(num_rows, triton.cdiv(size, block))](
        *product, product.column if bias is None else bias, out, size,
        BIAS=bias is not None, BLOCK=block, PDL=pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return out
