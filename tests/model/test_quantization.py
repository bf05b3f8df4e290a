# SPDX-License-Identifier: Apache-2.0
"""Weights and inputs in FP8: how far they are from what they were, and that nothing but rounding differs."""

import pytest
import torch

from tests.model.tiny import our_model
from wedlm.attention.sdpa import CausalAttend
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.inference.quantization import FP8, Fp8Linear, check_fp8_device, check_quantization, quantize


@pytest.mark.parametrize("kind", ["wedlm-qwen3", "wedlm-qwen2.5"])
def test_all_layers_but_embeddings_and_head_are_rounded(fp8_anywhere, kind):
    exact, rounded = (pack_for_inference(our_model(kind), name) for name in (None, "fp8"))
    names = {name for name, module in rounded.named_modules() if isinstance(module, Fp8Linear)}
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert names == {f"model.layers.{i}.{part}" for i in range(exact.config.num_layers) for part in parts}
    tokens, positions = torch.arange(12) * 3, torch.arange(12)
    with torch.inference_mode():
        expected, actual = (model(tokens, positions, CausalAttend()) for model in (exact, rounded))
    error = (expected - actual).norm() / expected.norm()
    assert 1e-5 < error < 0.25


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


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_int8_is_the_native_forwards(device):
    with pytest.raises(ValueError, match=f"quantization is 'int8' and the device is {device}; .* expected 'fp8' on NV"):
        check_quantization("int8", our_model("wedlm-qwen3").config, torch.device(device))


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
