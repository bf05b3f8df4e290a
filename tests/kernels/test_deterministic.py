# SPDX-License-Identifier: Apache-2.0
"""Deterministic steps: no bit of a row's result depends on how many rows there are. On a GPU real numbers are compared
bit for bit; in the interpreter, whose products are BLAS's, numbers whose sums are exact in any order."""

from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from tests.kernels.comparing import DTYPES, close, summable
from tests.model.masked_adapters import random_lora
from tests.model.tiny import our_model
from wedlm import LLM
from wedlm.attention.base import ExtendBatch, KVCache, RowVisibility
from wedlm.attention.paged import plan_paged
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine import factory
from wedlm.kernels import attention, matmul
from wedlm.kernels.attention import num_fixed_parts, paged_attention
from wedlm.kernels.fp8 import Fp8Rows, quantize_rows
from wedlm.kernels.launch import Processors, processors
from wedlm.kernels.matmul import APART_ROWS, MAX_ROWS, Tiling, few_rows_product, fixed_tiling, tiling_for
from wedlm.kernels.norm import silu_mul
from wedlm.model.inference import triton_transformer
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.inference.quantization import Fp8Linear
from wedlm.model.inference.triton_transformer import _NOTHING, FusedTransformer, _Beside
from wedlm.model.lora.masked_rows import attach_masked_lora
from wedlm.model.lora.row_factors import AdaptedLinear

ROWS = [1, 33, 64, 100, 200, 300]  # the last is all; each tiling for many rows, and parts apart and added


def added(out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Parts of a product as the kernels that read them add them up: one after the other, then rounded."""
    if out.ndim == 2:
        return out
    total = out[0]
    for part in out[1:]:
        total = total + part
    return total.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "splits"),
    [
        (DTYPES[0], 1),
        (DTYPES[1], 2),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((DTYPES[0], 3), (DTYPES[1], 1), (DTYPES[0], 2), (DTYPES[1], 3))
        ),
    ],
)
def test_a_product_has_one_order_at_any_number_of_rows(device, dtype, splits):
    torch.manual_seed(0)
    x = summable(torch.randn(ROWS[-1], 640, device=device, dtype=dtype), 1 / 8)
    weight = summable(torch.randn(100, 640, device=device, dtype=dtype) / 18, 1 / 128)
    found = {}
    for n in ROWS:
        out = few_rows_product(x[:n], weight, fixed_tiling(Tiling(64, 128, splits), n, dtype), whole=n > APART_ROWS)
        assert out.ndim == (3 if splits > 1 and n <= APART_ROWS else 2)
        found[n] = added(out, dtype)
    close(found[ROWS[-1]], x.float() @ weight.float().T, dtype)
    for n in ROWS[:-1]:
        assert torch.equal(found[n], found[ROWS[-1]][:n])


@pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.long)])
def test_a_gated_product_has_one_order(device, dtype):
    """Gated by the product's kernel, or by the next one where descriptors copy the tiles."""
    torch.manual_seed(0)
    x = summable(torch.randn(ROWS[-1], 256, device=device, dtype=dtype), 1 / 8)
    weight = summable(torch.randn(2 * 72, 256, device=device, dtype=dtype) / 11, 1 / 128)
    found = {}
    for n in ROWS:
        tiling = fixed_tiling(Tiling(64, 128), n, dtype)
        assert tiling.descriptors == (n > MAX_ROWS and dtype.itemsize == 2)
        if tiling.descriptors:
            found[n] = silu_mul(few_rows_product(x[:n], weight, tiling))
        else:
            found[n] = few_rows_product(x[:n], weight, tiling, gated=True)
    for n in ROWS[:-1]:
        assert torch.equal(found[n], found[ROWS[-1]][:n])


@pytest.mark.parametrize(
    ("splits", "depth"), [(2, 128), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 256), (2, 256)))]
)
def test_an_fp8_product_has_one_order(device, splits, depth):
    dtype = DTYPES[1]
    rows, layer = fp8_numbers(device, ROWS[-1], 640, 96)
    found = {}
    for n in ROWS:
        some = Fp8Rows(rows.values[:n].contiguous(), rows.scale[:n].contiguous())
        tiling = fixed_tiling(Tiling(64, depth, splits), n, layer.weight.dtype)
        out = few_rows_product(some, layer.weight, tiling, scale=layer.scale, dtype=dtype, whole=n > APART_ROWS)
        found[n] = added(out, dtype)
    exact = (rows.values.float() @ layer.weight.float().T) * rows.scale[:, None] * layer.scale
    close(found[ROWS[-1]], exact, dtype, 2)
    for n in ROWS[:-1]:
        assert torch.equal(found[n], found[ROWS[-1]][:n])


