# SPDX-License-Identifier: Apache-2.0
"""The packed model on fused kernels, for GPUs: the same rows in and logits out as ``Transformer``, its slow twin.

Shape suffixes as in ``transformer.py``; F = (H + 2 K) D, the width of the packed q, k, v product.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from wedlm.attention.base import FusedAttend, Norms
from wedlm.kernels.embed import embed
from wedlm.kernels.matmul import MAX_ROWS, MAX_SCALED_ROWS, Tiling, few_rows_product, tiling_for
from wedlm.kernels.norm import add_rms_norm, silu_mul
from wedlm.model.inference.layers import is_packed
from wedlm.model.inference.quantization import scale_of
from wedlm.model.layers import DecoderLayer
from wedlm.model.lora.masked_rows import MaskedLora, base_layer, has_masked_lora, put_at_masked
from wedlm.model.transformer import Transformer


class FusedTransformer:
    """Runs a packed ``Transformer``. ``tiling(N, K, eight_bits)`` chooses for few rows; None: the library's product.

    By default 16-bit weights go through our kernel: as fast or faster at few rows, and its sums do not depend on how
    many rows there are.
    """

    def __init__(self, model: Transformer, tiling: Callable[[int, int, bool], Tiling | None] | None = None) -> None:
        assert is_packed(model), "expected a model after pack_for_inference"
        self.model = model
        self.has_masked_lora = has_masked_lora(model)  # for masked rows
        half = model.model.embed_tokens.weight.dtype.itemsize == 2
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

    @torch.inference_mode()
    def __call__(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: FusedAttend,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Tensor:
        """Logits [L, V] of the rows picked by ``logits_rows`` (None: all). ``masked`` as in ``Transformer``."""
        rotary = self.model.model.rotary
        x_TC, cos_TD, sin_TD = embed(
            tokens_T, positions_T, _weight(self.model.model.embed_tokens), rotary.inv_freq, rotary.attention_factor
        )
        x_TC, column = self._masked(x_TC, masked)
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            attention, mlp = layer.self_attn, layer.mlp
            assert attention.qkv_proj is not None
            assert mlp.gate_up_proj is not None
            x_TC, normed = add_rms_norm(x_TC, delta, _weight(layer.input_layernorm), self.eps)
            qkv = self._product(normed, attention.qkv_proj, column)
            out_THD = attend(index, qkv, cos_TD, sin_TD, self.norms[index])
            delta = self._product(out_THD.flatten(1), attention.o_proj, column)
            x_TC, normed = add_rms_norm(x_TC, delta, _weight(layer.post_attention_layernorm), self.eps)
            delta = self._product(self._gated(normed, mlp.gate_up_proj, column), mlp.down_proj, column)
        if logits_rows is not None:
            if len(logits_rows) == 0:
                return x_TC.new_empty(0, self.model.config.vocab_size)
            x_TC = x_TC[logits_rows]
            delta = delta[..., logits_rows, :] if delta is not None else None
        _, normed = add_rms_norm(x_TC, delta, _weight(self.model.model.norm), self.eps)
        return self._product(normed, self.model.lm_head, None, splits=False)

    def _masked(self, x: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x with the masked rows' own embedding, and a column [T, 1] that is 1 at them and 0 elsewhere; None: no row
        meets a LoRA."""
        if masked is None or not self.has_masked_lora:
            return x, None
        if masked.dtype != torch.bool:
            masked = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, masked, True)
        embedding = self.model.model.mask_embedding
        x = x if embedding is None else put_at_masked(x, masked, embedding)
        return x, masked[:, None].to(x.dtype)

    def _tiling(self, x: Tensor, linear: nn.Module) -> Tiling | None:
        eight_bits = scale_of(linear) is not None
        if len(x) > (MAX_SCALED_ROWS if eight_bits else MAX_ROWS) or linear.bias is not None:
            return None
        return self.tiling(*_weight(linear).shape, eight_bits)

    def _product(self, x: Tensor, linear: nn.Module, masked: Tensor | None, splits: bool = True) -> Tensor:
        """[T, N], or partial sums [P, T, N] where allowed. ``masked``: the column of ``_masked``."""
        base = base_layer(linear)
        tiling = self._tiling(x, base)
        if tiling is None or (tiling.splits > 1 and not splits):
            out = base(x)
        else:
            out = few_rows_product(x, _weight(base), tiling, scale=scale_of(base))
        _add_delta(out if out.ndim == 2 else out[0], x, linear, masked)
        return out

    def _gated(self, x: Tensor, linear: nn.Module, masked: Tensor | None) -> Tensor:
        base = base_layer(linear)
        tiling = self._tiling(x, base)
        if tiling is not None and (masked is None or base is linear):
            return few_rows_product(x, _weight(base), replace(tiling, splits=1), gated=True, scale=scale_of(base))
        if tiling is None:
            out = base(x)
        else:
            out = few_rows_product(x, _weight(base), replace(tiling, splits=1), scale=scale_of(base))
        _add_delta(out, x, linear, masked)
        return silu_mul(out)


def _add_delta(out: Tensor, x: Tensor, linear: nn.Module, masked: Tensor | None) -> None:
    """Add the LoRA's delta of all rows times their column to ``out``: no size depends on how many are masked."""
    if masked is not None and isinstance(linear, MaskedLora):
        out.addcmul_(linear.delta(x), masked)


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # type: ignore[return-value]
