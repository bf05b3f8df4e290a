# SPDX-License-Identifier: Apache-2.0
"""Matrix products of few rows, bound by reading the weight: x [T, K] · weight [N, K]ᵀ.

Weights in FP8 (``model/inference/quantization.py``) have half as many bytes, and meet inputs in FP8 in the tensor
cores. The order of a row's sums depends neither on T nor on how rows and outputs are tiled.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from wedlm.kernels.fp8 import FP8, Fp8Rows
from wedlm.kernels.launch import launch_options, pdl_wait, processors, supports_descriptors, supports_pdl

# The library's product is faster at more rows: whole steps on an H200, in bfloat16 and FP8 (docs/log.md, 2026-11-29).
MAX_ROWS = 64
# Up to this many rows the parts of K are left to their reader, because there are too few tiles to keep a GPU busy.
APART_ROWS = 256
_PART_DEPTH = 256  # parts of K are multiples of it, whatever the tiles: the deepest tile
_OTHER_BYTES = 4096  # of shared memory, beside tiles: barriers


@dataclass(frozen=True)
class Tiling:
    """A tile has ``outputs`` weight rows, ``depth`` of K, and at most ``rows`` of x. K is split into ``splits`` parts,
    and at most ``stages`` tiles are in flight.

    ``descriptors``: tiles are copied by the tensor memory accelerator, where the device and the tensors allow it.
    """

    outputs: int = 64
    depth: int = 128
    splits: int = 1
    stages: int = 4
    warps: int = 4
    rows: int = 64
    descriptors: bool = False


def fixed_tiling(
    tiling: Tiling, num_rows: int, weight: torch.dtype = torch.bfloat16, descriptors: bool = True
) -> Tiling:
    """``tiling`` with tiles that suit any number of rows and add up K in the same order: the parts of K stay the same,
    and for FP8 so does the depth between two sums in float32.

    ``descriptors``: whether the device has them (``supports_descriptors``). They were measured on an H200 at 128, 256
    and 2,048 rows (docs/log.md, 2026-11-30).
    """
    if num_rows <= MAX_ROWS:
        return tiling
    if not descriptors or weight.itemsize > 2:
        return _without_descriptors(tiling, num_rows, weight)
    if weight == FP8:
        if tiling.depth <= 128:
            return replace(tiling, outputs=64, rows=128, stages=4, warps=4, descriptors=True)
        if num_rows <= 128:
            return _without_descriptors(tiling, num_rows, weight)
        return replace(tiling, outputs=128, rows=128, stages=3, warps=8, descriptors=True)
    if num_rows <= 128:
        return replace(tiling, outputs=64, depth=128, rows=128, stages=4, warps=4, descriptors=True)
    if num_rows <= 256:
        return replace(tiling, outputs=128, depth=128, rows=128, stages=3, warps=8, descriptors=True)
    rows, outputs = (256, 128) if tiling.splits == 1 else (128, 256)
    return replace(tiling, outputs=outputs, depth=64, rows=rows, stages=3, warps=8, descriptors=True)


def _without_descriptors(tiling: Tiling, num_rows: int, weight: torch.dtype) -> Tiling:
    if num_rows <= 128:
        return replace(tiling, rows=128, stages=3)
    if weight == FP8:  # sums are held twice, and with parts of K three times
        return replace(tiling, outputs=128, rows=128, stages=3, warps=8)
    rows = 256 if num_rows > 256 and tiling.splits == 1 else 128
    return replace(tiling, outputs=128, depth=64, rows=rows, stages=4, warps=8)


def tiling_for(size: int, depth: int, weight: torch.dtype = torch.bfloat16) -> Tiling:
    """The tiling, measured on an H200 (docs/log.md, 2026-11-23): as many parts as it takes to keep 128 processors
    reading.

    FP8 has the tiles of sixteen bits, twice as deep, so that each has as many bytes. Of the others tried on an H200 one
    was faster at 16 rows, by 7 % of one product, and slower at 64. The number of rows must not decide, because that
    would change the order of a row's sums (docs/log.md, 2026-11-29).
    """
    tiles = triton.cdiv(size, 64)
    tile_depth = 256 if weight == FP8 else 128
    if tiles >= 128:
        return Tiling(64, tile_depth, 1, stages=4 if tiles >= 1024 else 3)
    splits = 2
    while tiles * splits < 128 and splits < 8 and depth >= 256 * splits:
        splits *= 2
    return Tiling(64, tile_depth if tiles <= 64 else tile_depth // 2, splits, stages=6)


@triton.jit
def _add_tile(
    acc, weight, x, start, k, k_stop, inside_n, inside_m, first_n, first_m,
    BLOCK_K: tl.constexpr, FP8: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """acc plus the product of K's tile from ``start`` on."""
    if DESCRIPTORS:  # they read zeros beyond the tensor, and no part ends inside a tile
        w_tile = weight.load([first_n, start])
        x_tile = x.load([first_m, start]).T
    else:
        inside_k = start + k < k_stop
        w_tile = tl.load(weight + start, mask=inside_n & inside_k[None], other=0.0)
        x_tile = tl.load(x + start, mask=inside_k[:, None] & inside_m, other=0.0)
    if FP8:
        # The tensor core adds eight-bit products in about 14 bits: each tile's sum is added up in float32.
        return tl.dot(w_tile, x_tile, acc, max_num_imprecise_acc=BLOCK_K)
    return tl.dot(w_tile, x_tile, acc, input_precision="ieee")


