# SPDX-License-Identifier: Apache-2.0
"""Weights in eight bits: how far they are from the weights, and that nothing but rounding differs."""

import pytest
import torch
from torch.nn import functional as F

from tests.model.tiny import our_model
from wedlm.attention.sdpa import CausalAttend
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.inference.quantization import Int8Linear, scale_of


def test_a_weight_is_off_by_half_a_scale_at_most():
    weight = torch.randn(20, 64) * torch.logspace(-8, 3, 20)[:, None]
    weight[3] = 0
    layer = Int8Linear(weight, None)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.abs().amax(dim=1).tolist() == [127] * 3 + [0] + [127] * 16
    error = (layer.weight * layer.scale[:, None] - weight).abs()
    assert (error <= layer.scale[:, None] * 0.5001).all()
    assert torch.equal(scale_of(layer), layer.scale)
    assert scale_of(torch.nn.Linear(2, 2)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_that_of_the_rounded_weight(dtype, biased):
    weight, x = torch.randn(24, 40, dtype=dtype), torch.randn(5, 40, dtype=dtype)
    bias = torch.randn(24, dtype=dtype) if biased else None
    layer = Int8Linear(weight, bias)
    rounded = layer.weight * layer.scale[:, None]
    expected = F.linear(x.float(), rounded, None if bias is None else bias.float())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["wedlm-qwen3", "wedlm-qwen2.5"])
def test_all_layers_but_embeddings_and_head_are_rounded(kind):
    exact, rounded = (pack_for_inference(our_model(kind), bits) for bits in (None, "int8"))
    names = {name for name, module in rounded.named_modules() if isinstance(module, Int8Linear)}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert names == {f"model.layers.{i}.{part}" for i in range(exact.config.num_layers) for part in parts}
    tokens, positions = torch.arange(12) * 3, torch.arange(12)
    with torch.inference_mode():
        expected, actual = (model(tokens, positions, CausalAttend()) for model in (exact, rounded))
    error = (expected - actual).norm() / expected.norm()
    assert 1e-5 < error < 0.05