def fp8_numbers(device: torch.device, num_rows: int, depth: int, size: int) -> tuple[Fp8Rows, Fp8Linear]:
    """Rows and a layer; in the interpreter powers of two, whose sums and scales are exact."""
    torch.manual_seed(0)
    layer = Fp8Linear(torch.randn(size, depth, device=device, dtype=DTYPES[1]) / 18, None)
    rows = quantize_rows(torch.randn(num_rows, depth, device=device, dtype=DTYPES[1]))
    if device.type == "cpu":
        layer.weight.data = torch.sign(layer.weight.float()).to(layer.weight.dtype)
        layer.scale.data = torch.full_like(layer.scale, 0.25)
        rows = Fp8Rows(torch.sign(rows.values.float()).to(rows.values.dtype), torch.full_like(rows.scale, 0.5))
    return rows, layer


SMALL = Tiling(32, 64, rows=32)  # 70 rows, 100 outputs and 600 numbers a row are multiples of none of its sizes


@pytest.mark.parametrize(
    ("dtype", "splits", "whole"),
    [
        (DTYPES[0], 1, False),
        (DTYPES[1], 3, True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((DTYPES[1], 2, False), (DTYPES[1], 1, False), (DTYPES[0], 2, False), (DTYPES[0], 3, True))
        ),
    ],
)
def test_descriptors_copy_what_pointers_read(device, dtype, splits, whole):
    torch.manual_seed(0)
    for depth in (600, 598):  # rows of the second begin at addresses that descriptors do not take
        x = summable(torch.randn(70, depth, device=device, dtype=dtype), 1 / 8)
        weight = summable(torch.randn(100, depth, device=device, dtype=dtype) / 18, 1 / 128)
        found = [
            few_rows_product(x, weight, replace(SMALL, splits=splits, descriptors=descriptors), whole=whole)
            for descriptors in (False, True)
        ]
        assert torch.equal(*found)
        close(added(found[1], dtype), x.float() @ weight.float().T, dtype)


