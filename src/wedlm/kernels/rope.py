# SPDX-License-Identifier: Apache-2.0
"""Per-head norm, RoPE and the write into the cache, in one kernel after the q, k, v product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wedlm.kernels.fp8 import Unscaled, heads_to_fp8, parts_of
from wedlm.kernels.launch import launch_options, pdl_wait, supports_pdl


@triton.jit
def _norm_rope_write(
    qkv_ptr, row_scale_ptr, column_scale_ptr, cos_ptr, sin_ptr, slots_ptr, q_weight_ptr, k_weight_ptr,
    q_out_ptr, keys_ptr, values_ptr, key_scale_ptr, value_scale_ptr,
    num_rows, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr,
    NORM: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, FP8: tl.constexpr, EMULATED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, D)
    partner = (d + D // 2) % D
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * D
    inside = (head < HEADS + 2 * KV_HEADS)[:, None]
    is_q, is_v = (head < HEADS)[:, None], (head >= HEADS + KV_HEADS)[:, None]
    dtype = q_out_ptr.dtype.element_ty
    # Angles and slots were complete before the first layer began.
    cos = tl.load(cos_ptr + row * D + d)[None].to(tl.float32)
    sin = tl.load(sin_ptr + row * D + d)[None].to(tl.float32)
    slot = tl.load(slots_ptr + row)
    if NORM:
        weight_d = tl.where(is_q, tl.load(q_weight_ptr + d)[None], tl.load(k_weight_ptr + d)[None]).to(tl.float32)
        weight_p = tl.where(
            is_q, tl.load(q_weight_ptr + partner)[None], tl.load(k_weight_ptr + partner)[None]
        ).to(tl.float32)  # fmt: skip
    if SCALED:
        columns = column_scale_ptr + head[:, None] * D
        scale_d = tl.load(columns + d[None], mask=inside, other=0.0)
        scale_p = tl.load(columns + partner[None], mask=inside, other=0.0)
    pdl_wait(PDL)
    x = tl.zeros((BLOCK_H, D), tl.float32)
    y = tl.zeros((BLOCK_H, D), tl.float32)  # the same heads with the halves exchanged
    for part in tl.static_range(PARTS):
        base = qkv_ptr + (part * num_rows + row) * width + head[:, None] * D
        x += tl.load(base + d[None], mask=inside, other=0.0).to(tl.float32)
        y += tl.load(base + partner[None], mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        row_scale = tl.load(row_scale_ptr + row)
        x, y = x * row_scale * scale_d, y * row_scale * scale_p
    x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
    raw = x
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        x = (x * scale * weight_d).to(dtype).to(tl.float32)
        y = (y * scale * weight_p).to(dtype).to(tl.float32)
    turned = (x * cos + y * sin).to(dtype)
    tl.store(q_out_ptr + row * HEADS * D + head[:, None] * D + d[None], turned, mask=inside & is_q)
    place = slot * KV_HEADS * D + (head - HEADS)[:, None] * D + d[None]
    if FP8:
        cached, own_scale = heads_to_fp8(tl.where(is_v, raw, turned.to(tl.float32)), EMULATED)
        own = slot * KV_HEADS + (head - HEADS)[:, None]
        tl.store(key_scale_ptr + own, own_scale, mask=inside & ~is_q & ~is_v)
        tl.store(value_scale_ptr + own - KV_HEADS, own_scale, mask=inside & is_v)
        tl.store(keys_ptr + place, cached, mask=inside & ~is_q & ~is_v)
        tl.store(values_ptr + place - KV_HEADS * D, cached, mask=inside & is_v)
    else:
        tl.store(keys_ptr + place, turned, mask=inside & ~is_q & ~is_v)
        tl.store(values_ptr + place - KV_HEADS * D, raw.to(dtype), mask=inside & is_v)


def norm_rope_write(
    qkv: Tensor | Unscaled,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    norms: tuple[Tensor, Tensor, float] | None,
    keys: Tensor,
    values: Tensor,
    fixed: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Queries [T, H, D] after norm and RoPE; keys and values of the rows are written to ``slots`` [T] of the layer's
    cache.

    qkv is [T, (H + 2 K) D] or partial sums of it [P, T, …], or a product without its scales. cos and sin [T, D] are as
    ``RotaryEmbedding`` gives them. norms: weights of the query and key norm and epsilon. keys and values: [A, K, D],
    written in place. fixed: use one tiling for any number of rows. scales: of keys and values in FP8, [A, K] each,
    written in place.
    """
    product, row_scale, column_scale, scaled = parts_of(qkv)
    parts = product.shape[0] if product.ndim == 3 else 1
    num_rows, width = product.shape[-2:]
    kv_heads, head_dim = keys.shape[1:]
    heads = width // head_dim - 2 * kv_heads
    out = torch.empty(num_rows, heads, head_dim, dtype=cos.dtype, device=product.device)
    pdl = supports_pdl(product.device)
    block = 8 if fixed or num_rows <= 256 else 16
    q_weight, k_weight, eps = norms if norms is not None else (cos, cos, 0.0)
    _norm_rope_write[(num_rows, triton.cdiv(heads + 2 * kv_heads, block))](
        product, row_scale, column_scale, cos, sin, slots, q_weight, k_weight, out, keys, values,
        *(scales or (cos, cos)), num_rows, eps,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, BLOCK_H=block, NORM=norms is not None, PARTS=parts,
        SCALED=scaled, FP8=scales is not None, EMULATED=not product.is_cuda, PDL=pdl,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return out
