# SPDX-License-Identifier: Apache-2.0
"""Backends of training attention against brute force over the rule, and against each other."""

import sys
import types
from collections import defaultdict

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.algorithm.packings import Packing, random_packings, spread
from wedlm.algorithm.dual_stream import RowLabels, RowRanges, dual_stream, row_ranges
from wedlm.algorithm.noise import random_noise, suffix_noise
from wedlm.attention.dual_stream import (
    DenseAttend,
    FlexAttend,
    MagiAttend,
    StreamPlan,
    choose_training_backend,
    flex_block_mask,
    plan_training_attention,
)


def batches() -> list[list[Packing]]:
    """The 500 packings, those of equally many rows together."""
    by_rows = defaultdict(list)
    for packing in random_packings():
        by_rows[packing.num_rows].append(packing)
    return list(by_rows.values())


def labels_of(packings: list[Packing]) -> RowLabels:
    return RowLabels(*(torch.stack(parts) for parts in zip(*(p.stream.labels for p in packings), strict=True)))


def ranges_of(packings: list[Packing]) -> RowRanges:
    return RowRanges(
        *(torch.stack(parts) for parts in zip(*(row_ranges(p.stream.labels) for p in packings), strict=True))
    )


def seen_by(packings: list[Packing]) -> Tensor:
    return torch.stack([packing.seen for packing in packings])


def heads(num_rows: int, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 8, seed: int = 0) -> list[Tensor]:
    """Random q, k, v of T rows."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(num_rows, n, head_dim, generator=rng) for n in (num_heads, num_kv_heads, num_kv_heads)]


def rule_of(mask: BlockMask, num_sequences: int, num_rows: int) -> Tensor:
    """The mask's own function at all pairs, bool [N, R, R]."""
    sequence, row = torch.arange(num_sequences), torch.arange(num_rows)
    return mask.mask_mod(sequence[:, None, None], torch.tensor(0), row[:, None], row)


def tiles(counts: Tensor, indices: Tensor) -> Tensor:
    """Tiles that are listed, bool [N, query tile, key tile]."""
    found = torch.zeros(indices[:, 0].shape, dtype=torch.bool)
    for n, q in torch.cartesian_prod(*map(torch.arange, found.shape[:2])).tolist():
        listed = indices[n, 0, q, : counts[n, 0, q]].tolist()
        assert len(set(listed)) == len(listed)
        found[n, q, listed] = True
    return found


def pairs_of(tile: Tensor, side: int, num_rows: int) -> Tensor:
    return tile.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :num_rows, :num_rows]


@pytest.mark.parametrize("side", [4, 16])
def test_flex_block_mask_equals_brute_force(side):
    """Both what the kernel asks inside a tile and which tiles it skips or takes whole."""
    num_full = num_skipped = 0
    for packings in batches():
        seen, num_rows = seen_by(packings), packings[0].num_rows
        mask = flex_block_mask(ranges_of(packings), side)
        rule = rule_of(mask, len(packings), num_rows)
        assert torch.equal(rule, seen)
        partial = tiles(mask.kv_num_blocks, mask.kv_indices)
        full = tiles(mask.full_kv_num_blocks, mask.full_kv_indices)
        assert not (partial & full).any()
        assert torch.equal(pairs_of(partial, side, num_rows) & rule | pairs_of(full, side, num_rows), seen)
        # No tile is visited in vain.
        beyond = partial.shape[1] * side - num_rows
        used = F.pad(seen, (0, beyond, 0, beyond)).unflatten(2, (-1, side)).unflatten(1, (-1, side))
        assert torch.equal(partial | full, used.any(dim=4).any(dim=2))
        num_full, num_skipped = num_full + int(full.sum()), num_skipped + int((~(partial | full)).sum())
    assert num_full > 20
    assert num_skipped > 500


def test_flex_tiles_are_those_that_torch_finds():
    """The arithmetic on ranges against torch's look at every pair: equal non-empty tiles, and no full tile that is not.
    A tile that the two ranges of a row fill together is left partial here, which is only slower."""
    generator = torch.Generator().manual_seed(0)
    positions, documents = spread([70, 1, 130, 33], padding=6)
    there = documents >= 0
    num_ours = num_theirs = 0
    for block_size in (1, 5, 32, 64):
        noises = (
            random_noise(positions, documents, there, block_size, generator),
            suffix_noise(documents, there, block_size, generator),
        )
        tokens, num_rows = torch.zeros_like(positions), 2 * len(positions) + 7
        labels = [dual_stream(tokens, positions, documents, there, noise, 0, num_rows).labels for noise in noises]
        ranges = RowRanges(*(torch.stack(parts) for parts in zip(*map(row_ranges, labels), strict=True)))
        ours = flex_block_mask(ranges, 16)
        theirs = create_block_mask(ours.mask_mod, 2, None, num_rows, num_rows, device="cpu", BLOCK_SIZE=16)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        our_full, their_full = (tiles(mask.full_kv_num_blocks, mask.full_kv_indices) for mask in (ours, theirs))
        assert not (our_full & ~their_full).any()
        num_ours, num_theirs = num_ours + int(our_full.sum()), num_theirs + int(their_full.sum())
    assert num_ours > 0.9 * num_theirs > 100


