# SPDX-License-Identifier: Apache-2.0
"""A prompt's long chunk in parts: the joining against ``PagedSdpa``; on a Hopper GPU, cuDNN's attention against our
kernel and float32."""

import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from tests.kernels.random_batches import random_batch
from wedlm.attention import cudnn, paged
from wedlm.attention.base import FP8, KVCache
from wedlm.attention.cudnn import LongChunk, cut_chunk, takes_chunk
from wedlm.attention.paged import PagedAttend, plan_paged
from wedlm.attention.sdpa import PagedSdpa
from wedlm.kernels.attention import paged_attention
from wedlm.kernels.join import join

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def plain_attention(q, k, v, causal):
    """What cuDNN computes, in plain operations."""
    share = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(share, 1) for part in (k, v))
    scores = torch.einsum("rhd,nhd->hrn", q, k) / q.shape[2] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hrn,nhd->rhd", scores.softmax(-1), v), scores.logsumexp(-1)


def attend(plan: PagedAttend, q, keys, values):
    """One layer's outputs, its keys written already."""
    out = torch.full_like(q, torch.nan)
    for rows in plan.groups:
        paged_attention(q, keys, values, rows, out, plan.fixed)
    for chunk in plan.long_chunks:
        chunk(q, keys, values, out)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_shapes(seed):
    rng, shapes = random.Random(seed), set()
    for _ in range(3000):
        start, count = rng.choice([0, 2048, rng.randrange(40_000)]), rng.randint(cudnn.MIN_ROWS, 2048)
        cut = cut_chunk(start, count)
        assert cut.early + sum(cut.parts) == start
        assert cut.early < 512
        assert set(cut.parts) <= {512, 1024, 1536, 2048, 3072, 4096, 6144, 8192}
        assert len(cut.parts) <= 3 + start // 8192
        for rounded, real in ((cut.causal, cut.early + count), (cut.rows, count)):
            assert 0 <= rounded - real < 256
        shapes |= {(cut.causal, None), *((cut.rows, part) for part in cut.parts)}
    assert len(shapes) <= 47  # each is a plan of cuDNN's
    assert cut_chunk(7168, 2048).parts == (6144, 1024)
    assert cut_chunk(0, 8192).causal == 8192
    assert cut_chunk(0, 8193).causal == 9216


