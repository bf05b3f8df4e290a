# SPDX-License-Identifier: Apache-2.0
"""Keys and values in FP8: the kernels that write and read them against ``PagedSdpa``, and engines that hold them."""

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from tests.engine.tiny_llm import PROMPTS, save_tiny
from tests.kernels.comparing import DTYPES, same_rows
from tests.kernels.graph_engine import LENGTH, MASK, PAGE_SIZE, PAGES, few_rows_beside_chunks, outcomes
from tests.kernels.random_batches import random_batch
from tests.model.tiny import our_model
from wedlm import LLM, SamplingParams
from wedlm.attention.base import FP8, KVCache
from wedlm.attention.paged import plan_paged
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine.factory import Blueprint
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.kernels import attention
from wedlm.kernels.attention import paged_attention
from wedlm.kernels.fp8 import Fp8Rows
from wedlm.kernels.rope import norm_rope_write
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.inference.triton_transformer import FusedTransformer


def test_its_memory():
    cache = KVCache(3, 5, 4, 2, 16, FP8, torch.device("cpu"))
    scales = cache.scales(1)
    assert scales is not None
    assert scales[0].shape == (20, 2)
    total = sum(part.nbytes for part in (cache.keys, cache.values, cache.key_scale, cache.value_scale))
    assert total == 20 * KVCache.bytes_per_token(3, 2, 16, FP8)
    assert KVCache.bytes_per_token(36, 8, 128, FP8) < 0.52 * KVCache.bytes_per_token(36, 8, 128, torch.bfloat16)
    cache.keys.view(torch.uint8).fill_(7)
    scales[0].fill_(1)
    cache.clear()
    assert not cache.keys.float().any()
    assert not scales[0].any()
    assert KVCache(1, 1, 4, 2, 16, torch.float32, torch.device("cpu")).scales(0) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_rounded_as_they_are_written(device, dtype, normed):
    torch.manual_seed(0)
    num_rows, heads, kv_heads, d = 5, 6, 2, 16
    qkv = (torch.randn(num_rows, (heads + 2 * kv_heads) * d, device=device) * 20).to(dtype)
    angles = torch.randn(num_rows, d // 2, device=device)
    cos, sin = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    norms = (*torch.randn(2, d, device=device).to(dtype), 1e-6) if normed else None
    slots = torch.tensor([7, 3, 39, 0, 12], device=device)
    plain, rounded = (KVCache(1, 10, 4, kv_heads, d, kind, device) for kind in (dtype, FP8))
    q, other = (
        norm_rope_write(qkv, cos, sin, slots, norms, cache.keys[0], cache.values[0], scales=cache.scales(0))
        for cache in (plain, rounded)
    )
    assert torch.equal(q, other)
    scales = rounded.scales(0)
    assert scales is not None
    for exact, values, scale in zip((plain.keys, plain.values), (rounded.keys, rounded.values), scales, strict=True):
        written = Fp8Rows(values[0, slots].reshape(-1, d), scale[slots].reshape(-1))
        same_rows(written, exact[0, slots].reshape(-1, d))
        others = torch.ones(40, dtype=torch.bool)
        others[slots.cpu()] = False
        assert not values[0, others.to(device)].float().any()
        assert not scale[others.to(device)].any()


@pytest.mark.parametrize("dtype", [pytest.param(DTYPES[0], marks=pytest.mark.long), DTYPES[1]])
@pytest.mark.parametrize("groups", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize(("splits", "fixed"), [(1, False), (4, False), (1, True), (4, True)])
@pytest.mark.parametrize("lengths", [[(130, 5)], [(3, 4), (200, 16), (0, 2), (64, 1), (70, 40)]], ids=str)
def test_attention_reads_them(device, monkeypatch, dtype, groups, splits, fixed, lengths):
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    for name in ("SHORT", "MIDDLE"):
        monkeypatch.setattr(attention, name, replace(getattr(attention, name), halves=splits == 1))
    rng = random.Random(repr((lengths, groups)))
    torch.manual_seed(1)
    page_size, kv_heads, heads, d = 8, 2, 6, 16
    batch, num_pages = random_batch(rng, lengths, page_size, device, groups)
    cache = KVCache(1, num_pages, page_size, kv_heads, d, FP8, device)
    cache.keys.copy_((torch.randn(cache.keys.shape) * 100).to(FP8))
    cache.values.copy_((torch.randn(cache.values.shape) * 100).to(FP8))
    for scale in cache.scales(0):
        scale.copy_(torch.rand(scale.shape) / 50)
    total = sum(batch.counts)
    q = torch.randn(total, heads, d, device=device).to(dtype)
    k, v = (torch.randn(total, kv_heads, d, device=device).to(dtype) for _ in range(2))
    expected = PagedSdpa(cache, batch)(0, q, k, v)  # and writes k and v
    actual = torch.full_like(q, torch.nan)
    for rows in plan_paged(cache, batch).groups:
        paged_attention(q, cache.keys[0], cache.values[0], rows, actual, fixed, cache.scales(0))
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_the_fused_model_is_the_model(device):
    torch.manual_seed(2)
    packed = pack_for_inference(our_model("wedlm-qwen3").to(device))
    config, lengths = packed.config, [(0, 3), (9, 1), (20, 7)]
    batch, num_pages = random_batch(random.Random(1), lengths, 8, device, True)
    total = sum(batch.counts)
    tokens = torch.randint(0, config.vocab_size, (total,), device=device)
    positions = torch.cat([torch.arange(s, s + c) for s, c in lengths]).to(device)
    shape = (config.num_layers, num_pages, 8, config.num_kv_heads, config.head_dim)
    plain, one, other = (KVCache(*shape, kind, device) for kind in (torch.float32, FP8, FP8))
    exact = packed(tokens, positions, PagedSdpa(plain, batch))
    expected = packed(tokens, positions, PagedSdpa(one, batch))
    actual = FusedTransformer(packed)(tokens, positions, plan_paged(other, batch))
    error = (expected - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1
    assert (actual - expected).norm() < error / 4 * exact.norm()  # a key on the edge may round to its neighbour


# Padding rows are whatever lay in memory, and the interpreter reports what a GPU ignores.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN slice):RuntimeWarning")
@pytest.mark.long
def test_device_steps_give_the_plain_engines_text(device, monkeypatch):
    few_rows_beside_chunks(device, monkeypatch)
    requests = [
        ([3, 4, 5, 6 + i], SamplingParams(decoding=name, max_tokens=6, wedlm_window_size=4, temperature=0.0))
        for i, name in enumerate(("autoregressive", "verified", "streaming"))
    ]
    found = []
    for graphs in (False, True):
        model = pack_for_inference(our_model("wedlm-qwen3", num_hidden_layers=2).to(device))
        options = EngineOptions(max_num_seqs=4, max_num_batched_tokens=64)
        config = EngineConfig(model.config.vocab_size, MASK, (5,), LENGTH, options)
        sizes = (PAGES, PAGE_SIZE)
        blueprint = Blueprint(model, model if graphs else None, model.config, FP8, device, config, *sizes, None)
        engine = blueprint.build()
        assert engine.runner.cache.keys.dtype == FP8
        found.append(outcomes(engine, requests)[0])
        assert blueprint.rebuild(engine).runner.cache.keys.dtype == FP8
    assert found[0] == found[1]


def test_an_engine_with_them(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path)
    with pytest.raises(ValueError, match="kv_cache_dtype is 'fp8' and the device is cpu; expected an NVIDIA GPU"):
        LLM(directory, device="cpu", kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int4'; expected auto, fp8 or int8"):
        LLM(directory, device="cpu", kv_cache_dtype="int4")
    monkeypatch.setattr("wedlm.engine.factory.check_fp8_cache", lambda _: None)
    llm = LLM(directory, device="cpu", kv_cache_dtype="fp8", dtype="float32")
    assert "cpu; weights: float32; activations: float32; cache: fp8, " in llm.describe()
    texts = {
        name: [one.token_ids for one in llm.generate(PROMPTS, SamplingParams(max_tokens=16, decoding=name))]
        for name in ("autoregressive", "verified", "auto")
    }
    assert texts["verified"] == texts["auto"] == texts["autoregressive"]
