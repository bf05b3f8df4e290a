# SPDX-License-Identifier: Apache-2.0
"""The noise of sampling is Gumbel, independent of its neighbours, and a function of seed, position and token alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from wedlm.algorithm.sample import gumbel_noise

EULER = 0.5772156649015329


def noise(seeds: int, positions: int, tokens: int, first_seed: int = 0) -> np.ndarray:
    """Noise [seeds, positions, tokens] as float64."""
    seed, position = torch.meshgrid(
        torch.arange(first_seed, first_seed + seeds), torch.arange(positions), indexing="ij"
    )
    flat = gumbel_noise(seed.flatten(), position.flatten(), torch.arange(tokens))
    return flat.view(seeds, positions, tokens).double().numpy()


@pytest.mark.parametrize(
    "shape", [(200, 1, 5000), (1, 5000, 200), (5000, 200, 1)], ids=["tokens", "positions", "seeds"]
)
def test_noise_is_gumbel(shape):
    """A million draws along each of the three axes."""
    x = noise(*shape).flatten()
    assert np.isfinite(x).all()
    assert abs(x.mean() - EULER) < 4 * math.pi / math.sqrt(6 * x.size)
    assert abs(x.var() / (math.pi**2 / 6) - 1) < 4 * math.sqrt(4.4 / x.size)  # its kurtosis is 5.4
    assert stats.kstest(x, stats.gumbel_r.cdf).pvalue > 1e-3


def test_the_tail_of_the_noise():
    """Rare tokens are chosen by the upper tail: it must not be cut off or coarse."""
    x = noise(20, 40, 5000).flatten()
    for quantile in (1e-3, 1e-4, 1e-5):
        limit = stats.gumbel_r.isf(quantile)
        assert stats.binomtest(int((x > limit).sum()), x.size, quantile).pvalue > 1e-3
    top = np.sort(x)[-1000:]
    assert len(np.unique(top)) > 995
    assert x.max() < 22.3


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "tokens"])
@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbours_are_independent(axis, lag):
    """Of seeds, positions and tokens: neither the noise nor which of two is the larger goes together."""
    x = noise(130, 130, 130)
    a = np.take(x, range(x.shape[axis] - lag), axis).flatten()
    b = np.take(x, range(lag, x.shape[axis]), axis).flatten()
    for one, other in [(a, b), (a, np.abs(b - b.mean())), (np.exp(-a), np.exp(-b))]:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / math.sqrt(a.size)
    quartiles = stats.gumbel_r.ppf([0.25, 0.5, 0.75])
    table = np.histogram2d(np.digitize(a, quartiles), np.digitize(b, quartiles), bins=4)[0]
    assert stats.chisquare(table.flatten()).pvalue > 1e-4


def test_which_token_wins_at_neighbouring_positions():
    """What sampling uses: the token with the largest noise, at positions p and p + 1, and of seeds s and s + 1."""
    winner = noise(500, 200, 4).argmax(-1)
    for pair in [(winner[:, :-1], winner[:, 1:]), (winner[:-1], winner[1:])]:
        table = np.histogram2d(pair[0].flatten(), pair[1].flatten(), bins=4)[0]
        assert stats.chisquare(table.flatten()).pvalue > 1e-3


def test_rows_are_no_shifted_copies():
    x = noise(1, 400, 64)[0]
    # Some 20 pairs share a float32 by chance; a row that is another one, shifted by one, would share 63 values.
    assert len(np.unique(x)) > x.size - 60


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=6))
def test_noise_depends_on_seed_position_and_token_alone(keys):
    seed, position = (torch.tensor(part) for part in zip(*keys, strict=True))
    together = gumbel_noise(seed, position, torch.arange(40))
    for i in range(len(keys)):
        assert torch.equal(gumbel_noise(seed[i : i + 1], position[i : i + 1], torch.arange(40))[0], together[i])
    some = torch.tensor([39, 3, 17])
    assert torch.equal(gumbel_noise(seed, position, some), together[:, some])
    assert torch.isfinite(together).all()
