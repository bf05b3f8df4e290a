# SPDX-License-Identifier: Apache-2.0
"""Auto decoding, simulated: windows whose drafts are right at given rates, steps that cost what was measured."""

import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from tests.engine.measured_costs import CPU, GPU, NATIVE
from wedlm.algorithm.params import verified_rows
from wedlm.engine.adaptive.draft_budget import ROW_BUDGETS, Budget, DraftBudget, expected_step, longest_draft
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.admission import decode_params
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import SamplingParams

NEVER, DEMO, OFTEN = (0.0,) * 4, (0.78, 0.72, 0.64, 0.6), (0.97, 0.97, 0.97, 0.97)


def simulate(table, padded, rates, num_windows, auto, num_steps=3000, seed=0, drafting=0.0) -> float:
    """Tokens a second; ``auto`` chooses, or a fixed budget. The layout of groups is that of ``verify``.

    ``drafting``: seconds that steps with masked rows take beside their forward. Windows that are alike are drawn
    together: 128 of them are mostly in three or four states.
    """
    rng, costs = np.random.default_rng(seed), StepCosts(table, padded)
    fixed = Budget.of(auto) if isinstance(auto, int) else auto
    budget = auto.budget if isinstance(auto, DraftBudget) else fixed
    windows = Counter({(0, min(budget.rows, 5), 0): num_windows})  # by drafts, rows and most drafts
    seconds, tokens = 0.0, 0
    for _ in range(num_steps):
        bound = num_windows * budget.rows if padded else sum(rows * count for (_, rows, _), count in windows.items())
        before, budget = budget, auto.choose(num_windows, 16) if isinstance(auto, DraftBudget) else fixed
        took = costs(bound) + (drafting if bound > num_windows else 0.0)
        seconds += took
        after: Counter[tuple[int, int, int]] = Counter()
        for (drafts, rows, longest), number in windows.items():
            for accepted, count in enumerate(rng.multinomial(number, chances(rates[:drafts])).tolist()):
                if not count:
                    continue
                tokens += count * (accepted + 1)
                offered = longest_draft(rows, drafts, accepted, budget.drafts)
                after[offered, verified_rows(offered, *budget), offered] += count
                if isinstance(auto, DraftBudget):
                    auto.observe(drafts, accepted, longest, num_windows, count)
        if isinstance(auto, DraftBudget):
            auto.observe_time(num_windows, bound, took, before.rows)
        windows = after
    return tokens / seconds


@cache
def chances(rates: tuple[float, ...]) -> tuple[float, ...]:
    """Of each number of drafts to be accepted, up to all that there are."""
    reached = [math.prod(rates[:depth]) for depth in range(len(rates) + 1)]
    return (*(one * (1 - rate) for one, rate in zip(reached, rates, strict=False)), reached[-1])


def test_windows_of_the_same_outcome_count_as_one_after_the_other():
    together, apart = DraftBudget(StepCosts(GPU, True)), DraftBudget(StepCosts(GPU, True))
    for outcome, count in (((3, 1, 3), 5), ((0, 0, 2), 40), ((2, 2, 3), 1), ((1, 0, 1), 128)):
        together.observe(*outcome, 128, count)
        for _ in range(count):
            apart.observe(*outcome, 128)
    for ours, theirs in ((together._accepts, apart._accepts), (together._offers, apart._offers)):
        for one, other in zip(ours, theirs, strict=True):
            assert one.successes == pytest.approx(other.successes)
            assert one.trials == pytest.approx(other.trials)
    assert together._accepts[0].trials > 0


@pytest.mark.parametrize(
    ("table", "padded"), [(GPU, True), (CPU, False), (NATIVE, False)], ids=["gpu", "cpu", "native"]
)
@pytest.mark.parametrize("num_windows", [1, 8, 32, 128])
@pytest.mark.parametrize("rates", [NEVER, DEMO, OFTEN], ids=["never", "demo", "often"])
def test_auto_is_near_the_best_fixed_choice(table, padded, num_windows, rates):
    candidates = DraftBudget(StepCosts(table, padded)).candidates(16)
    fixed = {b: simulate(table, padded, rates, num_windows, b, 600) for b in candidates}
    steps = 3000 if num_windows < 128 else 1500
    auto = simulate(table, padded, rates, num_windows, DraftBudget(StepCosts(table, padded)), steps)
    assert auto >= 0.95 * max(fixed.values())
    assert auto >= 0.97 * fixed[Budget(1, 0)]


