# SPDX-License-Identifier: Apache-2.0
"""The second half of a LoRA for masked rows: out[t] += B h[t] where row t is masked, h = A x."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wedlm.kernels.launch import launch_options, pdl_wait, supports_pdl

_OUTPUTS = 64  # of a tile
_MOST_ROWS, _MOST_DEPTH = 64, 64


@dataclass(frozen=True)
class Blocks:
    """The matrices B of several layers, whose outputs lie side by side and whose inputs do, too.

    ``b`` [N, r]: one below the other, each in its leading columns. ``tiles`` [P, 4] (int32): the outputs from tile to
    tile, as first output, the end of the layer's outputs, first column of h, number of columns.
    """

    b: Tensor
    tiles: Tensor

    @staticmethod
    def of(matrices: Sequence[Tensor]) -> "Blocks":
        """The matrices B [O, r] of the layers in their order; a layer without one gives one of rank 0. A single one is
        not copied."""
        outputs, depth = sum(len(one) for one in matrices), max(one.shape[1] for one in matrices)
        b = matrices[0] if len(matrices) == 1 else matrices[0].new_zeros(outputs, depth)
        tiles, first, column = [], 0, 0
        for one in matrices:
            size, rank = one.shape
            if len(matrices) > 1:
                b[first : first + size, :rank] = one
            if rank:
                starts = range(first, first + size, _OUTPUTS)
                tiles += [(start, first + size, column, rank) for start in starts]
            first, column = first + size, column + rank
        return Blocks(b, torch.tensor(tiles, dtype=torch.int32, device=b.device))


@triton.jit
def _add_low_rank(
    hidden_ptr, b_ptr, tiles_ptr, masked_ptr, out_ptr, num_rows, N, R, DEPTH,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tiles_ptr + 4 * tl.program_id(0)
    n = tl.load(tile) + tl.arange(0, BLOCK_N)
    inside_n = n < tl.load(tile + 1)
    first, rank = tl.load(tile + 2), tl.load(tile + 3)
    m, k = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    inside_m = m < num_rows
    pdl_wait(PDL)
    masked = tl.load(masked_ptr + m, mask=inside_m, other=0) != 0
    if tl.max(masked.to(tl.int32), 0) > 0:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # One tile at a time: with eight parts of h in flight, three would not fit into shared memory.
        for start in tl.range(0, rank, BLOCK_K, num_stages=1):
            inside_k = start + k < rank
            weight = tl.load(
                b_ptr + n.to(tl.int64)[:, None] * DEPTH + (start + k)[None],
                mask=inside_n[:, None] & inside_k[None],
                other=0.0,
            )
            hidden = tl.zeros((BLOCK_K, BLOCK_M), hidden_ptr.dtype.element_ty)
            for part in tl.static_range(PARTS):
                hidden += tl.load(
                    hidden_ptr + (part * num_rows + m.to(tl.int64))[None] * R + (first + start + k)[:, None],
                    mask=inside_k[:, None] & masked[None],
                    other=0.0,
                )
            acc = tl.dot(weight, hidden.to(weight.dtype), acc, input_precision="ieee")
        place = out_ptr + m.to(tl.int64)[None] * N + n[:, None]
        inside = inside_n[:, None] & masked[None]
        before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, (before + acc).to(out_ptr.dtype.element_ty), mask=inside)


def add_low_rank(out: Tensor, hidden: Tensor, blocks: Blocks, masked: Tensor) -> None:
    """Add B h to masked rows of ``out`` [T, N], in place; no bit of another row changes.

    hidden: h [T, R], or partial sums [P, T, R]. masked: bool [T].
    """
    assert out.is_contiguous()
    num_rows, size = out.shape
    parts = 1 if hidden.ndim == 2 else len(hidden)
    depth = blocks.b.shape[1]
    block_m = min(max(16, triton.next_power_of_2(num_rows)), _MOST_ROWS)
    pdl = supports_pdl(out.device)
    _add_low_rank[(len(blocks.tiles), triton.cdiv(num_rows, block_m))](
        hidden, blocks.b, blocks.tiles, masked, out, num_rows, size, hidden.shape[-1], depth,
        PARTS=parts, BLOCK_M=block_m, BLOCK_N=_OUTPUTS,
        BLOCK_K=min(max(16, triton.next_power_of_2(depth)), _MOST_DEPTH), PDL=pdl,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip
