# SPDX-License-Identifier: Apache-2.0
"""The CPU's packed layers against plain torch, and the packed model in each dtype against float32."""

import pytest
import torch
from torch.nn import functional as F

from tests.model.tiny import causal_attend, our_model
from wedlm.model import Transformer, pack_for_inference
from wedlm.model.inference.layers import Float16Linear, MkldnnLinear, OneKernelRMSNorm, _has_fbgemm, _has_mkldnn_bf16
from wedlm.model.layers import RMSNorm

needs_mkldnn = pytest.mark.skipif(not _has_mkldnn_bf16(), reason="this CPU has no bfloat16 products in oneDNN")
needs_fbgemm = pytest.mark.skipif(not _has_fbgemm(), reason="this build of torch has no FBGEMM")
ROWS = [1, 3, 8, 17, 40]


@needs_mkldnn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_mkldnn_linear(rows, bias):
    torch.manual_seed(rows)
    weight, x = torch.randn(70, 96).bfloat16() / 10, torch.randn(rows, 96).bfloat16()
    offset = torch.randn(70).bfloat16() if bias else None
    found = MkldnnLinear(weight, offset)(x)
    expected = F.linear(x.float(), weight.float(), None if offset is None else offset.float())
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.02, rtol=0.01)  # one rounding to 8 bits


@needs_fbgemm
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_float16_linear(rows, bias):
    torch.manual_seed(rows)
    weight, x = (torch.randn(70, 96) / 10).half(), torch.randn(rows, 96)
    offset = torch.randn(70).half() if bias else None
    linear = Float16Linear(weight, offset)
    found = linear(x)
    expected = F.linear(x, weight.float(), None if offset is None else offset.float())
    assert torch.allclose(found, expected, atol=1e-5)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert torch.equal(found[:1], linear(x[:1]))  # a row alone, to the bit
    else:  # FBGEMM has another kernel for a row alone
        assert torch.allclose(found[:1], linear(x[:1]), atol=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_one_kernel_norm(rows):
    torch.manual_seed(rows)
    norm = RMSNorm(48, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(rows, 48) * 3 + 1
    assert torch.allclose(OneKernelRMSNorm(norm)(x), norm(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen3-wide-heads", "llama-tied"])
@torch.inference_mode()
def test_packing_costs_no_precision(name, dtype):
    """Against the float32 model, the packed one is about as close as the plain one in the same dtype, or closer."""
    tokens, positions = torch.arange(3, 40), torch.arange(37)
    exact = our_model(name)(tokens, positions, causal_attend)

    def error(model: Transformer) -> float:
        return float((model(tokens, positions, causal_attend).float() - exact).square().mean().sqrt())

    plain, packed = error(our_model(name).to(dtype)), error(pack_for_inference(our_model(name).to(dtype)))
    assert packed < 1.25 * plain + 1e-5
    if dtype == torch.float16 and _has_fbgemm():
        assert packed < 0.75 * plain  # only the weights are rounded