@pytest.mark.parametrize("seed", range(8))
def test_parts_are_joined(device, monkeypatch, seed):
    """Chunks of any length behind any number of keys, beside sequences that stay with our kernel."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    monkeypatch.setattr(cudnn, "_ROW_STEP", rng.choice([1, 4]))
    monkeypatch.setattr(cudnn, "_SMALLEST_PART", rng.choice([1, 4, 8]))
    monkeypatch.setattr(cudnn, "_LARGEST_PART", rng.choice([8, 32]))
    monkeypatch.setattr(cudnn, "cudnn_attention", plain_attention)
    monkeypatch.setattr(paged, "takes_chunk", lambda _, count: count >= 10)
    page_size, kv_heads, share, d = rng.choice([1, 4, 6]), rng.choice([1, 2]), rng.choice([1, 3, 5]), 16
    lengths = [(rng.choice([0, 3, rng.randrange(60)]), rng.randint(10, 20)), (rng.randrange(9), rng.randint(1, 9))]
    lengths += [(rng.randrange(20), 10)] * rng.randrange(2)
    rng.shuffle(lengths)
    batch, num_pages = random_batch(rng, lengths, page_size, device, False)
    if rng.random() < 0.5:  # pages side by side
        batch = replace(batch, pages=[sorted(pages) for pages in batch.pages])
    cache = KVCache(1, num_pages, page_size, kv_heads, d, torch.float32, device)
    for part in (cache.keys, cache.values):
        part.fill_(torch.nan)  # whoever reads a slot of no sequence is found out
        for pages, start in zip(batch.pages, batch.starts, strict=True):
            for i in range(start):
                part[0, pages[i // page_size] * page_size + i % page_size] = torch.randn(kv_heads, d)
    q = torch.randn(sum(batch.counts), kv_heads * share, d, device=device) * 2
    k, v = (torch.randn(sum(batch.counts), kv_heads, d, device=device) for _ in range(2))
    expected = PagedSdpa(cache, batch)(0, q, k, v)  # and writes k and v
    plan = plan_paged(cache, batch)
    assert len(plan.long_chunks) == len(lengths) - 1
    assert sum(len(rows.num_rows) for rows in plan.groups) == 1
    torch.testing.assert_close(attend(plan, q, cache.keys[0], cache.values[0]), expected, rtol=2e-5, atol=2e-5)


def test_join_of_logarithms_far_apart(device):
    """Neither overflows, and a part that weighs nothing changes nothing."""
    torch.manual_seed(0)
    out, part = torch.randn(2, 3, 9, 16, device=device)
    lse, part_lse = torch.full((9, 3), 300.0, device=device), torch.full((9, 3), -300.0, device=device)
    into = torch.empty_like(out)
    join(out, lse.clone(), part, part_lse, into)
    assert torch.equal(into, out)
    join(out, part_lse, part, lse, into)
    assert torch.equal(into, part)
    assert torch.equal(part_lse, lse)


def test_which_chunks(device, monkeypatch):
    monkeypatch.setattr(cudnn, "_is_faster", lambda _: True)

    def cache(dtype: torch.dtype, head_dim: int = 16) -> KVCache:
        return KVCache(1, 200, 16, 1, head_dim, dtype, device)

    half = cache(torch.bfloat16)
    assert takes_chunk(half, 1024)
    assert not takes_chunk(half, 1023)
    for other in (cache(torch.float32), cache(FP8), cache(torch.bfloat16, 256)):
        assert not takes_chunk(other, 1024)
    batch, _ = random_batch(random.Random(0), [(5, 1024), (0, 40)], 16, device, True)
    plain = replace(batch, visibility=None)
    assert len(plan_paged(half, plain).long_chunks) == 1
    assert not plan_paged(half, plain, fixed=True).long_chunks
    assert not plan_paged(half, batch).long_chunks


@pytest.mark.skipif(ON_HOPPER, reason="a Hopper GPU takes long chunks")
def test_other_devices_keep_our_kernel(device):
    assert not takes_chunk(KVCache(1, 1, 16, 1, 16, torch.bfloat16, device), 4096)


@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "d", "start", "count"),
    [
        (torch.bfloat16, 32, 8, 128, 0, 1024),
        (torch.bfloat16, 32, 8, 128, 2048, 2048),
        (torch.bfloat16, 32, 8, 128, 7700, 1500),
        (torch.bfloat16, 9, 3, 64, 600, 1100),
        (torch.float16, 16, 16, 128, 17, 2050),
        (torch.bfloat16, 14, 2, 64, 1040, 4100),
    ],
)
def test_cudnn_is_our_kernel(dtype, heads, kv_heads, d, start, count):
    device = torch.device("cuda")
    torch.manual_seed(0)
    batch, num_pages = random_batch(random.Random(0), [(start, count), (30, 5)], 16, device, False)
    caches = [KVCache(1, num_pages, 16, kv_heads, d, kind, device) for kind in (dtype, torch.float32)]
    for name in ("keys", "values"):
        history = torch.randn(caches[0].keys.shape, device=device).to(dtype)
        for cache in caches:
            getattr(cache, name).copy_(history)
    q = (torch.randn(count + 5, heads, d, device=device) * 3).to(dtype)
    k, v = (torch.randn(count + 5, kv_heads, d, device=device).to(dtype) for _ in range(2))
    exact = PagedSdpa(caches[1], batch)(0, q.float(), k.float(), v.float())
    half = caches[0]
    PagedSdpa(half, batch)(0, q, k, v)  # writes k and v
    plan, ours = plan_paged(half, batch), plan_paged(half, batch, fixed=True)
    assert len(plan.long_chunks) == 1
    assert isinstance(plan.long_chunks[0], LongChunk)
    for way in (plan, ours):
        actual = attend(way, q, half.keys[0], half.values[0]).float()
        torch.testing.assert_close(actual, exact, rtol=3e-2, atol=3e-2)
        assert (actual - exact).norm() < 6e-3 * exact.norm()