@triton.jit
def _rows_times_weight(
    x, x_scale_ptr, weight, scale_ptr, out_ptr, num_rows, N, K, K_PER_SPLIT, blocks_m,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, GATED: tl.constexpr, FP8: tl.constexpr, DESCRIPTORS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] = Σ over the split's k of x[m, k] · weight[n, k], FP8: · x_scale[m] · scale[n]; gated:
    silu(first half) · second half. x and weight are pointers or descriptors."""
    # Blocks of rows that read the same weights run side by side.
    tile_n, tile_m = tl.program_id(0) // blocks_m, tl.program_id(0) % blocks_m
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    k_start = split * K_PER_SPLIT
    k_stop = tl.minimum(k_start + K_PER_SPLIT, K)
    # Gated: weight rows of gate and up in turn, so that one tile holds both of an output.
    weight_row = (n % 2) * (N // 2) + n // 2 if GATED else n
    inside_n = (n < N)[:, None]
    if not DESCRIPTORS:
        weight += weight_row.to(tl.int64)[:, None] * K + k[None]
    if FP8:
        scale = tl.load(scale_ptr + weight_row, mask=n < N, other=0.0)
    pdl_wait(PDL)
    if not DESCRIPTORS:
        x += m[None].to(tl.int64) * K + k[:, None]
    inside_m = (m < num_rows)[None]
    if FP8:
        x_scale = tl.load(x_scale_ptr + m, mask=m < num_rows, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if SPLITS == 1:
        for start in tl.range(k_start, k_stop, BLOCK_K, num_stages=STAGES):
            acc = _add_tile(
                acc, weight, x, start, k, k_stop, inside_n, inside_m, tile_n * BLOCK_N, tile_m * BLOCK_M,
                BLOCK_K, FP8, DESCRIPTORS,
            )  # fmt: skip
        if FP8:
            acc = acc * x_scale[None] * scale[:, None]
    else:  # all parts of K here, added up as who reads them apart does
        for part in range(SPLITS):
            own = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            stop = tl.minimum((part + 1) * K_PER_SPLIT, K)
            for start in tl.range(part * K_PER_SPLIT, stop, BLOCK_K, num_stages=STAGES):
                own = _add_tile(
                    own, weight, x, start, k, stop, inside_n, inside_m, tile_n * BLOCK_N, tile_m * BLOCK_M,
                    BLOCK_K, FP8, DESCRIPTORS,
                )  # fmt: skip
            if FP8:
                own = own * x_scale[None] * scale[:, None]
            acc += own
    dtype = out_ptr.dtype.element_ty
    if GATED:
        pairs = tl.permute(tl.reshape(acc, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1))
        gate, up = tl.split(pairs)
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        gated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
        half = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        place = out_ptr + m[None].to(tl.int64) * (N // 2) + half[:, None]
        tl.store(place, gated.to(dtype), mask=(half < N // 2)[:, None] & inside_m)
    else:
        place = out_ptr + (split * num_rows + m[None]).to(tl.int64) * N + n[:, None]
        tl.store(place, acc.to(dtype), mask=inside_n & inside_m)


def few_rows_product(
    x: Tensor | Fp8Rows,
    weight: Tensor,
    tiling: Tiling,
    gated: bool = False,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    whole: bool = False,
) -> Tensor:
    """Multiply x [T, K] by weight [N, K]: [T, N] in ``dtype`` (None: x's); with splits, float32 partial sums [P, T, N]
    that are not yet added.

    gated: silu of the first N / 2 outputs times the others, [T, N / 2]; it takes neither splits nor descriptors. x in
    FP8 needs a weight in FP8, each row of which is multiplied by ``scale`` [N] (float32), and a ``dtype``. whole: add
    the parts of K here, in the order in which their reader would: [T, N] in ``dtype``.
    """
    x, x_scale = x if isinstance(x, Fp8Rows) else (x, None)
    dtype = dtype or x.dtype
    num_rows, depth = x.shape
    size = len(weight)
    assert not (gated and (tiling.splits > 1 or tiling.descriptors))
    pdl = supports_pdl(x.device)
    if tiling.splits > 1 and not whole:
        out = torch.empty(tiling.splits, num_rows, size, dtype=torch.float32, device=x.device)
    else:
        out = x.new_empty(num_rows, size // 2 if gated else size, dtype=dtype)
    block_m = min(max(16, triton.next_power_of_2(num_rows)), tiling.rows)
    blocks_m = triton.cdiv(num_rows, block_m)
    per_split = triton.cdiv(triton.cdiv(depth, tiling.splits), _PART_DEPTH) * _PART_DEPTH
    inner, outer = (tiling.splits, 1) if whole else (1, tiling.splits)
    descriptors = tiling.descriptors and all(_describable(tensor) for tensor in (x, weight))
    sources = (x, weight)
    if descriptors:
        sources = (
            TensorDescriptor.from_tensor(x, [block_m, tiling.depth]),
            TensorDescriptor.from_tensor(weight, [tiling.outputs, tiling.depth]),
        )
    tile_bytes = (block_m + tiling.outputs) * tiling.depth * x.itemsize
    stages = max(1, min(tiling.stages, (processors(x.device).shared_bytes - _OTHER_BYTES) // tile_bytes))
    # Fused into the sum, a scale's product would not be rounded as that of a part that is written.
    exact = {"enable_fp_fusion": False} if inner > 1 and x_scale is not None and x.is_cuda else {}
    _rows_times_weight[(triton.cdiv(size, tiling.outputs) * blocks_m, outer)](
        sources[0], x if x_scale is None else x_scale, sources[1], weight if scale is None else scale, out,
        num_rows, size, depth, per_split, blocks_m,
        BLOCK_M=block_m, BLOCK_N=tiling.outputs, BLOCK_K=tiling.depth,
        STAGES=stages,
        SPLITS=inner, GATED=gated, FP8=x_scale is not None, DESCRIPTORS=descriptors, PDL=pdl,
        num_warps=tiling.warps, **launch_options(pdl), **exact,
    )  # fmt: skip
    return out


def _describable(tensor: Tensor) -> bool:
    """Whether tiles of a tensor [R, K] can be copied by a descriptor: rows begin at multiples of 16 bytes."""
    aligned = tensor.data_ptr() % 16 == 0 and tensor.shape[1] * tensor.itemsize % 16 == 0
    return aligned and supports_descriptors(tensor.device)
