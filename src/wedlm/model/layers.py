# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder layer. Module and parameter names are those of Hugging Face checkpoints.

Shape suffixes: T rows, C hidden size, H heads (query heads, or the fewer key/value heads K), D head dimension.
``masked`` says which rows are masked, or which have their own adapter (``lora/row_factors.py``); only layers with
factors for them use it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wedlm.attention.base import Attend
from wedlm.model.config import ModelConfig
from wedlm.model.lora.masked_rows import Masked, linear
from wedlm.model.rope import rotate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32 inside.

    In float32 equal to transformers; in bfloat16 it rounds once where transformers rounds twice, for a fused kernel.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the weight is float32 and x may not be: the fused kernel wants one type, and attend gets one.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Projections, optional per-head norms and RoPE around ``attend``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj: nn.Module = nn.Linear(q_size, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        # Set by pack_for_inference, which then removes q_proj, k_proj and v_proj.
        self.qkv_proj: nn.Module | None = None
        self.qkv_sizes = (q_size, kv_size, kv_size)

    def project(self, x_TC: Tensor, masked: Masked) -> tuple[Tensor, Tensor]:
        """(queries and keys side by side [T, H + K, D], values [T, K, D]) before norms and RoPE."""
        if self.qkv_proj is None:
            q_TF, k_TF, v_TF = (linear(one, x_TC, masked) for one in (self.q_proj, self.k_proj, self.v_proj))
            qk_TF = torch.cat((q_TF, k_TF), dim=-1)
        else:
            q_size, k_size, v_size = self.qkv_sizes
            qk_TF, v_TF = linear(self.qkv_proj, x_TC, masked).split((q_size + k_size, v_size), dim=-1)
        return qk_TF.unflatten(-1, (-1, self.head_dim)), v_TF.unflatten(-1, (-1, self.head_dim))

    def forward(
        self, x_TC: Tensor, cos_TD: Tensor, sin_TD: Tensor, attend: Attend, layer: int, masked: Masked
    ) -> Tensor:
        qk_THD, v_TKD = self.project(x_TC, masked)
        # Heads are counted by the weights, which tensor parallelism may have sharded.
        heads = (qk_THD.shape[1] - v_TKD.shape[1], v_TKD.shape[1])
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = qk_THD.split(heads, dim=1)
            qk_THD = torch.cat((self.q_norm(q_THD), self.k_norm(k_TKD)), dim=1)
        q_THD, k_TKD = rotate(qk_THD, cos_TD, sin_TD).split(heads, dim=1)
        return linear(self.o_proj, attend(layer, q_THD, k_TKD, v_TKD).flatten(-2), masked)


class MLP(nn.Module):
    """Gated SiLU feed-forward: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj: nn.Module = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        # Set by pack_for_inference, which then removes gate_proj and up_proj.
        self.gate_up_proj: nn.Module | None = None

    def project(self, x_TC: Tensor, masked: Masked) -> tuple[Tensor, Tensor]:
        """(gate, up), each [T, intermediate size]."""
        if self.gate_up_proj is None:
            return linear(self.gate_proj, x_TC, masked), linear(self.up_proj, x_TC, masked)
        gate, up = linear(self.gate_up_proj, x_TC, masked).chunk(2, dim=-1)
        return gate, up

    def forward(self, x_TC: Tensor, masked: Masked) -> Tensor:
        gate, up = self.project(x_TC, masked)
        return linear(self.down_proj, F.silu(gate) * up, masked)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_TC: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        attend: Attend,
        layer: int,
        masked: Masked = None,
    ) -> Tensor:
        x_TC = x_TC + self.self_attn(self.input_layernorm(x_TC), cos_TD, sin_TD, attend, layer, masked)
        return x_TC + self.mlp(self.post_attention_layernorm(x_TC), masked)