@pytest.mark.parametrize(
    ("table", "padded"), [(GPU, True), (CPU, False), (NATIVE, False)], ids=["gpu", "cpu", "native"]
)
@pytest.mark.parametrize("num_windows", [1, 8, 128])
def test_what_can_pay_is_faster_than_ar_where_all_drafts_are_right(table, padded, num_windows):
    auto = DraftBudget(StepCosts(table, padded))
    alone, *others = auto.candidates(64)
    gains = {b: simulate(table, padded, (1.0,) * 8, num_windows, b, 200) for b in others}
    speed = simulate(table, padded, (1.0,) * 8, num_windows, alone, 200)
    found = auto.can_pay(num_windows, 64)
    assert found[0] == alone
    for budget, gain in gains.items():
        if abs(gain / speed - 1) > 0.02:  # the first step of the simulation has no drafts yet
            assert (budget in found) == (gain > speed), (budget, gain / speed)


# What the demo model took on a core of an EPYC: at 4 windows AR's step is 33 ms, one of 16 rows 50 instead of 40.
EPYC = [(1, 26.8e-3), (2, 32e-3), (8, 32e-3), (16, 39.6e-3), (32, 62e-3), (64, 109e-3)]


@pytest.mark.parametrize("rates", [(0.49, 0.42, 0.36, 0.31), DEMO], ids=["seldom", "demo"])
@pytest.mark.parametrize("num_windows", [1, 2, 4])
def test_steps_with_drafts_may_cost_more_than_their_rows(rates, num_windows):
    fixed = {b: simulate(EPYC, False, rates, num_windows, b, 600, drafting=10.8e-3) for b in ROW_BUDGETS if b <= 16}
    auto = DraftBudget(StepCosts(EPYC, False))
    assert simulate(EPYC, False, rates, num_windows, auto, drafting=10.8e-3) >= 0.95 * max(fixed.values())


def test_auto_follows_the_number_of_windows():
    """Four short answers at once after one alone: what was best for one does not go on for four."""
    auto = DraftBudget(StepCosts(EPYC, False))
    speeds = [simulate(EPYC, False, DEMO, n, auto, 24, seed, 10.8e-3) for seed in range(30) for n in (1, 4)]
    best = [
        max(simulate(EPYC, False, DEMO, n, b, 720, drafting=10.8e-3) for b in ROW_BUDGETS if b <= 16) for n in (1, 4)
    ]
    for number, fastest in enumerate(best):
        later = speeds[20 + number :: 2]
        assert sum(later) / len(later) >= 0.93 * fastest


def test_rows_that_cost_more_than_the_table_says_are_left():
    """As on an H200 at batch 8, where 30 rows a window took half as long again as a step of padding does."""

    def dearer(rows: float) -> float:
        return costs(rows) * (1.5 if rows > 128 else 1.05)

    table = [(1, 4.2e-3), (16, 4.4e-3), (32, 4.6e-3), (64, 5e-3), (128, 5.6e-3), (256, 6.2e-3), (512, 15e-3)]
    costs, accepted = StepCosts(table, True), (0.75, 0.8, 0.73, 0.7, 0.7)
    auto, rng = DraftBudget(costs), random.Random(0)
    ran, speeds = [], {b: expected_step(b, accepted, (1.0,) * 5)[0] / dearer(8 * b.rows) for b in auto.candidates(36)}
    for _ in range(600):
        budget = auto.choose(8, 36)
        for _ in range(8):
            right = next((i for i in range(budget.drafts) if rng.random() >= accepted[i]), budget.drafts)
            auto.observe(budget.drafts, right, budget.drafts, 8)
        auto.observe_time(8, 8 * budget.rows, dearer(8 * budget.rows), budget.rows)
        ran.append(budget)
    late = [speeds[budget] for budget in ran[300:]]
    assert sum(late) / len(late) > 0.93 * max(speeds.values())
    assert max(budget.rows for budget in ran[300:]) <= 16


def test_a_step_counts_for_the_budget_that_laid_it_out():
    """As on an H200 at batch 64 in FP8: steps of six rows that were read after auto had left them counted as AR's."""
    table = [(64, 3.3e-3), (128, 3.7e-3), (256, 4.9e-3), (384, 6.3e-3), (1024, 14e-3)]
    took = {1: 5.1e-3, 6: 9.4e-3, 16: 20e-3}  # of a step; attention adds to the table
    auto, ran = DraftBudget(StepCosts(table, True)), [16, 16]  # a step is laid out by the one before the last
    for _ in range(400):
        budget = auto.choose(64, 16)
        if ran[-2] > 1:
            auto.observe(1, 1, 1, 64, 48)  # three drafts of four are right
            auto.observe(1, 0, 1, 64, 16)
        auto.observe_time(64, 64 * ran[-2], took.get(ran[-2], 20e-3), ran[-2])
        ran.append(budget.rows)
    assert sum(rows == 1 for rows in ran[200:]) > 0.9 * 200


def test_a_capture_is_not_a_cost_of_drafts():
    """The first step with drafts takes a second, because it is captured."""
    auto = DraftBudget(StepCosts(GPU, True))
    auto.observe_time(1, 16, 1.0, 16)
    simulate(GPU, True, DEMO, 1, auto, 100)
    assert simulate(GPU, True, DEMO, 1, auto, 200) > 1.2 * simulate(GPU, True, DEMO, 1, 1, 200)


