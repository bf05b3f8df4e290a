# SPDX-License-Identifier: Apache-2.0
"""The beginning of a forward: embeddings of the rows' tokens, cos and sin of their positions."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _embed(
    tokens_ptr, positions_ptr, weight_ptr, inv_freq_ptr, x_ptr, cos_ptr, sin_ptr, size, factor,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    token = tl.load(tokens_ptr + row)
    tl.store(x_ptr + row * size + column, tl.load(weight_ptr + token * size + column, mask=inside), mask=inside)
    if part == 0:
        d = tl.arange(0, HALF)
        angle = tl.load(positions_ptr + row).to(tl.float32) * tl.load(inv_freq_ptr + d)
        dtype = cos_ptr.dtype.element_ty
        cos, sin = (tl.cos(angle) * factor).to(dtype), (tl.sin(angle) * factor).to(dtype)
        place = row * 2 * HALF + d
        tl.store(cos_ptr + place, cos)
        tl.store(cos_ptr + place + HALF, cos)
        tl.store(sin_ptr + place, -sin)
        tl.store(sin_ptr + place + HALF, sin)


def embed(
    tokens: Tensor, positions: Tensor, weight: Tensor, inv_freq: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x [T, C], cos [T, D], sin [T, D]) in the weight's type; cos and sin as ``RotaryEmbedding`` gives them."""
    num_rows, size, half = len(tokens), weight.shape[1], len(inv_freq)
    x = weight.new_empty(num_rows, size)
    cos, sin = weight.new_empty(num_rows, 2 * half), weight.new_empty(num_rows, 2 * half)
    block = min(1024, triton.next_power_of_2(size))
    _embed[(num_rows, triton.cdiv(size, block))](
        tokens, positions, weight, inv_freq, x, cos, sin, size, factor, HALF=half, BLOCK=block, num_warps=4
    )
    return x, cos, sin
