# SPDX-License-Identifier: Apache-2.0
"""Fewer, larger matrix products for inference: q, k, v in one and gate, up in one."""

import torch
from torch import Tensor, nn

from wedlm.model.layers import MLP, Attention, DecoderLayer
from wedlm.model.transformer import Transformer


@torch.no_grad()
def pack_for_inference(model: Transformer) -> Transformer:
    """Fuse projections that share their input, in place, and freeze all parameters; returns the same model.

    Layer by layer, so that at most one layer's projections exist twice at any time. Its ``state_dict`` no longer has
    the names of a checkpoint: save before packing. Raises ValueError if the model is packed already.
    """
    if is_packed(model):
        raise ValueError("the model is packed already; expected one whose q, k and v projections are separate")
    model.requires_grad_(False)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        _pack_attention(layer.self_attn)
        _pack_mlp(layer.mlp)
    return model


def is_packed(model: Transformer) -> bool:
    """Whether ``pack_for_inference`` was applied."""
    return any(isinstance(module, Attention) and module.qkv_proj is not None for module in model.modules())


def _pack_attention(attention: Attention) -> None:
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    attention.qkv_sizes = (parts[0].weight.shape[0], parts[1].weight.shape[0], parts[2].weight.shape[0])
    attention.qkv_proj = _fuse(*parts)
    del attention.q_proj, attention.k_proj, attention.v_proj


def _pack_mlp(mlp: MLP) -> None:
    mlp.gate_up_proj = _fuse(mlp.gate_proj, mlp.up_proj)
    del mlp.gate_proj, mlp.up_proj


def _fuse(*linears: nn.Linear) -> nn.Module:
    """One linear layer whose outputs are the concatenated outputs of ``linears``."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return _inference_linear(weight, torch.cat(biases) if biases else None)


def _inference_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The linear layer used for inference: the one place to choose a faster product for a device and dtype."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
