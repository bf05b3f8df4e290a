# SPDX-License-Identifier: Apache-2.0
"""Adapters chosen row by row on the native forward: torch's numbers, the scalar path's bits, and no other row's."""

import os

import numpy as np
import pytest
import torch

from tests.native.conftest import PATHS
from tests.native.shapes import FAMILIES, adapted_model, copy_of, parts_of, random_cache, random_rows, tiny_model
from wedlm.attention.base import ExtendBatch
from wedlm.attention.sdpa import PagedSdpa
from wedlm.model import Transformer, pack_for_inference
from wedlm.model.inference.adapter_bank import AdapterBank
from wedlm.model.lora.row_factors import RowFactors
from wedlm.native import NativeAttend
from wedlm.native.weights import NativeAdapters, native_from_torch

PAGE, SLOTS = 8, 5


def factors_of(model: Transformer, seed: int) -> RowFactors:
    """Of mixed ranks; some layers have none; for all rows, for masked ones, or for both, by ``seed``."""
    rng = torch.Generator().manual_seed(seed)
    names = [name for name, _ in model.named_parameters() if name.startswith("model.layers.") and "proj" in name]
    parts: list[dict] = []
    for _ in range(2):
        matrices = {}
        for name in names:
            weight = model.get_parameter(name)
            rank = int(torch.randint(0, 40, (1,), generator=rng))
            if weight.dim() == 2 and rank:
                a = torch.randn(rank, weight.shape[1], generator=rng) / weight.shape[1] ** 0.5
                matrices[name] = a, torch.randn(len(weight), rank, generator=rng) / rank**0.5
        parts.append(matrices)
    start = torch.randn(model.config.hidden_size, generator=rng)
    return (RowFactors(every=parts[0]), RowFactors({}, parts[1], start), RowFactors(*parts, start))[seed % 3]


@pytest.mark.parametrize("own", [False, True], ids=["plain", "with factors of its own"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_beside_float_weights_it_is_torchs(family, own):
    """The bank of a packed model is its twin; ``own``: the model has an adapter of masked rows for all, too. Adapters
    come and go, and one takes the place of another."""
    make = adapted_model if own else tiny_model
    model, native = make(1, **FAMILIES[family]), native_from_torch(make(1, **FAMILIES[family]), None, threads=1)
    factors = [factors_of(tiny_model(1, **FAMILIES[family]), seed) for seed in range(SLOTS)]
    stores = AdapterBank(pack_for_inference(model), SLOTS), NativeAdapters(native)
    for slot, one in enumerate(factors, start=1):
        for store in stores:
            store.put(slot, one)
    rng = np.random.default_rng(2)
    for seed in range(4):
        if seed == 2:
            for store in stores:
                for slot in (2, 4, 1):
                    store.drop(slot)
                store.put(4, factors[0])
                store.put(1, factors[2])
        cache = random_cache(seed, model.config, 24, PAGE, torch.float32)
        rows, ours = random_rows(rng, model.config.vocab_size, 24, PAGE, hides=True), copy_of(cache)
        taken = [slot for slot in range(SLOTS + 1) if seed < 2 or slot != 2]
        adapters = torch.from_numpy(rng.choice(taken, len(rows.tokens)))
        masked = torch.from_numpy(rng.random(len(rows.tokens)) < 0.5)
        expected = model(rows.tokens, rows.positions, PagedSdpa(cache, rows.batch), None, masked, adapters)
        part = masked if seed else masked.nonzero()[:, 0]
        logits = native(rows.tokens, rows.positions, NativeAttend(ours, rows.batch), None, part, adapters)
        assert (logits - expected).norm() <= 1e-5 * expected.norm()
        torch.testing.assert_close(ours.keys, cache.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_in_company_is_the_row_alone(path):
    """In eight bits, bit for bit: rows of a sequence with any adapters, by themselves, and among rows with others on 1
    and 2 threads; on every instruction set the scalar one's bits."""
    model = tiny_model(3)
    threads = {1, min(2, os.cpu_count() or 1)}
    natives = [native_from_torch(model, "int8", path=path, threads=count) for count in sorted(threads)]
    natives.append(native_from_torch(model, "int8", path="portable", threads=1))
    for native in natives:
        for slot in range(1, SLOTS + 1):
            NativeAdapters(native).put(slot, factors_of(model, slot))
    rng, pages = np.random.default_rng(5), [5, 0, 9]
    cache = random_cache(2, model.config, 40, PAGE, torch.float32)
    for _ in range(12):
        own = [torch.from_numpy(rng.integers(0, high, 4)) for high in (131, SLOTS + 1, 2)]
        positions = torch.arange(12, 16)
        attend = NativeAttend(copy_of(cache), ExtendBatch([12], [4], [pages]))
        alone = natives[0](own[0], positions, attend, None, own[2].bool(), own[1])
        count = int(rng.integers(1, 30))
        other = [torch.from_numpy(rng.integers(0, high, count)) for high in (131, SLOTS + 1, 2)]
        batch = ExtendBatch([0, 12], [count, 4], [[10, 11, 12, 13], pages])
        rows = [torch.cat(both) for both in zip(other, own, strict=True)]
        for native in natives:
            attend = NativeAttend(copy_of(cache), batch)
            where = torch.cat((torch.arange(count), positions))
            together = native(rows[0], where, attend, None, rows[2].bool(), rows[1])
            assert torch.equal(together[count:], alone)


def test_dropped_factors_leave_the_base():
    """Rows of a dropped adapter, and of one that never was, are the base's; and the memory is counted."""
    model = tiny_model(3)
    native, plain = (native_from_torch(model, "int8", threads=1) for _ in range(2))
    empty = native.num_bytes
    NativeAdapters(native).put(3, factors_of(model, 2))
    assert native.num_bytes > empty
    tokens, adapters = torch.arange(8), torch.tensor([3, 0, 3, 5, 1, 3, 0, 0])
    batch = ExtendBatch([0], [8], [[0]])
    caches = [random_cache(1, model.config, 4, PAGE, torch.float32) for _ in range(3)]
    masked = torch.arange(8) % 2 == 1
    expected = plain(tokens, tokens, NativeAttend(caches[0], batch), None, masked)
    found = native(tokens, tokens, NativeAttend(caches[1], batch), None, masked, adapters)
    assert not torch.equal(found, expected)
    NativeAdapters(native).drop(3)
    assert native.num_bytes == empty
    found = native(tokens, tokens, NativeAttend(caches[2], batch), None, masked, adapters)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(parts_of(caches[2]), parts_of(caches[0]), strict=True))
