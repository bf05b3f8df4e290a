# SPDX-License-Identifier: Apache-2.0
"""Attention over some keys and attention over others, joined to attention over both."""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_HEADS_A_PROGRAM = 8


@triton.jit
def _join(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, into_ptr,
    out_row, out_head, lse_row, lse_head, part_row, part_head, part_lse_row, part_lse_head, into_row, into_head,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside, d = head < HEADS, tl.arange(0, D)
    lse_at = lse_ptr + row * lse_row + head * lse_head
    old = tl.load(lse_at, mask=inside, other=0.0)
    new = tl.load(part_lse_ptr + row * part_lse_row + head * part_lse_head, mask=inside, other=0.0)
    highest = tl.maximum(old, new)
    old, new = tl.exp(old - highest), tl.exp(new - highest)
    total = old + new
    inside_d = inside[:, None]
    out_at = out_ptr + row * out_row + head[:, None] * out_head + d[None]
    part_at = part_ptr + row * part_row + head[:, None] * part_head + d[None]
    out = tl.load(out_at, mask=inside_d, other=0.0).to(tl.float32)
    part = tl.load(part_at, mask=inside_d, other=0.0).to(tl.float32)
    joined = out * (old / total)[:, None] + part * (new / total)[:, None]
    into_at = into_ptr + row * into_row + head[:, None] * into_head + d[None]
    tl.store(into_at, joined.to(into_ptr.dtype.element_ty), mask=inside_d)
    tl.store(lse_at, highest + tl.log(total), mask=inside)


def join(
    out: Float[Tensor, "T H D"],
    lse: Float[Tensor, "H T"],
    part: Float[Tensor, "T H D"],
    part_lse: Float[Tensor, "H T"],
    into: Float[Tensor, "T H D"],
) -> None:
    """``out``, with the logarithms of its softmax's sums ``lse``, and ``part``, of other keys: joined in ``into``,
    which may be ``out``. ``lse`` becomes that of both. Logarithms are natural and float32; heads are dense."""
    rows, heads, head_dim = out.shape
    block = min(_HEADS_A_PROGRAM, triton.next_power_of_2(heads))
    _join[(rows, triton.cdiv(heads, block))](
        out, lse, part, part_lse, into,
        *out.stride()[:2], *reversed(lse.stride()), *part.stride()[:2], *reversed(part_lse.stride()),
        *into.stride()[:2], HEADS=heads, D=head_dim, BLOCK_H=block, num_warps=4,
    )  # fmt: skip
