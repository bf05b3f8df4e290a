# SPDX-License-Identifier: Apache-2.0
"""PagedSdpa over ragged batches and shuffled pages against dense attention, one row at a time."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.attention.sdpa import _MAX_ROWS_PADDED, CausalAttend, PagedSdpa

CPU, HEAD_DIM, KV_HEADS, LAYERS = torch.device("cpu"), 4, 2, 2


def dense(q: Tensor, k: Tensor, v: Tensor, start: int, block: int = 1) -> Tensor:
    """Row i of ``q`` [R, H, D] sees keys 0 .. start + i of ``k`` and ``v`` [J, K, D], or to the end of that
    key's block; an explicit mask, in double."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(share, dim=1) for x in (k, v))
    scores = torch.einsum("rhd,jhd->hrj", q.double(), k) / q.shape[2] ** 0.5
    mask = torch.arange(len(k))[None, :] // block <= (start + torch.arange(len(q))[:, None]) // block
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hrj,jhd->rhd", weights, v).float()


def new_cache(num_pages: int, page_size: int, fill: float = 0.0) -> KVCache:
    cache = KVCache(LAYERS, num_pages, page_size, KV_HEADS, HEAD_DIM, torch.float32, CPU)
    cache.keys.fill_(fill)
    cache.values.fill_(fill)
    return cache


