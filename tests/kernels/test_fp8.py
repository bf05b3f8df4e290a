# SPDX-License-Identifier: Apache-2.0
"""FP8: kernels that round rows, multiply rounded rows, and read products whose scales are apart, against torch.

Triton's interpreter loses a carry when it converts to e4m3, so there the kernels round before they convert.
"""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from tests.kernels.comparing import DTYPES, close, same_rows
from wedlm.kernels import norm
from wedlm.kernels.fp8 import Fp8Rows, Unscaled, multiply_scales, quantize_rows
from wedlm.kernels.matmul import Tiling, few_rows_product
from wedlm.kernels.norm import add_rms_norm, silu_mul
from wedlm.kernels.rope import norm_rope_write
from wedlm.model.inference.quantization import Fp8Linear, quantize


def near_rows(actual: Fp8Rows, expected: torch.Tensor) -> None:
    """Those of numbers that are ``expected`` but for their last bits, which may round to a neighbour."""
    values, scale = quantize(expected)
    torch.testing.assert_close(actual.scale, scale, rtol=1e-2, atol=0)
    difference = (actual.values.float() - values.float()).abs()
    assert (difference <= values.float().abs().clamp(min=2**-6) / 7.9).all()
    assert (difference > 0).float().mean() < 0.02 if expected.dtype == torch.float32 else 0.2


