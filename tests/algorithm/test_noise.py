# SPDX-License-Identifier: Apache-2.0
"""Noise: what may be masked, how much of it, and how the draws are distributed."""

import pytest
import torch
from scipy import stats

from tests.algorithm.packings import random_packing
from wedlm.algorithm.noise import mix_noise, random_noise, suffix_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_document(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(positions, documents, trainable)"""
    index = torch.arange(length)
    return index, torch.zeros_like(index), torch.ones(length, dtype=torch.bool)


@pytest.mark.parametrize("seed", range(60))
def test_random_noise_masks_its_share_of_each_block(seed):
    p = random_packing(seed)
    noise = random_noise(p.positions, p.documents, p.trainable, p.block_size, p.generator)
    assert not (noise.masked & ~p.trainable).any()
    assert ((noise.ratio > 0) & (noise.ratio <= 1)).all()
    for block in noise.block.unique():
        inside = noise.block == block
        assert len(p.documents[inside].unique()) == 1
        if p.documents[inside][0] >= 0:
            assert len((p.positions[inside] // p.block_size).unique()) == 1
        (ratio,) = noise.ratio[inside].unique().tolist()
        count = int(p.trainable[inside].sum())
        # γ is kept in float32, so only a product beside a half may round the other way.
        assert int(noise.masked[inside].sum()) in {round(ratio * count - 1e-5), round(ratio * count + 1e-5)}
    assert (noise.block.diff() >= 0).all()


def test_one_ratio_for_a_document():
    positions, _, trainable = one_document(4000)
    documents = positions // 1000
    noise = random_noise(positions % 1000, documents, trainable, 8, generator(), ratio_per_block=False)
    assert [len(noise.ratio[documents == d].unique()) for d in range(4)] == [1] * 4
    assert len(noise.ratio.unique()) == 4


def test_ratios_and_places_are_uniform():
    positions, documents, trainable = one_document(8 * 6000)
    noise = random_noise(positions, documents, trainable, 8, generator())
    ratios = noise.ratio[::8].numpy()
    assert stats.kstest(ratios, "uniform").pvalue > 1e-3
    masked = noise.masked.view(-1, 8)
    counts = masked.sum(dim=0).numpy()
    assert stats.chisquare(counts).pvalue > 1e-3
    # Without replacement and independent of place: blocks of the same count have all pairs alike.
    twos = masked[masked.sum(dim=1) == 2].double()
    pairs = (twos.T @ twos)[*torch.triu_indices(8, 8, 1)].numpy()
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_the_generator_decides():
    p = random_packing(3)
    first, again, other = (
        random_noise(p.positions, p.documents, p.trainable, 4, generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first.masked, again.masked)
    assert torch.equal(first.ratio, again.ratio)
    assert not torch.equal(first.ratio, other.ratio)
    first, again, other = (suffix_noise(*one_document(50)[1:], 4, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.block, again.block)
    assert not torch.equal(first.block, other.block)


@pytest.mark.parametrize("seed", range(60))
def test_suffix_noise_cuts_runs_into_blocks(seed):
    p = random_packing(seed)
    noise = suffix_noise(p.documents, p.trainable, p.block_size, p.generator)
    assert torch.equal(noise.masked, p.trainable)
    assert (noise.ratio == 1).all()
    assert (noise.block.diff() >= 0).all()
    for block in noise.block.unique():
        inside = noise.block == block
        assert 1 <= int(inside.sum()) <= p.block_size
        assert len(p.documents[inside].unique()) == len(p.trainable[inside].unique()) == 1


def test_lengths_of_suffix_blocks_are_uniform():
    _, documents, trainable = one_document(60_000)
    noise = suffix_noise(documents, trainable, 8, generator())
    lengths = noise.block.bincount()[:-1]  # the last may be cut short
    assert stats.chisquare(lengths.bincount(minlength=9)[1:].numpy()).pvalue > 1e-3
    # A first block is a full draw, too: runs of equal length begin alike.
    documents = torch.arange(60_000) // 30
    noise = suffix_noise(documents, trainable, 8, generator(1))
    first = torch.stack([noise.block.view(-1, 30)[:, i] == noise.block.view(-1, 30)[:, 0] for i in range(8)]).sum(0)
    assert stats.chisquare(first.bincount(minlength=9)[1:].numpy()).pvalue > 1e-3


def test_a_block_of_one_position_is_masked_by_a_ratio_over_a_half():
    positions, documents, trainable = one_document(500)
    noise = random_noise(positions, documents, trainable, 1, generator())
    assert torch.equal(noise.masked, noise.ratio > 0.5)


@pytest.mark.parametrize("seed", range(60))
def test_mixed_noise_is_one_of_both_in_each_document(seed):
    p = random_packing(seed)
    first = random_noise(p.positions, p.documents, p.trainable, p.block_size, p.generator)
    second = suffix_noise(p.documents, p.trainable, p.block_size, p.generator)
    use_second = p.documents % 2 == 1
    mixed = mix_noise(p.documents, first, second, use_second)
    assert mixed.block.diff().ge(0).all()
    for document in p.documents.unique():
        inside = p.documents == document
        chosen = second if document % 2 == 1 else first
        assert torch.equal(mixed.masked[inside], chosen.masked[inside])
        assert torch.equal(mixed.ratio[inside], chosen.ratio[inside])
        assert torch.equal(mixed.block[inside].diff() != 0, chosen.block[inside].diff() != 0)
        assert not torch.isin(mixed.block[inside], mixed.block[~inside]).any()