def make_batch(rng: random.Random, lengths: list[tuple[int, int]], page_size: int, shuffle: bool = True):
    """(batch, pages of the cache): pages of all sequences in random order, a few left over, a few reserved ahead."""
    needed = [-(-(start + count) // page_size) + rng.randint(0, 2) for start, count in lengths]
    pages = list(range(sum(needed) + 3))
    if shuffle:
        rng.shuffle(pages)
    tables = [[pages.pop(0) for _ in range(n)] for n in needed]
    starts, counts = [start for start, _ in lengths], [count for _, count in lengths]
    return ExtendBatch(starts, counts, tables), sum(needed) + 3


def slots_of(table: list[int], page_size: int, start: int, stop: int) -> list[int]:
    return [table[i // page_size] * page_size + i % page_size for i in range(start, stop)]


def check(batch: ExtendBatch, num_pages: int, page_size: int, share: int) -> None:
    """Outputs of both layers equal dense attention, new keys lie in their slots, and no other slot was written.

    Every slot that holds no cached key is nan beforehand, so that whoever reads one is found out.
    """
    rng = torch.Generator().manual_seed(1)
    cache = new_cache(num_pages, page_size, fill=torch.nan)
    histories = []
    for table, start in zip(batch.pages, batch.starts, strict=True):
        k, v = (torch.randn(LAYERS, start, KV_HEADS, HEAD_DIM, generator=rng) for _ in range(2))
        cache.keys[:, slots_of(table, page_size, 0, start)] = k
        cache.values[:, slots_of(table, page_size, 0, start)] = v
        histories.append((k, v))
    before = cache.keys.clone(), cache.values.clone()
    attend, total = PagedSdpa(cache, batch), sum(batch.counts)
    for layer in range(LAYERS):
        q = torch.randn(total, KV_HEADS * share, HEAD_DIM, generator=rng)
        k, v = (torch.randn(total, KV_HEADS, HEAD_DIM, generator=rng) for _ in range(2))
        out = attend(layer, q, k, v)
        assert out.shape == q.shape
        offset = 0
        for s, (start, count) in enumerate(zip(batch.starts, batch.counts, strict=True)):
            rows = slice(offset, offset + count)
            offset += count
            if count:
                keys, values = (
                    torch.cat([histories[s][0][layer], k[rows]]),
                    torch.cat([histories[s][1][layer], v[rows]]),
                )
                torch.testing.assert_close(
                    out[rows], dense(q[rows], keys, values, start, batch.block_length), atol=2e-5, rtol=1e-4
                )
            written = slots_of(batch.pages[s], page_size, start, start + count)
            before[0][layer, written], before[1][layer, written] = k[rows], v[rows]
    assert torch.equal(cache.keys.nan_to_num(7.0), before[0].nan_to_num(7.0))
    assert torch.equal(cache.values.nan_to_num(7.0), before[1].nan_to_num(7.0))


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize("share", [1, 3, 4])
def test_ragged_batches(page_size, share):
    """Decoding windows, single rows and long chunks together; counts on both sides of the padded group's limit."""
    for seed in range(4):
        rng = random.Random(seed)
        lengths = [(rng.choice([0, 1, 15, 16, 17, 60, 300]), rng.randint(1, 100)) for _ in range(rng.randint(2, 6))]
        lengths += [(rng.randint(0, 40), 1), (5, _MAX_ROWS_PADDED), (3, _MAX_ROWS_PADDED + 1)]
        check(*make_batch(rng, lengths, page_size), page_size, share)


@pytest.mark.parametrize("block", [2, 4, 7, 300])
def test_rows_of_one_block_see_each_other(block):
    """Starts in the middle of a block, as after a reused page, and chunks cut inside one; the last may be short."""
    rng = random.Random(block)
    lengths = [(0, 8), (3, 5), (4, 4), (6, 9), (8, 1), (5, 100), (0, 600)]
    batch, num_pages = make_batch(rng, lengths, 4)
    check(replace(batch, block_length=block), num_pages, 4, 2)
    for start, count in lengths:
        batch, num_pages = make_batch(rng, [(start, count)], 4)
        check(replace(batch, block_length=block), num_pages, 4, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70)), min_size=1, max_size=6),
    st.sampled_from([1, 2, 16, 256]),
    st.sampled_from([1, 3, 4]),
    st.randoms(use_true_random=False),
)
def test_any_batch(lengths, page_size, share, rng):
    """Sequences without rows included, as long as the step has any."""
    if sum(count for _, count in lengths) == 0:
        lengths = [*lengths, (0, 1)]
    check(*make_batch(rng, lengths, page_size), page_size, share)


@pytest.mark.parametrize("count", [1, 2, _MAX_ROWS_PADDED, _MAX_ROWS_PADDED + 1, 100])
@pytest.mark.parametrize("start", [0, 1, 50])
@pytest.mark.parametrize("shuffle", [False, True], ids=["contiguous", "shuffled"])
def test_one_sequence(start, count, shuffle):
    """In contiguous pages its keys are a slice of the cache; a single row needs no mask."""
    batch, num_pages = make_batch(random.Random(start), [(start, count)], 4, shuffle)
    attend = PagedSdpa(new_cache(num_pages, 4), batch)
    assert isinstance(attend.groups[0].slots, slice) is (not shuffle or start + count <= 4)
    for share in (1, 3):
        check(batch, num_pages, 4, share)


def test_descending_pages_are_not_contiguous():
    check(ExtendBatch([6], [2], [[3, 2, 1, 0]]), 5, 2, 1)
    check(ExtendBatch([6], [2], [[0, 2, 4, 3]]), 5, 2, 1)


def test_sequences_that_share_pages():
    """The prefix cache gives several sequences the same leading pages."""
    batch = ExtendBatch([4, 4], [3, 2], [[2, 0, 1, 5], [2, 0, 4]])
    cache, rng = new_cache(6, 2), torch.Generator().manual_seed(0)
    k0, v0 = (torch.randn(4, KV_HEADS, HEAD_DIM, generator=rng) for _ in range(2))
    cache.keys[0, slots_of([2, 0], 2, 0, 4)], cache.values[0, slots_of([2, 0], 2, 0, 4)] = k0, v0
    q, k, v = (torch.randn(5, KV_HEADS, HEAD_DIM, generator=rng) for _ in range(3))
    out = PagedSdpa(cache, batch)(0, q, k, v)
    for rows in (slice(0, 3), slice(3, 5)):
        expected = dense(q[rows], torch.cat([k0, k[rows]]), torch.cat([v0, v[rows]]), 4)
        torch.testing.assert_close(out[rows], expected, atol=2e-5, rtol=1e-4)


def test_a_chunked_prompt_equals_a_whole_one():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(90, heads, HEAD_DIM, generator=rng) for heads in (6, 2, 2))
    whole = CausalAttend()(0, q, k, v)
    cache, start = new_cache(30, 4), 0
    pages = random.Random(0).sample(range(30), 30)
    for count in (1, 30, 7, 52):
        rows = slice(start, start + count)
        out = PagedSdpa(cache, ExtendBatch([start], [count], [pages]))(1, q[rows], k[rows], v[rows])
        torch.testing.assert_close(out, whole[rows], atol=2e-5, rtol=1e-4)
        start += count


@pytest.mark.parametrize("share", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 33, 100])
def test_causal_attend(share, count):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(count, heads, HEAD_DIM, generator=rng) for heads in (KV_HEADS * share, KV_HEADS, KV_HEADS))
    torch.testing.assert_close(CausalAttend()(0, q, k, v), dense(q, k, v, 0), atol=2e-5, rtol=1e-4)


def test_cache_sizes():
    cache = KVCache(3, 5, 4, 2, 8, torch.bfloat16, CPU)
    assert cache.keys.shape == cache.values.shape == (3, 20, 2, 8)
    assert cache.keys.dtype == torch.bfloat16
    assert not cache.keys.any()
    assert not cache.values.any()
    total_bytes = 20 * KVCache.bytes_per_token(3, 2, 8, torch.bfloat16)
    assert total_bytes == cache.keys.nbytes + cache.values.nbytes
    cache.keys[1, 3] = 1.0  # its memory is its own and may be written
    assert cache.keys.sum() == 16
    assert not cache.values.any()
