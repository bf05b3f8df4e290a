# SPDX-License-Identifier: Apache-2.0
"""An adapter of masked rows on the native forward: torch's numbers, the scalar path's bits, and observed rows' own."""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.native.conftest import PATHS
from tests.native.shapes import FAMILIES, Rows, adapted_model, copy_of, random_cache, random_rows, tiny_model
from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.attention.sdpa import PagedSdpa
from wedlm.native import NativeAttend, NativeError, NativeTransformer
from wedlm.native.weights import native_from_torch

PAGE = 8


def random_masks(rng: np.random.Generator, rows: Rows) -> Tensor:
    return torch.from_numpy(rng.random(len(rows.tokens)) < rng.choice([0.2, 0.5, 0.9]))


def run(native: NativeTransformer, rows: Rows, cache: KVCache, masked: Tensor | None) -> Tensor:
    return native(rows.tokens, rows.positions, NativeAttend(cache, rows.batch), masked=masked)


@pytest.mark.parametrize("layers", ["proj.weight", "k_proj.weight", "up_proj.weight", "down_proj.weight"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_beside_float_weights_it_is_torchs(family, layers):
    model = adapted_model(1, layers, **FAMILIES[family])
    native, rng = native_from_torch(model, None, threads=1), np.random.default_rng(2)
    for seed in range(3):
        cache = random_cache(seed, model.config, 24, PAGE, torch.float32)
        rows, ours = random_rows(rng, model.config.vocab_size, 24, PAGE, hides=True), copy_of(cache)
        masked = random_masks(rng, rows)
        expected = model(rows.tokens, rows.positions, PagedSdpa(cache, rows.batch), None, masked)
        logits = run(native, rows, ours, masked if seed else masked.nonzero()[:, 0])
        assert (logits - expected).norm() <= 1e-5 * expected.norm()
        torch.testing.assert_close(ours.keys, cache.keys, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_in_eight_bits_it_is_near_torchs():
    """What eight bits move masked rows by is what they move the others by."""
    model = adapted_model(1, hidden_size=256, intermediate_size=512)
    native = native_from_torch(model, "int8", threads=1)
    cache, rows = random_cache(1, model.config, 24, PAGE, torch.float32), 40
    tokens, positions, masked = torch.arange(rows), torch.arange(rows), torch.arange(rows) % 2 == 1
    batch = ExtendBatch([0], [rows], [list(range(5))])
    expected = model(tokens, positions, PagedSdpa(copy_of(cache), batch), None, masked)
    error = native(tokens, positions, NativeAttend(cache, batch), masked=masked) - expected
    relative = error.norm(dim=1) / expected.norm(dim=1)
    assert relative[masked].median() < 2 * relative[~masked].median() < 0.2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_observed_rows_are_the_bases_bit_for_bit(path, family):
    """If no masked row is seen by them, as in decoding; and on every instruction set the scalar one's bits."""
    model, base = adapted_model(3, **FAMILIES[family]), tiny_model(3, **FAMILIES[family])
    native, twin, plain = (
        native_from_torch(one, "int8", path=name, threads=1)
        for one, name in ((model, path), (model, "portable"), (base, path))
    )
    rng = np.random.default_rng(4)
    for seed in range(4):
        cache = random_cache(seed, model.config, 24, PAGE, torch.float32)
        rows = random_rows(rng, model.config.vocab_size, 24, PAGE, hides=bool(seed % 2))
        masked = _last_rows(rng, rows)
        other, without = copy_of(cache), copy_of(cache)
        logits, expected = run(native, rows, cache, masked), run(twin, rows, other, masked)
        assert torch.equal(logits, expected)
        assert torch.equal(cache.keys, other.keys)
        assert torch.equal(cache.values, other.values)
        found = run(plain, rows, without, None)
        if not seed % 2:  # plain order: observed rows come before masked ones
            assert torch.equal(logits[~masked], found[~masked])
            assert not (logits[masked] == found[masked]).all(dim=1).any()
        assert torch.equal(run(native, rows, copy_of(without), None), run(plain, rows, copy_of(without), None))


def _last_rows(rng: np.random.Generator, rows: Rows) -> Tensor:
    """Of each sequence, the last some."""
    return torch.cat([torch.arange(count) >= int(rng.integers(0, count + 1)) for count in rows.batch.counts])


def test_a_masked_row_alone_and_in_company():
    """One sequence of 5 rows, 3 of them masked: by itself, among others, on 1 and 2 threads, its rows one by one."""
    model, rng = adapted_model(5), np.random.default_rng(6)
    natives = [native_from_torch(model, "int8", threads=min(n, os.cpu_count() or 1)) for n in (1, 2)]
    tokens, positions = torch.tensor([7, 9, 100, 100, 100]), torch.tensor([20, 21, 22, 23, 24])
    masked, pages = torch.tensor([0, 0, 1, 1, 1]).bool(), [5, 0, 9, 3]
    cache = random_cache(2, model.config, 60, PAGE, torch.float32)
    alone = natives[0](tokens, positions, NativeAttend(copy_of(cache), ExtendBatch([20], [5], [pages])), masked=masked)
    one_by_one = copy_of(cache)
    for row in range(5):
        part, batch = slice(row, row + 1), ExtendBatch([20 + row], [1], [pages])
        found = natives[0](tokens[part], positions[part], NativeAttend(one_by_one, batch), masked=masked[part])
        assert torch.equal(found[0], alone[row])
    for _ in range(20):
        others = int(rng.integers(1, 12))
        counts, starts = rng.integers(1, 4, others).tolist(), rng.integers(0, 20, others).tolist()
        tables = [[10 + 4 * i, 11 + 4 * i, 12 + 4 * i] for i in range(others)]
        at = int(rng.integers(0, others + 1))
        before, total = sum(counts[:at]), sum(counts)
        batch = ExtendBatch(
            [*starts[:at], 20, *starts[at:]], [*counts[:at], 5, *counts[at:]], [*tables[:at], pages, *tables[at:]]
        )
        company = [torch.from_numpy(rng.integers(0, high, total)) for high in (131, 131, 2)]
        rows = [
            torch.cat((c[:before], own, c[before:]))
            for c, own in zip(company, (tokens, positions, masked), strict=True)
        ]
        for native in natives:
            attend = NativeAttend(copy_of(cache), batch)
            together = native(rows[0], rows[1], attend, masked=rows[2].bool())
            assert torch.equal(together[before : before + 5], alone)


def test_more_rows_than_run_at_once():
    model = adapted_model(5)
    native = native_from_torch(model, "int8", threads=1)
    tokens, masked = torch.arange(300) % 131, torch.arange(300) % 7 > 2
    batch = ExtendBatch([0], [300], [list(range(38))])
    cache, halves = (random_cache(2, model.config, 38, PAGE, torch.float32) for _ in range(2))
    expected = native(tokens, torch.arange(300), NativeAttend(cache, batch), masked=masked)
    for part, start in ((slice(0, 130), 0), (slice(130, 300), 130)):
        batch = ExtendBatch([start], [part.stop - start], [list(range(38))])
        found = native(tokens[part], torch.arange(300)[part], NativeAttend(halves, batch), masked=masked[part])
        assert torch.equal(found, expected[part])


def test_bad_masks_and_matrices():
    model = adapted_model(5)
    native = native_from_torch(model, "int8", threads=1)
    cache = random_cache(2, model.config, 4, PAGE, torch.float32)
    attend = NativeAttend(cache, ExtendBatch([0], [2], [[0]]))
    with pytest.raises(NativeError, match="masked is of 3 rows; expected 2"):
        native(torch.tensor([1, 2]), torch.arange(2), attend, masked=torch.ones(3).bool())
    empty = np.zeros((0, 64), dtype=np.int8), np.zeros(0, dtype=np.float32)
    rows = np.zeros((1, 64), dtype=np.int8), np.ones(1, dtype=np.float32)
    with pytest.raises(NativeError, match="the rank is 0; expected at least 1"):
        native.set_factors(1, 0, 0, 100, empty, empty)
    with pytest.raises(NativeError, match="there is no weight 8 in layer 0"):
        native.set_factors(1, 0, 8, 100, empty, empty)
    with pytest.raises(NativeError, match="factors have the number -1; expected 0 to"):
        native.set_factors(-1, 0, 0, 100, rows, rows)
    with pytest.raises(NativeError, match="a vector has 3 entries; expected"):
        native.set_start(1, np.zeros(3, dtype=np.float32))
    with pytest.raises(NativeError, match="adapters are of 3 rows; expected 2"):
        native(torch.tensor([1, 2]), torch.arange(2), attend, adapters_T=torch.ones(3).long())
    with pytest.raises(NativeError, match="a row's factors are -2; expected no negative number"):
        native(torch.tensor([1, 2]), torch.arange(2), attend, adapters_T=-torch.ones(2).long())