def test_auto_follows_a_change():
    auto = DraftBudget(StepCosts(GPU, True))
    simulate(GPU, True, NEVER, 8, auto, 600)
    assert auto.budget.rows == 1
    simulate(GPU, True, OFTEN, 8, auto, 1500)
    assert auto.budget.rows == 16
    simulate(GPU, True, NEVER, 8, auto, 600)
    assert auto.budget.rows in (1, 4)


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize(
    ("table", "padded"), [(NATIVE, False), (CPU, False), (GPU, True)], ids=["native", "cpu", "gpu"]
)
def test_auto_relearns_costs_of_a_busy_start(table, padded, factor):
    """The machine was busy while steps of several rows were measured, which would not pay at those costs."""
    busy = [(rows, seconds * (factor if rows > 1 else 1)) for rows, seconds in table]
    auto = DraftBudget(StepCosts(busy, padded))
    simulate(table, padded, DEMO, 1, auto, 1500)
    fixed = [simulate(table, padded, DEMO, 1, budget, 720) for budget in ROW_BUDGETS if budget <= 16]
    assert simulate(table, padded, DEMO, 1, auto, 1500) >= 0.95 * max(fixed)
    assert auto.budget.rows > 1


def test_drafts_by_turns():
    """Where four rows cost hardly more than one, and no window is made wider than its request asked for."""
    auto = DraftBudget(StepCosts(NATIVE, False))
    speed = simulate(NATIVE, False, DEMO, 1, auto, 1500)
    assert speed > 1.3 * simulate(NATIVE, False, DEMO, 1, 1, 600)
    assert auto.budget.drafts > 1
    assert all(b.rows <= most for most in range(1, 40) for b in auto.candidates(most))
    assert auto.candidates(4) == [Budget(1, 0), Budget(4, 1)]
    assert Budget(4, 2) not in DraftBudget(StepCosts(GPU, True)).candidates(16)


def test_windows_of_requests_that_set_none():
    def of(config: EngineConfig, decoding: str, asked: int | None = None) -> int:
        return decode_params(config, 3, SamplingParams(decoding=decoding, wedlm_window_size=asked)).window_size

    plain, wide = EngineConfig(13, 12, (), 99), EngineConfig(13, 12, (), 99, auto_window_size=64)
    given = replace(wide, options=EngineOptions(wedlm_window_size=8))
    assert [of(one, "auto") for one in (plain, wide, given)] == [16, 64, 8]
    assert [of(one, "streaming") for one in (plain, wide, given)] == [16, 16, 8]
    assert [of(one, "auto", 5) for one in (plain, wide, given)] == [5, 5, 5]
    assert [one.most_window_rows for one in (plain, wide, given)] == [32, 64, 16]


def test_expected_step():
    assert expected_step(Budget.of(1), (), ()) == (1.0, 1.0)
    tokens, rows = expected_step(Budget(4, 2), (1.0,) * 2, (1.0,) * 2)
    assert (tokens, rows) == pytest.approx((2.0, 3.5))  # three tokens of three rows, and then one of four
    tokens, rows = expected_step(Budget.of(6), (1.0,), (1.0,))
    assert tokens == pytest.approx(2.0)
    assert rows == pytest.approx(6.0)
    for budget in map(Budget.of, ROW_BUDGETS):
        assert expected_step(budget, NEVER + NEVER, (1.0,) * 8)[0] == pytest.approx(1.0)
        tokens, rows = expected_step(budget, (0.8,) * 8, (0.9,) * 8)
        assert 1 <= tokens <= budget.drafts + 1
        assert rows <= budget.rows


@pytest.mark.parametrize("budget", [Budget.of(4), Budget(5, 3), Budget.of(12), Budget.of(16), Budget.of(30)], ids=str)
def test_expected_step_is_the_mean_of_many(budget):
    rates = (0.9, 0.6, 0.8, 0.7)
    a_second = [(1, 1.0), (512, 1.0)]
    measured = simulate(a_second, False, rates, 8, budget, 5000) / 8
    assert expected_step(budget, rates, (1.0,) * 4)[0] == pytest.approx(measured, rel=0.02)


def test_costs_between_measurements():
    assert [StepCosts([(1, 1.0), (3, 2.0)], False)(rows) for rows in (0.5, 1, 2, 3, 5)] == [1, 1, 1.5, 2, 3]
    assert [StepCosts([(1, 1.0), (3, 2.0)], True)(rows) for rows in (1, 2, 3, 5)] == [1, 2, 2, 3]
    assert StepCosts([(1, 2.0), (2, 1.0)], False)(2) == 2  # noise: more rows never cost less
