# SPDX-License-Identifier: Apache-2.0
"""How many replicas are wanted: what is open by target, and what will be."""

import math
import random

import numpy as np
import pytest

from wedlm.deploy.scaling import AHEAD_S, LOOK_BACK_S, LookAhead


def wanted(curve, seconds=120, target=8.0, every=1.0):
    """What is wanted at each second of a curve."""
    rule = LookAhead(target)
    return [rule.wanted(curve(i * every), i * every) for i in range(int(seconds / every))]


def test_a_steady_load_gets_its_target():
    assert set(wanted(lambda _: 24.0)) == {3.0}
    assert set(wanted(lambda _: 0.0)) == {0.0}


def test_a_rise_is_met_before_it_is_there():
    def curve(now):
        return 100.0 + 2 * now

    found = wanted(curve, seconds=100)
    chance = math.sqrt(12 * np.mean([curve(now) for now in range(39, 100)]) * LOOK_BACK_S / 60**3)
    assert found[-1] == pytest.approx(min(3 * curve(99), curve(99) + AHEAD_S * (2 - chance)) / 8)
    assert found[10] == curve(10) / 8  # too little has been seen


def test_the_slope_is_that_of_least_squares():
    rng, rule, seen = random.Random(0), LookAhead(1.0), []
    for _ in range(200):
        now = (seen[-1][0] if seen else 0.0) + rng.uniform(0.5, 3.0)
        num_open = 1000 + 4 * now + rng.gauss(0, 20)
        if not seen or now - seen[-1][0] >= 1.0:
            seen.append((now, num_open))
            found = rule.wanted(num_open, now)
            near = np.array([one for one in seen if now - one[0] <= 60])
            if now > 70:
                slope = np.polyfit(near[:, 0] - now, near[:, 1], 1)[0]
                chance = math.sqrt(12 * near[:, 1].mean() * LOOK_BACK_S / (near[-1, 0] - near[0, 0]) ** 3)
                assert found == pytest.approx(num_open + AHEAD_S * max(0.0, slope - chance))


@pytest.mark.parametrize("seed", range(5))
def test_any_history_stays_within_bounds(seed):
    rng, rule, now = random.Random(seed), LookAhead(4.0), 0.0
    for _ in range(2000):
        now += rng.choice((0.0, 0.1, 1.0, 30.0, 300.0))
        num_open = rng.choice((0.0, 1.0, rng.uniform(0, 50), 1e6))
        assert num_open / 4 <= rule.wanted(num_open, now) <= 3 * num_open / 4
        assert len(rule._seen) <= 61


def test_chance_rises_cost_little():
    """Poisson arrivals at a rate that does not change."""
    rng = np.random.default_rng(0)
    found = wanted(lambda now: float(rng.poisson(256 * 15, 1)[0]) / 15, seconds=600, target=32.0, every=10.0)
    assert np.mean(found) < 8 * 1.15
