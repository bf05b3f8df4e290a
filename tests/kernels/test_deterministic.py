# SPDX-License-Identifier: Apache-2.0
"""Deterministic steps: no bit of a row's result depends on how many rows there are. On a GPU real numbers are compared
bit for bit; in the interpreter, whose products are BLAS's, numbers whose sums are exact in any order."""

import pytest
import torch

pytest.importorskip("triton")
from tests.kernels.comparing import DTYPES, close, summable
from tests.model.tiny import our_model
from wedlm import LLM
from wedlm.attention.base import ExtendBatch, KVCache, RowVisibility
from wedlm.attention.paged import plan_paged
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine import factory
from wedlm.kernels import attention
from wedlm.kernels.attention import num_fixed_parts, paged_attention
from wedlm.kernels.fp8 import Fp8Rows, quantize_rows
from wedlm.kernels.matmul import Tiling, few_rows_product, fixed_tiling
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.inference.quantization import Fp8Linear
from wedlm.model.inference.triton_transformer import FusedTransformer

ROWS = [1, 8, 33, 64, 200]


def added(out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Parts of a product as the kernels that read them add them up: one after the other, then rounded."""
    if out.ndim == 2:
        return out
    total = out[0]
    for part in out[1:]:
        total = total + part
    return total.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_a_product_has_one_order_at_any_number_of_rows(device, dtype, splits):
    torch.manual_seed(0)
    x = summable(torch.randn(200, 640, device=device, dtype=dtype), 1 / 8)
    weight = summable(torch.randn(100, 640, device=device, dtype=dtype) / 18, 1 / 128)
    tiling = Tiling(64, 128, splits)
    found = {}
    for n in ROWS:
        out = few_rows_product(x[:n], weight, fixed_tiling(tiling, n, dtype), whole=n > 64)
        assert out.ndim == (3 if splits > 1 and n <= 64 else 2)
        found[n] = added(out, dtype)
    close(found[200], x.float() @ weight.float().T, dtype)
    for n in ROWS[:-1]:
        assert torch.equal(found[n], found[200][:n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_product_has_one_order(device, dtype):
    torch.manual_seed(0)
    x = summable(torch.randn(200, 256, device=device, dtype=dtype), 1 / 8)
    weight = summable(torch.randn(2 * 72, 256, device=device, dtype=dtype) / 11, 1 / 128)
    found = {n: few_rows_product(x[:n], weight, fixed_tiling(Tiling(64, 128), n, dtype), gated=True) for n in ROWS}
    for n in ROWS[:-1]:
        assert torch.equal(found[n], found[200][:n])


@pytest.mark.parametrize("splits", [1, 2])
def test_an_fp8_product_has_one_order(device, splits):
    torch.manual_seed(0)
    dtype = DTYPES[1]
    layer = Fp8Linear(torch.randn(96, 640, device=device, dtype=dtype) / 18, None)
    rows = quantize_rows(torch.randn(200, 640, device=device, dtype=dtype))
    if device.type == "cpu":  # powers of two: exact sums, exact scales
        layer.weight.data = torch.sign(layer.weight.float()).to(layer.weight.dtype)
        layer.scale.data = torch.full_like(layer.scale, 0.25)
        rows = Fp8Rows(torch.sign(rows.values.float()).to(rows.values.dtype), torch.full_like(rows.scale, 0.5))
    found = {}
    for n in ROWS:
        some = Fp8Rows(rows.values[:n].contiguous(), rows.scale[:n].contiguous())
        tiling = fixed_tiling(Tiling(64, 256, splits), n, layer.weight.dtype)
        out = few_rows_product(some, layer.weight, tiling, scale=layer.scale, dtype=dtype, whole=n > 64)
        found[n] = added(out, dtype)
    exact = (rows.values.float() @ layer.weight.float().T) * rows.scale[:, None] * layer.scale
    close(found[200], exact, dtype, 2)
    for n in ROWS[:-1]:
        assert torch.equal(found[n], found[200][:n])


def test_fixed_parts_are_where_the_kernel_has_them():
    starts = [0]
    while starts[-1] < 50_000:
        part = len(starts)
        starts.append(_start(part))
    assert starts[:9] == [128 * i for i in range(9)]
    assert starts[8:21] == [1024 + 256 * i for i in range(13)]
    assert starts[20:23] == [4096, 5120, 6144]
    for num_keys in (1, 127, 128, 129, 1024, 1025, 1280, 4096, 4097, 40_960):
        assert num_fixed_parts(num_keys) == sum(start < num_keys for start in starts)


def _start(part: int) -> int:
    return part * 128 if part <= 8 else 1024 + (part - 8) * 256 if part <= 20 else 4096 + (part - 20) * 1024


LENGTHS = [(1100, 5), (3, 4), (200, 16), (0, 2), (130, 1), (4200, 3), (60, 90)]


@pytest.mark.parametrize(
    ("dtype", "groups"),
    [
        (DTYPES[0], True),
        (DTYPES[1], False),
        pytest.param(DTYPES[0], False, marks=pytest.mark.long),
        pytest.param(DTYPES[1], True, marks=pytest.mark.long),
    ],
)
def test_attention_in_fixed_parts(device, monkeypatch, dtype, groups):
    """It is ``PagedSdpa``; alone or among others, however the parts are shared out, each row has the same bits."""
    torch.manual_seed(1)
    page_size, kv_heads, heads, d = 16, 2, 4, 16
    needed = [-(-(start + count) // page_size) for start, count in LENGTHS]
    pages = iter(torch.randperm(sum(needed)).tolist())
    tables = [[next(pages) for _ in range(n)] for n in needed]
    cache = KVCache(1, sum(needed), page_size, kv_heads, d, dtype, device)
    cache.keys.copy_(torch.randn(cache.keys.shape))
    cache.values.copy_(torch.randn(cache.values.shape))
    starts, counts = [s for s, _ in LENGTHS], [c for _, c in LENGTHS]
    total = sum(counts)
    q = torch.randn(total, heads, d, device=device).to(dtype)
    k, v = (torch.randn(total, kv_heads, d, device=device).to(dtype) for _ in range(2))
    first = [0 if row < 2 else 1 for count in counts for row in range(count)]
    own = [0 if row < 2 else 2 for count in counts for row in range(count)]
    visibility = RowVisibility(torch.tensor(first, device=device), torch.tensor(own, device=device)) if groups else None
    expected = PagedSdpa(cache, ExtendBatch(starts, counts, tables, visibility))(0, q, k, v)  # and writes k and v

    def run(chosen: list[int], splits: int) -> torch.Tensor:
        monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
        offsets = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
        rows = torch.cat([torch.arange(int(offsets[s]), int(offsets[s]) + counts[s]) for s in chosen]).to(device)
        seen = None if visibility is None else RowVisibility(visibility.shared[rows], visibility.own_start[rows])
        batch = ExtendBatch([starts[s] for s in chosen], [counts[s] for s in chosen], [tables[s] for s in chosen], seen)
        out = torch.full_like(q[rows], torch.nan)
        for group in plan_paged(cache, batch).groups:
            paged_attention(q[rows], cache.keys[0], cache.values[0], group, out, fixed=True)
        whole = torch.full_like(q, torch.nan)
        whole[rows] = out
        return whole

    everything = list(range(len(LENGTHS)))
    one, several = run(everything, 1), run(everything, 4)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(one.float(), expected.float(), rtol=tolerance, atol=tolerance)
    compared = [(several, slice(None))]
    offsets = [sum(counts[:s]) for s in everything]
    compared += [(run([s], 2), slice(offsets[s], offsets[s] + counts[s])) for s in (1, 2, 5)]
    for other, place in compared:
        if device.type == "cuda":
            assert torch.equal(other[place], one[place])
        else:  # the products are BLAS's, whose order depends on the shape
            torch.testing.assert_close(other[place].float(), one[place].float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("bits", "family"),
    [
        (None, "wedlm-qwen2.5"),
        ("fp8", "wedlm-qwen3"),
        pytest.param(None, "wedlm-qwen3", marks=pytest.mark.long),
        pytest.param("fp8", "wedlm-qwen2.5", marks=pytest.mark.long),
    ],
)
def test_the_deterministic_model_is_the_model(device, bits, family, fp8_anywhere):
    model = our_model(family)
    if model.config.head_dim < 16 and device.type == "cuda":
        pytest.skip("tensor cores take at least 16 numbers")
    packed = pack_for_inference(model.to(device), bits)
    config, num_rows = packed.config, 80
    tokens, positions = torch.arange(num_rows, device=device) % 90, torch.arange(num_rows, device=device)
    shape = (config.num_layers, 10, 8, config.num_kv_heads, config.head_dim, torch.float32, device)
    batch = ExtendBatch([0], [num_rows], [list(range(10))])
    expected = packed(tokens, positions, PagedSdpa(KVCache(*shape), batch))
    fused = FusedTransformer(packed, lambda *_: Tiling(32, 32, splits=2), deterministic=True)
    cache = KVCache(*shape)
    actual = fused(tokens, positions, plan_paged(cache, batch, fixed=True))
    if bits == "fp8" and device.type == "cuda":
        assert (actual - expected).norm() < 0.08 * expected.norm()
    else:
        torch.testing.assert_close(actual, expected, rtol=5e-4, atol=5e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="BLAS's sums depend on their number of rows")
@pytest.mark.parametrize("bits", [None, "fp8"])
def test_rows_of_the_deterministic_model_are_the_same_in_any_company(device, bits):
    model = our_model("wedlm-qwen3", hidden_size=256, intermediate_size=512).to(device, torch.bfloat16)
    fused = FusedTransformer(pack_for_inference(model, bits), deterministic=True)
    config = fused.model.config
    shape = (config.num_layers, 300, 8, config.num_kv_heads, config.head_dim, torch.bfloat16, device)
    found = {}
    for count in (1, 8, 33, 64, 200):  # sequences of one row over 40 keys of a prompt, all alike
        cache = KVCache(*shape)
        prompt = torch.arange(40, device=device)
        fused(prompt, prompt, plan_paged(cache, ExtendBatch([0], [40], [[0, 1, 2, 3, 4]]), fixed=True))
        tables = [[0, 1, 2, 3, 4, 5 + s] for s in range(count)]
        tokens = torch.full((count,), 7, device=device)
        batch = ExtendBatch([40] * count, [1] * count, tables)
        found[count] = fused(tokens, torch.full((count,), 40, device=device), plan_paged(cache, batch, fixed=True))
        assert (found[count] == found[count][:1]).all()
    assert all(torch.equal(out[0], found[1][0]) for out in found.values())


def test_it_is_refused_where_sums_depend_on_the_rows(tmp_path, monkeypatch):
    from tests.engine.tiny_llm import save_tiny

    directory = save_tiny(tmp_path)
    with pytest.raises(ValueError, match="deterministic is True, but steps run as plain torch operations"):
        LLM(directory, device="cpu", deterministic=True)
    monkeypatch.setattr(factory, "eager_reason", lambda *_: None)
    with pytest.raises(ValueError, match="deterministic is True, but the dtype is float32; expected bfloat16"):
        LLM(directory, device="cpu", dtype="float32", deterministic=True)
    llm = LLM(directory, device="cpu", dtype="bfloat16", deterministic=True)
    assert "deterministic Triton kernels" in llm.describe()
    assert llm.engine.runner.eager.model.deterministic
