# SPDX-License-Identifier: Apache-2.0
"""Auto decoding's choice between drafts from the text and masked rows' own, by what was seen and what rows cost."""

import random

import pytest

from tests.engine.measured_costs import CPU, GPU, NATIVE
from wedlm.algorithm.lookup import Proposal, TextLookup
from wedlm.algorithm.params import verified_rows
from wedlm.engine.adaptive.draft_budget import Budget, DraftBudget, expected_step
from wedlm.engine.adaptive.lookup_budget import LookupBudget, RequestLookup, StepLoad
from wedlm.engine.adaptive.step_costs import StepCosts

TABLES = {"gpu": (GPU, True), "cpu": (CPU, False), "native": (NATIVE, False)}
OWN = (0.78, 0.72, 0.64, 0.6, 0.0, 0.0, 0.0, 0.0)  # the demo model's masked rows


def load_of(costs: StepCosts, budget: Budget, num_windows: int) -> StepLoad:
    tokens, rows = expected_step(budget, OWN, (1.0,) * 8)
    rows = budget.rows if costs.padded else rows
    return StepLoad(costs, 0.0, num_windows * rows, num_windows * tokens, rows, tokens, *budget)


def best_budget(costs: StepCosts, num_windows: int) -> Budget:
    """The fastest without drafts from the text."""
    loads = {b: load_of(costs, b, num_windows) for b in DraftBudget(costs).candidates(16)}
    return max(loads, key=lambda b: loads[b].speed(0, 0))


def simulate(table: str, chance: float, num_windows: int, num_steps: int = 1500) -> tuple[float, float]:
    """Tokens a second of windows that find something in each step, right with ``chance`` for each token, and of the
    same windows without. A match is longer by each token that goes on as it says, and short after one that does not. A
    window whose last step had no masked rows has no drafts of its own."""
    rng, costs, auto = random.Random(0), StepCosts(*TABLES[table]), LookupBudget()
    budget = best_budget(costs, num_windows)
    alone = load_of(costs, budget, num_windows)
    requests = [RequestLookup(TextLookup([])) for _ in range(num_windows)]
    left, lengths, tokens, seconds = [True] * num_windows, [2] * num_windows, 0.0, 0.0
    for _ in range(num_steps // num_windows + 100):
        load = load_of(costs, budget, num_windows)
        rows = 0.0
        for i, request in enumerate(requests):
            proposal = Proposal(1, [7] * 15, lengths[i], 0)
            count = auto.choose(load, request, lengths[i], 15)
            right = next((n for n in range(15) if rng.random() >= chance), 15)
            if count:
                made, ran = min(count, right) + 1, verified_rows(count, max(budget.rows, count + 1), budget.drafts)
                left[i] = ran > count + 1
            else:
                made = alone.window_tokens if left[i] else 1
                made, ran = int(made) + (rng.random() < made % 1), alone.window_rows
                left[i] = True
            rows += max(budget.rows, count + 1) if costs.padded else ran
            tokens += made
            lengths[i] = lengths[i] + int(made) if made <= right else 2
            auto.observe(request, proposal, [7], [7 if n < right else 0 for n in range(int(made))])
        seconds += costs(rows)
    return tokens / seconds, alone.speed(0, 0)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("num_windows", [1, 8, 64])
@pytest.mark.parametrize("chance", [0.0, 0.2, 0.5])
def test_mixing_costs_hardly_anything_where_it_does_not_pay(table, num_windows, chance):
    mixed, alone = simulate(table, chance, num_windows)
    assert mixed >= 0.98 * alone


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("num_windows", "gain"), [(1, 1.5), (8, 1.2)])
def test_it_pays_where_the_text_repeats_itself(table, num_windows, gain):
    mixed, alone = simulate(table, 0.97, num_windows)
    assert mixed >= gain * alone


def test_what_is_right_is_learnt_from_steps_that_take_none():
    costs, auto = StepCosts(*TABLES["native"]), LookupBudget()
    request = RequestLookup(TextLookup([]))
    proposal = Proposal(1, [7] * 15, 2, 0)

    def chosen() -> int:
        return auto.choose(load_of(costs, best_budget(costs, 1), 1), request, 2, 15)

    for _ in range(40):
        auto.observe(request, proposal, [7], [0])
    assert chosen() == 0
    for _ in range(40):
        auto.observe(request, proposal, [7], [7] * 12)
    assert chosen() >= 7
    other = RequestLookup(TextLookup([]))
    for _ in range(20):
        auto.observe(other, proposal, [7], [0])
    assert chosen() >= 7, "a request's own text counts for more than that of others"


def test_a_choice_is_the_next_windows_load():
    """Rows that one window takes are dear to the next."""
    costs, auto = StepCosts([(1, 1.0), (20, 1.0), (21, 9.0), (1000, 999.0)], True), LookupBudget()
    load = load_of(costs, Budget(1, 0), 2)
    requests = [RequestLookup(TextLookup([])) for _ in range(2)]
    proposal = Proposal(1, [7] * 15, 2, 0)
    for request in requests:
        for _ in range(100):
            auto.observe(request, proposal, [7], [7] * 15)
    assert [auto.choose(load, request, 2, 15) for request in requests] == [15, 3]
    assert load.num_rows == 20


def test_among_many_windows_a_fruitless_search_is_not_repeated_at_once():
    request = RequestLookup(TextLookup([]))
    searched = []
    for _ in range(24):
        searched.append(not request.rests(64))
        if searched[-1]:
            request.note(taken=False)
    assert [i for i, did in enumerate(searched) if did] == [0, 2, 6, 14, 22]
    assert not request.rests(8), "few windows are always looked up"
    request.note(taken=True)
    assert not request.rests(64)
