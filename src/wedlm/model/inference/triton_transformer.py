# SPDX-License-Identifier: Apache-2.0
"""The packed model on fused kernels, for GPUs: the same rows in and logits out as ``Transformer``, its slow twin.

Shape suffixes as in ``transformer.py``; F = (H + 2 K) D, the width of the packed q, k, v product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wedlm.attention.base import FusedAttend, Norms
from wedlm.kernels.embed import embed
from wedlm.kernels.fp8 import Fp8Rows, Unscaled, multiply_scales, quantize_rows
from wedlm.kernels.launch import supports_descriptors
from wedlm.kernels.low_rank import Blocks, add_low_rank
from wedlm.kernels.matmul import APART_ROWS, MAX_ROWS, Tiling, few_rows_product, fixed_tiling, tiling_for
from wedlm.kernels.norm import add_rms_norm, silu_mul
from wedlm.model.inference.layers import is_packed
from wedlm.model.inference.quantization import Fp8Linear
from wedlm.model.inference.tensor_parallel import ShardedEmbedding
from wedlm.model.layers import DecoderLayer
from wedlm.model.lora.masked_rows import (
    BlockDiagonal,
    MaskedLora,
    ZeroLora,
    base_layer,
    put_at_masked,
    without_adapters,
)
from wedlm.model.lora.row_factors import AdaptedLinear
from wedlm.model.transformer import Transformer


class FusedTransformer:
    """Runs a packed ``Transformer``. ``tiling(N, K, type of the weight)`` chooses the tiling for few rows; None takes
    the library's product.

    By default weights of 16 or 8 bits go through our kernel, which is as fast or faster at few rows, and whose sums do
    not depend on the number of rows. In FP8 the kernel before a product rounds its input, row by row, and the kernel
    after it applies the scales if the library made the product; our own kernel applies them itself.

    ``deterministic`` (16 bits and FP8): no bit of a row's result depends on the number of rows, because all products of
    any number of rows are ours and add up in one order. ``attend`` has to do the same.
    """

    def __init__(
        self,
        model: Transformer,
        tiling: Callable[[int, int, torch.dtype], Tiling | None] | None = None,
        deterministic: bool = False,
    ) -> None:
        assert is_packed(model), "expected a model after pack_for_inference"
        self.model, self.deterministic = model, deterministic
        embedding = model.model.embed_tokens
        self.sharded = embedding if isinstance(embedding, ShardedEmbedding) else None  # where ranks share the model
        self.low_rank = {layer: _blocks(layer) for layer in model.modules() if isinstance(layer, MaskedLora)}
        self.has_masked_lora = bool(self.low_rank)
        self.dtype = model.model.embed_tokens.weight.dtype
        half = self.dtype.itemsize == 2
        self.tiling = tiling or (tiling_for if half else lambda *_: None)
        self.layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
        config = model.config
        self.eps = config.rms_norm_eps
        self.norms: list[Norms | None] = []
        for layer in self.layers:
            attention = layer.self_attn
            has_norms = attention.q_norm is not None and attention.k_norm is not None
            self.norms.append(
                (attention.q_norm.weight, attention.k_norm.weight, self.eps)  # type: ignore[union-attr]
                if has_norms
                else None
            )

    @property
    def factors_version(self) -> int:
        """Changes when the memory of adapters by name does, which captured steps use."""
        return 0 if self.model.adapters is None else self.model.adapters.version

    @torch.inference_mode()
    def __call__(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: FusedAttend,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
        adapters_T: Tensor | None = None,
    ) -> Tensor:
        """Logits [L, V] of the rows picked by ``logits_rows`` (None: all). ``masked`` and ``adapters_T`` as in
        ``Transformer``."""
        x_TC, cos_TD, sin_TD = self._embedded(tokens_T, positions_T)
        others = None
        if adapters_T is not None:
            assert self.model.adapters is not None, "rows have adapters, and none was loaded"
            rows = self.model.adapters.rows(adapters_T, masked)
            x_TC, masked, others = rows.embed(x_TC), rows.masked, rows.others
        x_TC, masked = self._masked(x_TC, masked)
        beside = _Beside(masked, others)
        delta: Tensor | Unscaled | None = None
        for index, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            assert attention.qkv_proj is not None
            assert mlp.gate_up_proj is not None
            x_TC, normed = self._normed(x_TC, delta, layer.input_layernorm, attention.qkv_proj, beside)
            qkv = self._product(normed, attention.qkv_proj, beside)
            out_THD = attend(index, qkv, cos_TD, sin_TD, self.norms[index])
            delta = self._summed(self._product(out_THD.flatten(1), attention.o_proj, beside))
            x_TC, normed = self._normed(x_TC, delta, layer.post_attention_layernorm, mlp.gate_up_proj, beside)
            gated = self._gated(normed, mlp.gate_up_proj, beside, _takes_fp8(mlp.down_proj, beside))
            delta = self._summed(self._product(gated, mlp.down_proj, beside))
        if logits_rows is not None:
            if len(logits_rows) == 0:
                return x_TC.new_empty(0, self.model.config.vocab_size)
            x_TC = x_TC[logits_rows]
            if isinstance(delta, Unscaled):
                delta = Unscaled(delta.values[logits_rows], delta.row[logits_rows], delta.column)
            elif delta is not None:
                delta = delta[..., logits_rows, :]
        _, normed = self._normed(x_TC, delta, self.model.model.norm, self.model.lm_head, _NOTHING)
        return self._finished(self._product(normed, self.model.lm_head, _NOTHING, splits=False))

    def _embedded(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [T, C], and RoPE's cosines and sines."""
        rotary, elsewhere = self.model.model.rotary, None
        if self.sharded is not None:
            tokens, elsewhere = self.sharded.local(tokens)
        weight = _weight(self.model.model.embed_tokens)
        x, cos, sin = embed(tokens, positions, weight, rotary.inv_freq, rotary.attention_factor)
        if self.sharded is not None and elsewhere is not None:
            x = self.sharded.ranks.sum(x.masked_fill_(elsewhere, 0.0))
        return x, cos, sin

    def _summed(self, product: Tensor | Unscaled) -> Tensor | Unscaled:
        """A row shard's product summed over all ranks, perhaps in parts [N, T, C]; with one rank the product itself."""
        if self.sharded is None:
            return product
        return self.sharded.ranks.parts(self._finished(product), self.dtype)

    def _normed(
        self, x: Tensor, delta: Tensor | Unscaled | None, norm: nn.Module, reader: nn.Module, beside: "_Beside"
    ) -> tuple[Tensor, Tensor | Fp8Rows]:
        """(x + delta, its norm in the form that ``reader`` takes)."""
        return add_rms_norm(x, delta, _weight(norm), self.eps, _takes_fp8(reader, beside))

    def _masked(self, x: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x with the masked rows' own embedding, and a flag for each row; None if no row meets a LoRA."""
        if masked is None or not self.has_masked_lora:
            return x, None
        if masked.dtype != torch.bool:
            masked = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, masked, True)
        embedding = self.model.model.mask_embedding
        x = x if embedding is None else put_at_masked(x, masked, embedding)
        return x, masked

    def _tiling(self, num_rows: int, linear: nn.Module, splits: bool) -> Tiling | None:
        weight = _weight(linear)
        if not self.deterministic and (num_rows > MAX_ROWS or linear.bias is not None):
            return None
        size, depth = weight.shape
        tiling = self.tiling(size, depth, weight.dtype)
        if tiling is None:
            return None
        chosen = tiling if splits else replace(tiling, splits=1)
        return fixed_tiling(chosen, num_rows, weight.dtype, supports_descriptors(weight.device))

    def _own_product(
        self, x: Tensor | Fp8Rows, linear: nn.Module, tiling: Tiling, adapted: bool, scale: Tensor | None = None
    ) -> Tensor:
        """The product by our kernel. With a bias, or with many rows, no parts are left to add up; but what adapters add
        goes to the first part at any number of rows."""
        num_rows = len(x.values if isinstance(x, Fp8Rows) else x)
        whole = linear.bias is not None or (num_rows > APART_ROWS and not adapted)
        out = few_rows_product(x, _weight(linear), tiling, scale=scale, dtype=self.dtype, whole=whole)
        return out if linear.bias is None else out + linear.get_parameter("bias")

    def _product(
        self, x: Tensor | Fp8Rows, linear: nn.Module, beside: "_Beside", splits: bool = True
    ) -> Tensor | Unscaled:
        """[T, N], or partial sums [P, T, N] if allowed, or a product without its scales."""
        base, adapted = base_layer(linear), beside.acts_on(linear)
        if isinstance(base, Fp8Linear):
            out = self._fp8_product(x, base, splits, adapted)
        else:
            assert isinstance(x, Tensor)
            tiling = self._tiling(len(x), base, splits)
            out = base(x) if tiling is None else self._own_product(x, base, tiling, adapted)
        if not adapted:
            return out
        assert isinstance(x, Tensor)
        out = self._finished(out)
        whole = out if out.ndim == 2 else out[0]
        own = without_adapters(linear)
        if beside.masked is not None and isinstance(own, MaskedLora):
            add_low_rank(whole, self._hidden(x, _weight(own.masked_lora_A)), self.low_rank[own], beside.masked)
        if beside.others is not None and isinstance(linear, AdaptedLinear):
            linear.add_to(whole, x, beside.others, self._fixed_product if self.deterministic else None)
        return out

    def _hidden(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply x [T, C] by the matrices A [R, C] of masked rows: [T, R], or partial sums [P, T, R]."""
        if self.deterministic:
            return self._fixed_product(x, weight)
        rank, size = weight.shape
        tiling = self.tiling(rank, size, weight.dtype) if len(x) <= MAX_ROWS else None
        return x @ weight.T if tiling is None else few_rows_product(x, weight, tiling)

    def _fixed_product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply x [T, K] by weight [N, K], adding up in one order for any number of rows."""
        tiling = replace(tiling_for(len(weight), weight.shape[1], weight.dtype), splits=1)
        tiling = fixed_tiling(tiling, len(x), weight.dtype, supports_descriptors(weight.device))
        return few_rows_product(x, weight, tiling, whole=True)

    def _fp8_product(self, x: Tensor | Fp8Rows, linear: Fp8Linear, splits: bool, adapted: bool) -> Tensor | Unscaled:
        rows = x if isinstance(x, Fp8Rows) else quantize_rows(x)
        tiling = self._tiling(len(rows.values), linear, splits)
        if tiling is not None:
            return self._own_product(rows, linear, tiling, adapted, linear.scale)
        product = Unscaled(linear.unscaled(rows.values, self.dtype), rows.scale, linear.scale)
        return product if linear.bias is None else multiply_scales(product, linear.bias, self.dtype)

    def _finished(self, product: Tensor | Unscaled) -> Tensor:
        """The product with its scales applied."""
        return multiply_scales(product, None, self.dtype) if isinstance(product, Unscaled) else product

    def _gated(self, x: Tensor | Fp8Rows, linear: nn.Module, beside: "_Beside", quantizes: bool) -> Tensor | Fp8Rows:
        """silu of the product's first half times the second, in eight bits if it is read that way."""
        base = base_layer(linear)
        if isinstance(x, Tensor) and not quantizes and not beside.acts_on(linear):
            tiling = self._tiling(len(x), base, splits=False)
            if tiling is not None and base.bias is None and not tiling.descriptors:
                return few_rows_product(x, _weight(base), tiling, gated=True)
        return silu_mul(self._product(x, linear, beside, splits=False), quantizes, self.dtype)


@dataclass(frozen=True)
class _Beside:
    """What is added to products. ``masked`` (bool [T]): the rows that meet a LoRA for masked rows; ``others``: that of
    ``AdaptedRows``. None: no row meets any."""

    masked: Tensor | None
    others: Tensor | None

    def acts_on(self, linear: nn.Module) -> bool:
        """Whether anything is added to this layer's product."""
        if self.others is not None and isinstance(linear, AdaptedLinear):
            return True
        return self.masked is not None and isinstance(without_adapters(linear), MaskedLora)


_NOTHING = _Beside(None, None)


def _takes_fp8(linear: nn.Module, beside: _Beside) -> bool:
    """Whether the product only reads rounded rows. Adapters read the rows before rounding."""
    return isinstance(base_layer(linear), Fp8Linear) and not beside.acts_on(linear)


def _blocks(layer: MaskedLora) -> Blocks:
    """The matrices B of a packed layer. Those of its blocks become parts of one tensor, so that they are held once."""
    b = layer.masked_lora_B
    if not isinstance(b, BlockDiagonal):
        return Blocks.of([_weight(b)])
    empty = _weight(layer.masked_lora_A).new_empty
    matrices = [empty(one.size, 0) if isinstance(one, ZeroLora) else _weight(one) for one in b.blocks]
    found = Blocks.of(matrices)
    for one, part in zip(b.blocks, found.b.split([len(matrix) for matrix in matrices]), strict=True):
        if not isinstance(one, ZeroLora):
            one.weight = nn.Parameter(part[:, : _weight(one).shape[1]], requires_grad=False)
    return found


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # type: ignore[return-value]