def unscaled(num_rows: int, size: int, device: torch.device) -> tuple[Unscaled, torch.Tensor]:
    """A product that lacks its scales, and with them in float32."""
    values = torch.randn(num_rows, size, device=device) * 1e4
    row, column = (10 ** torch.empty(n, device=device).uniform_(-3, -1) for n in (num_rows, size))
    return Unscaled(values, row, column), values * row[:, None] * column


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 48, 1100])
def test_quantize_rows(device, dtype, size):
    torch.manual_seed(0)
    x = (torch.randn(40, size, device=device) * torch.logspace(-4, 3, 40, device=device)[:, None]).to(dtype)
    x[1] = 0
    x[2, 1:] *= 1e-3  # below the smallest of the exponents
    same_rows(quantize_rows(x), x)
    every = torch.arange(-448, 449, device=device, dtype=torch.float32)[None] / 64  # ties, and what lies between
    same_rows(quantize_rows(every), every)
    one = quantize_rows(x[7:8])
    assert torch.equal(one.values.float(), quantize_rows(x).values[7:8].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta", ["none", "product", "parts", "unscaled"])
def test_add_rms_norm_in_eight_bits(device, dtype, delta):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 96, device=device, dtype=dtype), torch.randn(96, device=device, dtype=dtype)
    product, whole = unscaled(5, 96, device)
    deltas = {"none": None, "product": whole.to(dtype), "parts": torch.stack((whole / 4, whole * 0.75))}
    total, rows = add_rms_norm(x, deltas.get(delta, product), weight, 1e-5, quantizes=True)
    plain_total, plain = add_rms_norm(x, deltas.get(delta, product), weight, 1e-5)
    assert torch.equal(total, plain_total)
    same_rows(rows, plain)
    added = x if delta == "none" else x + whole.to(dtype)
    close(total, added, dtype)
    close(plain, F.rms_norm(added, (96,), weight, 1e-5), dtype, 2)
    near_rows(rows, F.rms_norm(added, (96,), weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [False, True])
def test_silu_mul_in_eight_bits(device, monkeypatch, dtype, scales):
    torch.manual_seed(0)
    product, whole = unscaled(3, 2 * 1100, device)  # neither a multiple of the tiles' sizes
    product, whole = (product, whole.to(dtype)) if scales else (whole.to(dtype), whole.to(dtype))
    gate, up = whole.chunk(2, dim=-1)
    plain = silu_mul(product, dtype=dtype)
    assert plain.dtype == dtype
    close(plain, F.silu(gate) * up, dtype, 3)
    for many_rows in (1, 100):
        monkeypatch.setattr(norm, "MANY_ROWS", many_rows)
        same_rows(silu_mul(product, quantizes=True, dtype=dtype), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the bits of the GPU's exponential, at real sizes")
@pytest.mark.parametrize("num_rows", [1, 64, 1001])
@pytest.mark.parametrize("size", [12_288, 1000])
def test_two_kernels_of_silu_mul_have_the_bits_of_one(device, monkeypatch, num_rows, size):
    torch.manual_seed(0)
    product, _ = unscaled(num_rows, 2 * size, device)
    product.values[0] = 0
    found = []
    for many_rows in (1, 10**6):
        monkeypatch.setattr(norm, "MANY_ROWS", many_rows)
        found.append(silu_mul(product, quantizes=True, dtype=torch.bfloat16))
    same_rows(found[1], silu_mul(product, dtype=torch.bfloat16))
    assert torch.equal(found[0].values.view(torch.uint8), found[1].values.view(torch.uint8))
    assert torch.equal(found[0].scale, found[1].scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_rope_write_of_a_product_without_its_scales(device, dtype):
    torch.manual_seed(0)
    num_rows, heads, kv_heads, d = 5, 6, 2, 16
    product, whole = unscaled(num_rows, (heads + 2 * kv_heads) * d, device)
    angles = torch.randn(num_rows, d // 2, device=device)
    cos, sin = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    norms = (*torch.randn(2, d, device=device).to(dtype), 1e-6)
    slots = torch.tensor([7, 3, 39, 0, 12], device=device)
    found = []
    for qkv in (product, whole.to(dtype)):
        keys, values = (torch.zeros(40, kv_heads, d, device=device, dtype=dtype) for _ in range(2))
        found.append((norm_rope_write(qkv, cos, sin, slots, norms, keys, values), keys, values))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_multiply_scales(device, dtype, biased):
    torch.manual_seed(0)
    product, whole = unscaled(3, 1100, device)
    bias = torch.randn(1100, device=device).to(dtype) if biased else None
    out = multiply_scales(product, bias, dtype)
    assert out.dtype == dtype
    close(out, whole if bias is None else whole + bias, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, pytest.param(16, marks=pytest.mark.long), 33])
@pytest.mark.parametrize(
    "tiling",
    [Tiling(32, 64), Tiling(32, 64, splits=2), Tiling(16, 32, splits=3), Tiling(32, 64, rows=16)],
    ids=["one", "halves", "uneven", "blocks"],
)
def test_few_rows_product_in_fp8(device, dtype, num_rows, tiling):
    torch.manual_seed(0)
    x = torch.randn(num_rows, 320, device=device, dtype=dtype)
    layer = Fp8Linear(torch.randn(112, 320, device=device, dtype=dtype) / 18, None)
    rows = quantize_rows(x)
    out = few_rows_product(rows, layer.weight, tiling, scale=layer.scale, dtype=dtype)
    assert out.dtype == (torch.float32 if tiling.splits > 1 else dtype)
    # Tensor cores add in about 14 bits; the interpreter's BLAS in float32.
    tolerance = 1e-3 if x.is_cuda else 1e-5
    exact = (rows.values.float() @ layer.weight.float().T) * rows.scale[:, None] * layer.scale
    whole = out.sum(0) if tiling.splits > 1 else out
    close(whole, exact, dtype, tolerance / 1e-5 if dtype == torch.float32 else 1)
    alone = few_rows_product(
        Fp8Rows(rows.values[-1:], rows.scale[-1:]), layer.weight, tiling, scale=layer.scale, dtype=dtype
    )
    alone = (alone.sum(0) if tiling.splits > 1 else alone)[0]
    if x.is_cuda:  # a row's sums do not depend on its company
        assert torch.equal(alone, whole[-1])
    else:  # whose order is BLAS's here
        close(alone, whole[-1], dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the library's FP8 product needs a GPU")
@pytest.mark.parametrize("num_rows", [1, 16, 33, 200])
def test_the_librarys_product_is_the_twins(device, num_rows):
    torch.manual_seed(0)
    layer = Fp8Linear(torch.randn(112, 320, device=device, dtype=torch.bfloat16) / 18, None)
    values, _ = quantize(torch.randn(num_rows, 320, device=device))
    out = layer.unscaled(values, torch.bfloat16)
    expected = values.float() @ layer.weight.float().T
    assert (out.float() - expected).norm() < 5e-3 * expected.norm()
