# SPDX-License-Identifier: Apache-2.0
"""The inference form of the model: fewer, larger matrix products, and weights in the layout that their kernel
prefers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wedlm.model.formats.fp8_checkpoint import SCALE, has_fp8, widened
from wedlm.model.inference.quantization import FP8, Fp8Linear, Quantization, check_quantization
from wedlm.model.layers import MLP, Attention, DecoderLayer, RMSNorm
from wedlm.model.lora.masked_rows import BlockDiagonal, MaskedLora, ZeroLora, base_layer
from wedlm.model.transformer import Transformer


@torch.no_grad()
def pack_for_inference(
    model: Transformer, quantization: Quantization | None = None, quantizes_head: bool = False
) -> Transformer:
    """Fuse projections that share their input, in place, and freeze all parameters; returns the same model.

    It works layer by layer, so that at most one layer's projections exist twice at any time; a tied output projection
    gets a separate packed copy. A float16 model on the CPU becomes one of float16 weights and float32 arithmetic (its
    embeddings, norms, activations and cache). ``quantization`` "fp8" puts the layers' weights into eight bits, but not
    embeddings, and the output projection only with ``quantizes_head``. The ``state_dict`` no longer has the names of a
    checkpoint, so save before packing. Raises ValueError if the model is packed already, or if its shape or device
    cannot be quantised this way.
    """
    if is_packed(model):
        raise ValueError("the model is packed already; expected one whose q, k and v projections are separate")
    if quantization is None and has_fp8(model):
        raise ValueError("the model's layers are in FP8; expected quantization 'fp8', or weights of another type")
    check_quantization(quantization, model.config, model.model.embed_tokens.weight.device, quantizes_head)
    model.requires_grad_(False)
    for layer in _layers(model):
        _pack_attention(layer.self_attn, quantization)
        _pack_mlp(layer.mlp, quantization)
        layer.input_layernorm = _inference_norm(layer.input_layernorm)
        layer.post_attention_layernorm = _inference_norm(layer.post_attention_layernorm)
    model.model.norm = _inference_norm(model.model.norm)
    model.lm_head = _fuse(model.lm_head, quantization=quantization if quantizes_head else None)
    weight = model.model.embed_tokens.weight
    if isinstance(model.lm_head, Float16Linear):
        model.model.embed_tokens.weight = nn.Parameter(weight.float(), requires_grad=False)
    return model


def is_packed(model: Transformer) -> bool:
    """Whether ``pack_for_inference`` was applied."""
    return any(layer.self_attn.qkv_proj is not None for layer in _layers(model))


def _layers(model: Transformer) -> list[DecoderLayer]:
    return [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]


def _pack_attention(attention: Attention, quantization: Quantization | None) -> None:
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    q_size, k_size, v_size = (len(base_layer(part).get_parameter("weight")) for part in parts)
    attention.qkv_sizes = (q_size, k_size, v_size)
    attention.qkv_proj = _fuse(*parts, quantization=quantization)
    del attention.q_proj, attention.k_proj, attention.v_proj
    attention.o_proj = _fuse(attention.o_proj, quantization=quantization)


def _pack_mlp(mlp: MLP, quantization: Quantization | None) -> None:
    mlp.gate_up_proj = _fuse(mlp.gate_proj, mlp.up_proj, quantization=quantization)
    del mlp.gate_proj, mlp.up_proj
    mlp.down_proj = _fuse(mlp.down_proj, quantization=quantization)


def _fuse(*linears: nn.Module, quantization: Quantization | None) -> nn.Module:
    """One linear layer whose outputs are the concatenated outputs of ``linears``."""
    bases = [base_layer(linear) for linear in linears]
    weights: list[Tensor] = [linear.get_parameter("weight") for linear in bases]
    biases: list[Tensor] = [linear.get_parameter("bias") for linear in bases if linear.bias is not None]
    scale = None
    if all(weight.dtype == FP8 for weight in weights):
        scale = torch.cat([linear.get_buffer(SCALE) for linear in bases])
    else:
        weights = [
            widened(weight, linear.get_buffer(SCALE)) if weight.dtype == FP8 else weight
            for weight, linear in zip(weights, bases, strict=True)
        ]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = torch.cat(biases).detach() if biases else None
    fused: nn.Module
    if quantization is None:
        fused = _inference_linear(weight.detach(), bias)
    else:
        fused = Fp8Linear(weight.detach(), bias, scale)
    if not any(isinstance(linear, MaskedLora) for linear in linears):
        return fused
    return _fuse_masked_lora(fused, linears)


def _fuse_masked_lora(fused: nn.Module, linears: Sequence[nn.Module]) -> MaskedLora:
    """The fused layer with the LoRAs of ``linears``, whose matrices A become one. A layer without a LoRA has rank 0."""
    all_a: list[Tensor] = []
    all_b: list[nn.Module] = []
    for linear in linears:
        weight = base_layer(linear).get_parameter("weight").detach()
        if isinstance(linear, MaskedLora):
            all_a.append(linear.masked_lora_A.get_parameter("weight").detach().to(weight))
            b = linear.masked_lora_B.get_parameter("weight").detach() * linear.scale
            all_b.append(_inference_linear(b.to(weight), None))
        else:
            all_a.append(weight[:0])
            all_b.append(ZeroLora(len(weight)))
    block_b = all_b[0] if len(all_b) == 1 else BlockDiagonal(all_b, [len(a) for a in all_a])
    return MaskedLora(fused, _inference_linear(torch.cat(all_a), None), block_b)


def _inference_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The linear layer used for inference: the one place that chooses a faster product for a device and dtype."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _has_mkldnn_bf16():
        return MkldnnLinear(weight, bias)
    if weight.device.type == "cpu" and weight.dtype == torch.float16 and _has_fbgemm():
        return Float16Linear(weight, bias)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _has_mkldnn_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


class Float16Linear(nn.Module):
    """Float16 weight, with float32 input, sum and output, on x86 CPUs (FBGEMM).

    It reads as few bytes as bfloat16, rounds like float32, and is the fastest product measured at one to four rows;
    from eight rows on ``MkldnnLinear`` is faster (docs/log.md). With AVX-512 a row's result does not depend on the
    number of rows; without, its last bits may.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class MkldnnLinear(nn.Module):
    """A bfloat16 linear layer on x86 CPUs whose weight oneDNN has blocked once, instead of at every call.

    At few rows the product is bound by reading the weight, and blocking makes this two to three times faster
    (docs/log.md). The layout does not depend on the number of rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


def _inference_norm(norm: nn.Module) -> nn.Module:
    if isinstance(norm, RMSNorm) and norm.weight.device.type == "cpu":
        return OneKernelRMSNorm(norm)
    return norm


class OneKernelRMSNorm(nn.Module):
    """RMSNorm(x) as the first half of LayerNorm([x, -x]), whose mean is 0 and whose variance is mean(x²).

    torch has no fused RMSNorm on the CPU (it runs six kernels), but its LayerNorm is one kernel. This pays off at few
    rows, where a step is full of small kernels (docs/log.md).
    """

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.size, self.eps = len(norm.weight), norm.eps
        weight = norm.weight.float() if norm.weight.dtype == torch.float16 else norm.weight
        self.weight = nn.Parameter(torch.cat((weight, weight)).detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat((x, -x), dim=-1)
        return F.layer_norm(both, self.weight.shape, self.weight, None, self.eps)[..., : self.size]
