# SPDX-License-Identifier: Apache-2.0
"""Round matrices to GGUF's block formats. The K-quants are ours, the others the gguf package's.

A super-block of a K-quant is 256 weights of a row. Its parts of 32 (Q6_K: 16) have a scale each, and in Q4_K and Q5_K
also a minimum, which are themselves in few bits. Scales are found by search: several candidates, each refined by least
squares.
"""

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

SUPER = 256
_CHUNK_ELEMENTS = 2**22
_TINY, _LARGEST_HALF = 1e-30, 65504.0
# Candidates of a scale: the range is divided into this many more levels than there are.
_AFFINE_STEPS = tuple(step / 10 for step in range(-10, 13, 2))
_SYMMETRIC_STEPS = tuple(step / 10 for step in range(-10, 11, 2))


def to_blocks(weight: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """``weight`` [O, C] as rows of blocks, uint8 [O, bytes of a row]. C must be a multiple of the block's size."""
    elements, size = GGML_QUANT_SIZES[kind]
    if weight.shape[1] % elements:
        raise ValueError(f"a row has {weight.shape[1]} weights; expected a multiple of {elements} for {kind.name}")
    out = np.empty((len(weight), weight.shape[1] // elements * size), dtype=np.uint8)
    step = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].detach().float()
        blocks = _K_QUANTS[kind](rows.reshape(-1, SUPER)).numpy() if kind in _K_QUANTS else _others(rows, kind)
        out[start : start + step] = blocks.reshape(len(rows), -1)
    return out


def _others(rows: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    if kind == GGMLQuantizationType.BF16:  # the package rounds a nan to infinity
        return rows.bfloat16().view(torch.uint8).numpy()
    return quantize(np.ascontiguousarray(rows.numpy()), kind).view(np.uint8)


def _half(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x in float16, its bytes [N, 2]), rounded away from zero. The largest part uses as much of it as it can and would
    otherwise lose its largest weights, above all where float16 is subnormal and coarse."""
    half = x.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
    bits = half.view(torch.int16) + (half.float().abs() < x.abs().clamp(max=_LARGEST_HALF)).to(torch.int16)
    half = bits.view(torch.float16)
    return half, half[:, None].view(torch.uint8)


def _fit_affine(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(scale, minimum) [...], both at least 0, so that x [..., n] is nearly scale · q - minimum, q in 0..``most``."""
    low = x.amin(dim=-1, keepdim=True).clamp(max=0)
    span = (x.amax(dim=-1, keepdim=True) - low).clamp(min=_TINY)
    n, sum_x = x.shape[-1], x.sum(dim=-1)
    best = torch.full_like(sum_x, torch.inf)
    scale, minimum = span[..., 0] / most, -low[..., 0]
    for step in _AFFINE_STEPS:
        q = ((x - low) * ((most + step) / span)).round_().clamp_(0, most)
        sum_q, sum_qq, sum_qx = q.sum(dim=-1), q.square().sum(dim=-1), (q * x).sum(dim=-1)
        spread = n * sum_qq - sum_q.square()  # a whole number, 0 where all codes are equal
        slope = torch.where(spread > 0, n * sum_qx - sum_q * sum_x, torch.zeros_like(spread)) / spread.clamp(min=1)
        offset = (slope * sum_q - sum_x) / n
        through_zero = offset < 0
        slope = torch.where(through_zero, sum_qx / sum_qq.clamp(min=_TINY), slope).clamp(min=0)
        offset = torch.where(through_zero, torch.zeros_like(offset), offset)
        error = (slope[..., None] * q - offset[..., None] - x).square().sum(dim=-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, slope, scale), torch.where(better, offset, minimum)
    return scale, minimum


def _affine_codes(x: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(bytes of d, bytes of dmin, the 12 bytes of scales and minima, codes [N, 8, 32]) of super-blocks x [N, 256]."""
    parts = x.unflatten(1, (8, 32))
    scale, minimum = _fit_affine(parts, most)
    d, d_bytes = _half(scale.amax(dim=1) / 63)
    dmin, dmin_bytes = _half(minimum.amax(dim=1) / 63)
    d, dmin = d.float()[:, None], dmin.float()[:, None]
    s = (scale / d.clamp(min=_TINY)).round().clamp(0, 63)
    m = (minimum / dmin.clamp(min=_TINY)).round().clamp(0, 63)
    step = (d * s)[..., None]
    codes = ((parts + (dmin * m)[..., None]) / step.clamp(min=_TINY)).round().clamp(0, most)
    codes = torch.where(step > 0, codes, torch.zeros_like(codes)).to(torch.uint8)
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    packed = torch.cat(
        [s[:, :4] | (s[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4],
        dim=1,
    )
    return d_bytes, dmin_bytes, packed, codes


def _nibbles(codes: Tensor) -> Tensor:
    """[N, 128]: parts 2 i and 2 i + 1 share bytes, the first in the low four bits."""
    low = codes & 15
    return (low[:, 0::2] | low[:, 1::2] << 4).flatten(1)


def _q4_k(x: Tensor) -> Tensor:
    d, dmin, scales, codes = _affine_codes(x, 15)
    return torch.cat([d, dmin, scales, _nibbles(codes)], dim=1)


def _q5_k(x: Tensor) -> Tensor:
    d, dmin, scales, codes = _affine_codes(x, 31)
    fifth = torch.zeros(len(x), 32, dtype=torch.uint8)
    for part in range(8):
        fifth |= (codes[:, part] >> 4) << part
    return torch.cat([d, dmin, scales, fifth, _nibbles(codes)], dim=1)


def _fit_symmetric(x: Tensor, least: int) -> Tensor:
    """Scale [...] so that x [..., n] is nearly scale · q, q in ``least``..-``least`` - 1; of either sign."""
    at = x.abs().argmax(dim=-1, keepdim=True)
    peak = x.gather(-1, at)
    peak = torch.where(peak.abs() < _TINY, torch.full_like(peak, _TINY), peak)
    best = torch.full_like(peak[..., 0], -1.0)
    scale = torch.zeros_like(best)
    for step in _SYMMETRIC_STEPS:
        q = (x * ((least + step) / peak)).round_().clamp_(least, -least - 1)
        sum_qq, sum_qx = q.square().sum(dim=-1), (q * x).sum(dim=-1)
        gain = sum_qx.square() / sum_qq.clamp(min=_TINY)  # what the error is less by
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, sum_qx / sum_qq.clamp(min=_TINY), scale)
    return scale


def _q6_k(x: Tensor) -> Tensor:
    parts = x.unflatten(1, (16, 16))
    scale = _fit_symmetric(parts, -32)
    at = scale.abs().argmax(dim=1, keepdim=True)
    d, d_bytes = _half(scale.gather(1, at)[:, 0] / -128)  # the largest takes -128, the one more that a byte has
    s = (scale / torch.where(d == 0, torch.ones_like(d), d).float()[:, None]).round().clamp(-128, 127)
    step = (d.float()[:, None] * s)[..., None]
    codes = (parts / torch.where(step == 0, torch.ones_like(step), step)).round().clamp(-32, 31) + 32
    codes = codes.to(torch.uint8).reshape(-1, 2, 4, 32)  # halves of 128, quarters of those
    low, high = codes & 15, codes >> 4
    ql = (low[:, :, :2] | low[:, :, 2:] << 4).flatten(1)
    qh = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).flatten(1)
    return torch.cat([ql, qh, s.to(torch.int8).view(torch.uint8), d_bytes], dim=1)


_K_QUANTS: dict[GGMLQuantizationType, Callable[[Tensor], Tensor]] = {
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
