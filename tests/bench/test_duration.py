# SPDX-License-Identifier: Apache-2.0
"""The announced duration against a clock on which a step costs what it is said to cost."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.bench.conftest import WORKLOAD, settings
from wedlm.bench import loop as loop_module
from wedlm.bench.duration import StepCosts, expected_seconds, in_words, measure_step_costs
from wedlm.bench.measure import Bench
from wedlm.bench.run import PARTS, run_bench
from wedlm.bench.settings import LLAMACPP_PARTS
from wedlm.bench.target import Target, load_target

SETTINGS = settings(
    modes=("autoregressive",), workload=replace(WORKLOAD, runs=1, requests=4, pairs=3, answer=12, contexts=(20, 40))
)


@pytest.fixture(scope="module")
def target() -> Target:
    """One whose arriving prompts are short."""
    found = load_target(settings())
    return replace(found, prompts=replace(found.prompts, max_model_len=100))


CPU, GPU = StepCosts(0.01, 0.001), StepCosts(0.005, 0.00003)
# Not accept with a CPU's costs: auto chooses its rows by what they cost in truth.
CASES = [(part, costs) for part in sorted(PARTS.keys() - {"scenarios"}) for costs in (CPU, GPU)]
CASES.remove(("accept", CPU))


@pytest.mark.parametrize(
    ("part", "costs"),
    [
        pytest.param(
            *case, marks=[pytest.mark.long] if case[0] in ("accept", "pairs", "host") or case[1] is GPU else []
        )
        for case in CASES
    ],
)
def test_each_part_by_itself(target, monkeypatch, part, costs):
    """Right to a factor of two, whichever part is chosen."""
    now = [0.0]
    process = target.engine.process

    def processed(plan, results):
        rows = [one.count if done is None else done.num_rows for one, done in zip(plan.scheduled, results, strict=True)]
        now[0] += costs.of(sum(rows))
        return process(plan, results)

    def sleep(seconds: float) -> None:
        now[0] += seconds + 1e-6

    monkeypatch.setattr(target.engine, "process", processed)
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=sleep))
    chosen = replace(
        SETTINGS, parts=(part,), modes=("autoregressive", "verified") if part == "steps" else SETTINGS.modes
    )
    PARTS[part](Bench(target, chosen, lambda *_: None))
    assert now[0] / 2 < expected_seconds(chosen, target, costs) < 2 * now[0]


def test_parts_add_up(target):
    costs = StepCosts(0.01, 0.001)

    def seconds(*parts: str, **changes) -> float:
        return expected_seconds(replace(SETTINGS, parts=parts, **changes), target, costs)

    assert seconds("latency", "steps") == pytest.approx(seconds("latency") + seconds("steps"))
    single = [seconds(part, against="llamacpp") for part in LLAMACPP_PARTS]
    assert seconds(*LLAMACPP_PARTS, against="llamacpp") == pytest.approx(sum(single))
    assert min(single) > 0


def test_a_rate_that_is_given_decides(target):
    chosen = replace(SETTINGS, parts=("serving",), rate=0.1)
    last = target.prompts.arrivals(4, 12, 0.1)[-1].at_s
    assert expected_seconds(chosen, target, StepCosts(1e-5, 1e-6)) == pytest.approx(2 * last, rel=0.01)


def test_scenarios(tiny_checkpoint):
    chosen = settings(parts=("scenarios",), shape=None, model=str(tiny_checkpoint))
    costs = StepCosts(1.0, 0.0)
    runs = 4 * WORKLOAD.runs + 1
    assert expected_seconds(chosen, load_target(chosen), costs) == runs * 2 * WORKLOAD.answer


def test_costs_are_measured(target):
    costs = measure_step_costs(target)
    assert costs.base_s + costs.row_s > 0
    assert costs.row_s >= costs.base_s / 200


def test_the_chosen_parts_are_named_and_the_budget_bounds_them():
    told = []

    def log(part, row):
        told.append(part)

    run_bench(settings(parts=("latency",), rate=None), [], None, log)
    assert "latency: about 5 seconds; Ctrl-C ends early and keeps what is done" in told
    told.clear()
    slow = settings(parts=("serving",), rate=0.001, budget_s=15)
    run_bench(slow, [], None, log, stopped=lambda: True)
    assert any(part.startswith(("serving: about 15 s", "serving: about 10 s")) for part in told)


def test_in_words():
    said = ["about 5 seconds", "about 65 seconds", "about 1.5 minutes", "about 2.0 hours"]
    assert [in_words(one) for one in (3, 64, 95, 7200)] == said