@pytest.mark.parametrize(
    ("splits", "whole"), [(3, True), *(pytest.param(n, False, marks=pytest.mark.long) for n in (1, 2))]
)
def test_descriptors_copy_fp8(device, splits, whole):
    rows, layer = fp8_numbers(device, 70, 608, 112)
    found = [
        few_rows_product(
            rows, layer.weight, replace(SMALL, splits=splits, descriptors=descriptors), scale=layer.scale,
            dtype=DTYPES[1], whole=whole,
        )
        for descriptors in (False, True)
    ]  # fmt: skip
    assert torch.equal(*found)
    exact = (rows.values.float() @ layer.weight.float().T) * rows.scale[:, None] * layer.scale
    close(added(found[1], DTYPES[1]), exact, DTYPES[1], 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are captured on a GPU")
@pytest.mark.parametrize("num_rows", [128, 300])
def test_captured_descriptors_read_what_is_there_at_replay(device, num_rows):
    torch.manual_seed(0)
    inputs = torch.randn(3, num_rows, 1024, device=device, dtype=torch.bfloat16)
    weight = torch.randn(512, 1024, device=device, dtype=torch.bfloat16)
    tiling = fixed_tiling(tiling_for(512, 1024), num_rows)
    assert tiling.descriptors
    x = inputs[0].clone()
    expected = [few_rows_product(own, weight, tiling, whole=True) for own in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        between = x * 1  # memory of the graph, which the descriptor describes
        out = few_rows_product(between, weight, tiling, whole=True)
    for own, right in zip(inputs, expected, strict=True):
        x.copy_(own)
        graph.replay()
        assert torch.equal(out, right)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="real numbers and sizes")
@pytest.mark.long
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("size", "depth"), [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (1000, 1040)])
def test_products_of_the_sizes_of_8b_have_one_order(device, fp8, size, depth):
    torch.manual_seed(0)
    rows = quantize_rows(torch.randn(2048, depth, device=device, dtype=torch.bfloat16))
    layer = Fp8Linear(torch.randn(size // 16 * 16, depth, device=device, dtype=torch.bfloat16), None)
    inputs, weight = rows.values, layer.weight
    if not fp8:
        inputs, weight = inputs.to(torch.bfloat16), weight.to(torch.bfloat16)
    found = {}
    for n in (16, 64, 65, 128, 129, 256, 257, 1000, 2048):
        tiling = fixed_tiling(tiling_for(*weight.shape, weight.dtype), n, weight.dtype)
        x = Fp8Rows(inputs[:n], rows.scale[:n]) if fp8 else inputs[:n]
        scale = layer.scale if fp8 else None
        for whole in {n > APART_ROWS, True}:
            out = few_rows_product(x, weight, tiling, scale=scale, dtype=torch.bfloat16, whole=whole)
            found[n, whole] = added(out, torch.bfloat16)
    for (n, _), out in found.items():
        assert torch.equal(out, found[2048, True][:n])


@pytest.mark.parametrize("bits", [None, "fp8"])
def test_what_adapters_add_has_one_order(device, monkeypatch, bits):
    """Few rows leave the parts of K apart, many do not; the adapter's own sum must meet the same part in both."""
    monkeypatch.setattr(triton_transformer, "APART_ROWS", 4)
    torch.manual_seed(0)
    dtype = DTYPES[1]
    model = our_model("wedlm-qwen3").to(device, dtype)
    fused = FusedTransformer(pack_for_inference(model), lambda *_: Tiling(32, 256, splits=2), deterministic=True)
    x = summable(torch.randn(8, 512, device=device, dtype=dtype), 1 / 8)
    base: nn.Module = nn.Linear(512, 48, bias=False, device=device, dtype=dtype)
    base.weight.data = summable(base.weight.data * 30, 1 / 128)
    if bits == "fp8":
        base = Fp8Linear(base.weight.data, None)
    layer = AdaptedLinear(base, [48], summable(torch.randn(1, 16, 512, device=device, dtype=dtype), 1 / 8))
    layer.b = [summable(torch.randn(48, 16, device=device, dtype=dtype) / 50, 1 / 128)]
    others = torch.zeros(8, 16, dtype=torch.bool, device=device)
    few, many = (added(fused._product(x[:n], layer, _Beside(None, others[:n])), dtype) for n in (4, 8))
    assert torch.equal(few, many[:4])
    assert not torch.equal(many, added(fused._product(x, layer, _NOTHING), dtype))


def test_cards_without_descriptors_keep_pointers(monkeypatch):
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        for n in (100, 200, 300):
            with_them, without = (fixed_tiling(Tiling(splits=2), n, dtype, has) for has in (True, False))
            assert not without.descriptors
            assert with_them.splits == without.splits == 2
    assert processors(torch.device("cpu")).shared_bytes > 99 * 1024
    monkeypatch.setattr(matmul, "processors", lambda _: Processors(80, 99 * 1024))
    taken = []
    monkeypatch.setattr(matmul, "_rows_times_weight", _Recorder(taken))
    few_rows_product(torch.zeros(300, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16), without)
    assert taken[0]["STAGES"] * (taken[0]["BLOCK_M"] + taken[0]["BLOCK_N"]) * taken[0]["BLOCK_K"] * 2 < 99 * 1024


class _Recorder:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self, taken: list[dict]) -> None:
        self.taken = taken

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *_, **options: self.taken.append(options)


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
        pytest.param(DTYPES[1], False, marks=pytest.mark.long),
        pytest.param(DTYPES[0], False, marks=pytest.mark.long),
        pytest.param(DTYPES[1], True, marks=pytest.mark.long),
    ],
)
def test_attention_in_fixed_parts(device, monkeypatch, dtype, groups):
    """It is ``PagedSdpa``; alone or among others, however the parts are shared out, each row has the same bits."""
    torch.manual_seed(1)
    page_size, kv_heads, heads, d = 16, 1, 2, 16
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
        pytest.param("fp8", "wedlm-qwen3", marks=pytest.mark.long),
        pytest.param(None, "wedlm-qwen3", marks=pytest.mark.long),
        pytest.param("fp8", "wedlm-qwen2.5", marks=pytest.mark.long),
    ],
)
def test_the_deterministic_model_is_the_model(device, bits, family, fp8_anywhere):
    model = our_model(family, num_hidden_layers=2)
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
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", [None, "fp8"])
def test_rows_of_the_deterministic_model_are_the_same_in_any_company(device, bits, masked):
    model = our_model("wedlm-qwen3", hidden_size=256, intermediate_size=512).to(device, torch.bfloat16)
    if masked:
        attach_masked_lora(model, random_lora(model), torch.linspace(-1, 1, model.config.hidden_size))
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
        positions, flags = torch.full((count,), 40, device=device), torch.full((count,), masked, device=device)
        found[count] = fused(tokens, positions, plan_paged(cache, batch, fixed=True), masked=flags)
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
