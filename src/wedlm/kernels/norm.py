# SPDX-License-Identifier: Apache-2.0
"""Small work between the matrix products: residual and RMSNorm in one pass, gated SiLU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wedlm.kernels.launch import launch_options, pdl_wait, supports_pdl


@triton.jit
def _add_rms_norm(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, num_rows, size, eps,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 0:
        delta = tl.load(delta_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            start = (part * num_rows + row) * size
            delta += tl.load(delta_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        # Rounded as a product in the model's type would be, whatever number of parts the product came in.
        x += delta.to(out_ptr.dtype.element_ty).to(tl.float32)
        rounded = x.to(out_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * size + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    tl.store(out_ptr + row * size + column, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMSNorm times ``weight``), x [T, C]; delta [T, C] or partial sums [P, T, C], or None: zero."""
    num_rows, size = x.shape
    out = torch.empty_like(x)
    total = x if delta is None else torch.empty_like(x)
    parts = 0 if delta is None else delta.shape[0] if delta.ndim == 3 else 1
    pdl = supports_pdl(x.device)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(num_rows,)](
        x, x if delta is None else delta, weight, total, out, num_rows, size, eps,
        PARTS=parts, BLOCK=block, PDL=pdl,
        num_warps=min(16, max(1, block // 256)), **launch_options(pdl),
    )  # fmt: skip
    return total, out


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    pdl_wait(PDL)
    gate = tl.load(gate_up_ptr + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded after SiLU as the model's own product of two tensors rounds.
    activated = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * size + column, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [T, 2 I], gate first: [T, I]."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, size)
    pdl = supports_pdl(gate_up.device)
    block = min(1024, triton.next_power_of_2(size))
    _silu_mul[(num_rows, triton.cdiv(size, block))](
        gate_up, out, size, BLOCK=block, PDL=pdl, num_warps=4, **launch_options(pdl)
    )
    return out