def test_flex_tiles_of_the_last_rows_are_those_of_all():
    """Queries that begin at some row, in tiles that begin there."""
    for packings in batches()[::5]:
        ranges, seen, num_rows = ranges_of(packings), seen_by(packings), packings[0].num_rows
        for first in {0, 1, num_rows // 2, num_rows - 1}:
            mask = flex_block_mask(RowRanges(*(part[:, first:] for part in ranges)), 4, first)
            sequence, query, key = torch.arange(len(packings)), torch.arange(num_rows - first), torch.arange(num_rows)
            rule = mask.mask_mod(sequence[:, None, None], torch.tensor(0), query[:, None], key)
            assert torch.equal(rule, seen[:, first:])
            partial = tiles(mask.kv_num_blocks, mask.kv_indices)
            full = tiles(mask.full_kv_num_blocks, mask.full_kv_indices)
            pairs = [one.repeat_interleave(4, 1).repeat_interleave(4, 2) for one in (partial, full)]
            partial, full = (pair[:, : num_rows - first, :num_rows] for pair in pairs)
            assert torch.equal(partial & rule | full, seen[:, first:])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["dense", pytest.param("flex", marks=pytest.mark.long)])
def test_streams_apart_attend_as_one(backend):
    """Clean rows first, then the others over their keys: the same as all rows at once."""
    for packings in batches()[::8]:
        num_rows, num_sequences = packings[0].num_rows, len(packings)
        q, k, v = heads(num_sequences * num_rows)
        expected = expected_attention(q, k, v, seen_by(packings)).unflatten(0, (num_sequences, -1))
        num_clean = min(sum(row.stream == "clean" for row in packing.plain_rows) for packing in packings)
        if num_clean in (0, num_rows):
            continue
        plan = StreamPlan(backend, labels_of(packings), ranges_of(packings), num_clean)
        streams = [[x.unflatten(0, (num_sequences, -1))[:, part].flatten(0, 1) for x in (q, k, v)]
                   for part in (slice(0, num_clean), slice(num_clean, None))]  # fmt: skip
        for attend, own, part in zip(
            plan.layer(), streams, (expected[:, :num_clean], expected[:, num_clean:]), strict=True
        ):
            torch.testing.assert_close(attend(0, *own), part.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_flex_tiles_of_long_sequences():
    """Longer documents than a tile, as in training: inner tiles are full, none of them beyond its document."""
    clean = torch.arange(200)
    block = clean // 32
    document, stream = torch.zeros(400, dtype=torch.long), torch.arange(400) >= 200
    ranges = row_ranges(RowLabels(document, torch.cat((block, block)), stream))
    mask = flex_block_mask(RowRanges(*(part[None] for part in ranges)), 16)
    full = tiles(mask.full_kv_num_blocks, mask.full_kv_indices)[0]
    # Query tile 14 is rows 224..239, positions 24..39: it lies in two blocks, of which the first sees no clean row.
    assert [full[q].nonzero().flatten().tolist() for q in (0, 5, 14, 17)] == [[], [0, 1, 2, 3, 4], [], [0, 1, 2, 3]]


def expected_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the seen keys alone, sequence by sequence, in double; ``seen`` is [N, R, R]."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(share, dim=1) for x in (k, v))
    outputs = []
    for own, *parts in zip(seen, *(x.double().chunk(len(seen)) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", parts[0], parts[1]) / q.shape[2] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~own, -torch.inf).softmax(-1), parts[2]))
    return torch.cat(outputs).float()


def test_dense_attend_equals_attention_over_the_seen():
    for packings in batches()[::4]:
        q, k, v = heads(len(packings) * packings[0].num_rows)
        attend = plan_training_attention("dense", labels_of(packings), ranges_of(packings))
        assert isinstance(attend, DenseAttend)
        torch.testing.assert_close(attend(0, q, k, v), expected_attention(q, k, v, seen_by(packings)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attend_equals_dense_attend_on_the_cpu():
    """Forward alone, and the mask's function alone: what torch runs here, uncompiled, asks for no tiles."""
    for packings in batches()[::8]:
        q, k, v = heads(len(packings) * packings[0].num_rows)
        dense, flex = (
            plan_training_attention(name, labels_of(packings), ranges_of(packings)) for name in ("dense", "flex")
        )
        assert isinstance(flex, FlexAttend)
        torch.testing.assert_close(flex(0, q, k, v), dense(0, q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of is its own
def test_compiled_flex_attend_equals_dense_attend_on_cuda(record_property):
    """Forward and gradients, 9 query and 3 key heads of 64, a number of rows that is no multiple of a tile."""
    row = torch.arange(700)
    document = row // 270
    position = row - document * 270
    block = torch.cumsum(torch.diff(document * 100 + position // 16, prepend=torch.tensor([0])) != 0, 0)
    padding = torch.full((37,), -1)
    stream = torch.arange(1437) >= 700
    stream[1400:] = False
    labels = RowLabels(torch.cat((document, document, padding)), torch.cat((block, block, padding + 1)), stream)
    ranges = [part.repeat(2, 1).cuda() for part in row_ranges(labels)]
    batch = RowLabels(*(part.repeat(2, 1).cuda() for part in labels))
    results = []
    for name in ("dense", "flex"):
        q, k, v = (x.cuda().requires_grad_() for x in heads(2 * 1437, 9, 3, 64))
        attend = plan_training_attention(name, batch, RowRanges(*ranges))
        call = torch.compile(attend) if name == "flex" else attend
        out = call(0, q, k, v)
        out.backward(heads(2 * 1437, 9, 3, 64, seed=1)[0].cuda())
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for name, dense, flex in zip(("out", "q", "k", "v"), *results, strict=True):
        record_property(f"largest difference of {name}", f"{(dense - flex).abs().max():.1e}")
        torch.testing.assert_close(flex, dense, atol=1e-4, rtol=1e-3)


@pytest.fixture
def fake_magi(monkeypatch) -> None:
    """The package's function, slow: query and key ranges, causal ones aligned at their last row and key."""

    def flex_flash_attn_func(q, k, v, q_ranges, k_ranges, attn_type_map):
        assert q_ranges.dtype == k_ranges.dtype == attn_type_map.dtype == torch.int32
        times = torch.zeros(len(q), len(k), dtype=torch.int)
        for (q0, q1), (k0, k1), kind in zip(q_ranges.tolist(), k_ranges.tolist(), attn_type_map.tolist(), strict=True):
            full = torch.ones(q1 - q0, k1 - k0, dtype=torch.int)
            times[q0:q1, k0:k1] += {0: full, 1: full.tril((k1 - k0) - (q1 - q0))}[kind]
        assert times.max() == 1  # a pair that two ranges cover would count twice
        return expected_attention(q, k, v, times[None].bool()), times

    package = types.ModuleType("magi_attention")
    functional = types.ModuleType("magi_attention.functional")
    functional.flex_flash_attn_func = flex_flash_attn_func
    monkeypatch.setitem(sys.modules, "magi_attention", package)
    monkeypatch.setitem(sys.modules, "magi_attention.functional", functional)


@pytest.mark.usefixtures("fake_magi")
def test_magi_ranges_equal_brute_force():
    """Over flattened rows: sequences of a batch must not see each other."""
    for packings in batches():
        group = packings[:3]
        attend = plan_training_attention("magi", labels_of(group), ranges_of(group))
        assert isinstance(attend, MagiAttend)
        q, k, v = heads(len(group) * group[0].num_rows)
        *_, times = attend.attention(q, k, v, attend.query_ranges, attend.key_ranges, attend.kinds)
        assert torch.equal(times.bool(), torch.block_diag(*(p.seen for p in group)).bool())
        torch.testing.assert_close(attend(0, q, k, v), expected_attention(q, k, v, seen_by(group)))


def test_the_backend_is_chosen_or_refused(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_training_backend("auto", cpu) == choose_training_backend("dense", cuda) == "dense"
    assert choose_training_backend("auto", cuda) == choose_training_backend("flex", cuda) == "flex"
    for name in ("flex", "magi"):
        with pytest.raises(ValueError, match=f"attention_backend is '{name}' on device cpu; expected dense there"):
            choose_training_backend(name, cpu)
    with pytest.raises(ValueError, match="attention_backend is 'xla'; expected auto or one of dense, flex, magi"):
        choose_training_backend("xla", cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package magi_attention is not installed"):
        choose_training_backend("magi", cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_training_backend("magi", cuda) == "magi"
