# SPDX-License-Identifier: Apache-2.0
"""Weights in eight bits: how far they are from the weights, and that nothing but rounding differs."""

import pytest
import torch
from torch.nn import functional as F

from tests.model.tiny import our_model
from wedlm.attention.sdpa import CausalAttend
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.inference.quantization import FP8, Fp8Linear, Int8Linear, check_fp8_device, quantize, scale_of


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


@pytest.mark.parametrize(("bits", "layer", "most"), [("int8", Int8Linear, 0.05), ("fp8", Fp8Linear, 0.25)])
@pytest.mark.parametrize("kind", ["wedlm-qwen3", "wedlm-qwen2.5"])
def test_all_layers_but_embeddings_and_head_are_rounded(fp8_anywhere, kind, bits, layer, most):
    exact, rounded = (pack_for_inference(our_model(kind), name) for name in (None, bits))
    names = {name for name, module in rounded.named_modules() if isinstance(module, layer)}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert names == {f"model.layers.{i}.{part}" for i in range(exact.config.num_layers) for part in parts}
    tokens, positions = torch.arange(12) * 3, torch.arange(12)
    with torch.inference_mode():
        expected, actual = (model(tokens, positions, CausalAttend()) for model in (exact, rounded))
    error = (expected - actual).norm() / expected.norm()
    assert 1e-5 < error < most


def test_the_head_in_fp8(fp8_anywhere):
    packed = pack_for_inference(our_model("wedlm-qwen3", vocab_size=112), "fp8", quantizes_head=True)
    assert packed.lm_head.weight.dtype == FP8
    assert packed.model.embed_tokens.weight.dtype == torch.float32


def test_rows_in_fp8():
    x = torch.randn(30, 64) * torch.logspace(-12, 12, 30)[:, None]
    x[3] = 0
    values, scale = quantize(x)
    assert values.dtype == FP8
    assert values.float().abs().amax(dim=1).tolist() == [448] * 3 + [0] + [448] * 26
    error = (values.float() * scale[:, None] - x).abs()
    # Half of the last of three bits, or of the smallest number there is: 2^-9.
    assert (error <= (x.abs() * 2**-4).maximum(scale[:, None] * 2**-10) * 1.001).all()
    alone = quantize(x[5:6])
    assert torch.equal(alone[0].float(), values[5:6].float())
    assert torch.equal(alone[1], scale[5:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_the_fp8_product_is_that_of_the_rounded_numbers(dtype, biased):
    weight, x = torch.randn(32, 48, dtype=dtype), torch.randn(5, 48, dtype=dtype) * 30
    bias = torch.randn(32, dtype=dtype) if biased else None
    layer = Fp8Linear(weight, bias)
    rounded, inputs = (values.double() * scale[:, None] for values, scale in (quantize(weight), quantize(x)))
    assert torch.equal(layer.weight.double() * layer.scale[:, None], rounded)
    expected = inputs @ rounded.T + (0 if bias is None else bias)
    out = layer(x)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    torch.testing.assert_close(
        expected, x.double() @ weight.double().T + (0 if bias is None else bias), rtol=0, atol=60
    )


def test_fp8_needs_a_device_that_multiplies_it(monkeypatch):
    expected = "quantization is 'fp8' and the device is cpu; expected an NVIDIA GPU that multiplies FP8"
    model = our_model("wedlm-qwen3")
    with pytest.raises(ValueError, match=expected):
        pack_for_inference(model, "fp8")
    assert model.model.layers[0].self_attn.qkv_proj is None  # it is as it was
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ValueError, match=r"the GPU has compute capability 8\.6; expected at least 8\.9"):
        check_fp8_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_fp8_device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"intermediate_size": 88}, "intermediate size is 88"),
        ({"hidden_size": 40}, "hidden size is 40"),
        ({"head_dim": 4}, "width of the query heads is 24"),
        ({"head_dim": 4, "num_attention_heads": 8, "num_key_value_heads": 1}, "width of all heads is 40"),
    ],
)
def test_fp8_needs_sizes_of_sixteens(fp8_anywhere, changes, what):
    model = our_model("wedlm-qwen3", **changes)
    with pytest.raises(ValueError, match=f"quantization is 'fp8' and the {what}; expected a multiple of 16"):
        pack_for_inference(model, "fp8")
    assert model.model.layers[0].self_attn.qkv_proj is None
