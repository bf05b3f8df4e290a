# SPDX-License-Identifier: Apache-2.0
"""The whole native forward: equal on every instruction set, independent of company, and near torch."""

import numpy as np
import pytest
import torch

from tests.native.conftest import PATHS
from tests.native.shapes import FAMILIES, copy_of, parts_of, random_cache, random_rows, tiny_model
from wedlm.attention.sdpa import PagedSdpa
from wedlm.native import NativeAttend
from wedlm.native.weights import native_from_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hides", [False, True], ids=["causal", "hidden rows"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_float_weights_are_torchs(family, hides, dtype):
    """With weights as they are, only the order of summing differs: logits and the written cache agree to rounding."""
    model = tiny_model(1, **FAMILIES[family])
    native, rng = native_from_torch(model, None, threads=1), np.random.default_rng(2)
    for seed in range(4):
        cache = random_cache(seed, model.config, 24, 8, torch.float32)
        rows = random_rows(rng, model.config.vocab_size, 24, 8, hides)
        if dtype == torch.bfloat16:  # values that the narrow type holds exactly; what is written is rounded
            cache.keys.copy_(cache.keys.bfloat16())
            cache.values.copy_(cache.values.bfloat16())
        ours = copy_of(cache)
        if dtype == torch.bfloat16:
            ours.keys, ours.values = ours.keys.bfloat16(), ours.values.bfloat16()

        expected = model(rows.tokens, rows.positions, PagedSdpa(cache, rows.batch))
        logits = native(rows.tokens, rows.positions, NativeAttend(ours, rows.batch))

        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        assert (logits - expected).norm() <= tolerance * expected.norm()
        torch.testing.assert_close(ours.keys.float(), cache.keys, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.values.float(), cache.values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hides", [False, True], ids=["causal", "hidden rows"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_cache_in_eight_bits_is_torchs(family, hides):
    """Keys and values are rounded by head, once. A number on the edge between two may go to either; all else is equal
    to rounding, what is read as well as what is written."""
    model = tiny_model(1, **FAMILIES[family])
    native, rng = native_from_torch(model, None, threads=1), np.random.default_rng(2)
    flips = numbers = 0
    for seed in range(4):
        cache = random_cache(seed, model.config, 24, 8, torch.int8)
        rows = random_rows(rng, model.config.vocab_size, 24, 8, hides)
        ours, before = copy_of(cache), copy_of(cache)
        expected = model(rows.tokens, rows.positions, PagedSdpa(cache, rows.batch))
        logits = native(rows.tokens, rows.positions, NativeAttend(ours, rows.batch))
        assert (logits - expected).norm() <= 5e-3 * expected.norm()
        for mine, its, old in zip(parts_of(ours), parts_of(cache), parts_of(before), strict=True):
            if mine.is_floating_point():
                torch.testing.assert_close(mine, its, rtol=1e-2, atol=1e-5)
                continue
            assert (mine.int() - its.int()).abs().max() <= 1
            flips += int((mine != its).sum())
            numbers += int((its != old).sum())
    assert flips < 0.01 * numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("path", PATHS[:-1])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_the_portable_paths_bit_for_bit(path, family, dtype):
    model, rng = tiny_model(3, **FAMILIES[family]), np.random.default_rng(4)
    twin, native = (native_from_torch(model, "int8", path=name, threads=1) for name in ("portable", path))
    for seed in range(4):
        cache = random_cache(seed, model.config, 24, 8, dtype)
        rows = random_rows(rng, model.config.vocab_size, 24, 8, hides=bool(seed % 2))
        other = copy_of(cache)

        expected = twin(rows.tokens, rows.positions, NativeAttend(cache, rows.batch))
        logits = native(rows.tokens, rows.positions, NativeAttend(other, rows.batch))

        assert torch.equal(logits, expected)
        assert all(map(torch.equal, parts_of(other), parts_of(cache)))
