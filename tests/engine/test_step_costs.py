# SPDX-License-Identifier: Apache-2.0
"""The table of what steps cost: it reaches the rows of every request that came, and all deciders read the same one."""

from types import SimpleNamespace

import pytest
import torch

from tests.engine.stub_engine import stub_engine
from tests.stub import StubModel
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.engine import Engine
from wedlm.engine.execution import eager_step
from wedlm.engine.sampling_params import SamplingParams

AUTO, STREAMING = "auto", "streaming"


class Counted(StubModel):
    """Notes the rows of forwards that measure, which pass the tokens as the rows of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.measured: list[int] = []

    def forward(self, tokens, positions, attend, logits_rows=None, masked=None):
        if logits_rows is tokens:
            self.measured.append(len(tokens))
            return torch.zeros(0)
        return super().forward(tokens, positions, attend, logits_rows, masked)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(eager_step, "MEASURING_S", float("inf"))


def counted_engine(**options) -> tuple[Engine, list[int]]:
    model = Counted()
    return stub_engine(model, max_num_seqs=4, max_num_batched_tokens=256, **options), model.measured


def ask(engine: Engine, *requests: tuple[str, int]) -> None:
    for decoding, size in requests:
        params = SamplingParams(decoding=decoding, wedlm_window_size=size, max_tokens=3)
        engine.add(str(engine._arrivals), [1, 2], params)


def rows_of(table) -> list[int]:
    return [rows for rows, _ in table.table()]


def up_to(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


@pytest.mark.parametrize(
    ("first", "second", "before", "after"),
    [
        ((AUTO, 4), (AUTO, 16), 16, 64),
        ((AUTO, 1), (AUTO, 100), 4, 256),  # and not 400: no step has more rows than max_num_batched_tokens
        ((AUTO, 16), (AUTO, 4), 64, 64),
        ((AUTO, 4), (STREAMING, 64), 16, 16),  # a request that is not adaptive needs no table
    ],
)
def test_the_table_reaches_the_rows_of_every_request(first, second, before, after):
    engine, measured = counted_engine()
    ask(engine, first)
    costs = engine.controller.draft_budget.costs
    assert rows_of(costs) == up_to(before)
    ask(engine, second)
    assert rows_of(engine.controller.draft_budget.costs) == up_to(after)
    assert measured == [rows for rows in up_to(after) for _ in range(3)], "a number of rows was measured again"


def test_all_budgets_read_one_table():
    engine, measured = counted_engine()
    ask(engine, (AUTO, 4), (STREAMING, 64))
    controller = engine.controller
    assert rows_of(controller.costs) == up_to(16)
    controller.prefill_rows(4)  # prompts and windows meet: chunks may fill a step
    ask(engine, (AUTO, 30))
    assert controller.costs is controller.draft_budget.costs is controller.prefill_budget.costs
    assert rows_of(controller.costs) == up_to(256)
    assert measured == [rows for rows in up_to(256) for _ in range(3)]


def test_costs_are_measured_at_once_if_told():
    engine, measured = counted_engine()
    engine.measure_costs()
    assert rows_of(engine.controller.costs) == up_to(256)
    ask(engine, (AUTO, 30))
    assert measured == [rows for rows in up_to(256) for _ in range(3)]


def test_planning_runs_no_forward():
    """A scheduler that is asked for a plan computes one, whatever has not been measured."""
    engine, measured = counted_engine()
    ask(engine, ("autoregressive", 1), ("autoregressive", 1))
    engine.step()
    engine.add("long", [1] * 40, SamplingParams(decoding="autoregressive"))
    plan = engine.scheduler.schedule(prefill_rows=7)
    assert [(one.is_window, one.count) for one in plan.scheduled] == [(True, 1), (True, 1), (False, 7)]
    assert measured == []


def test_measuring_takes_limited_time_however_many_ask(monkeypatch):
    monkeypatch.setattr(eager_step, "MEASURING_S", 1e-9)
    engine, measured = counted_engine()
    ask(engine, *((AUTO, size) for size in (2, 3, 9, 33)))
    assert measured == [1, 1, 1]


def test_captured_steps_are_timed_once_each(monkeypatch):
    pytest.importorskip("triton")
    from wedlm.engine.execution import graphs

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 4.0

    captured: list[int] = []

    class Pretending(graphs.StepGraphs):
        def __init__(self):
            self.captures, self._announce = True, None

        def capture(self, shape, index, chunks):
            captured.append(shape.num_rows)
            return SimpleNamespace(replay=lambda: None), None

    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=SimpleNamespace(Event=Event)))
    one, costs = Pretending(), StepCosts([], padded=True)
    one.measure_costs(costs, 20, None)
    assert rows_of(costs) == [1, 2, 4, 8, 16, 24]
    one.measure_costs(costs, 24, None)
    one.measure_costs(costs, 60, None)
    assert rows_of(costs) == captured == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    one.measure_costs(costs, 9000, None)
    assert captured == graphs._SIZES


def test_an_error_while_measuring_leaves_no_request(monkeypatch):
    engine, _ = counted_engine()

    def interrupted(costs, most_rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "measure_costs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(engine, (AUTO, 4))
    assert not engine.has_work
    assert not engine.scheduler.waiting
    ask(engine, (AUTO, 4))
    while engine.has_work:
        engine.step()


def test_measuring_is_no_part_of_a_steps_time(monkeypatch):
    now = SimpleNamespace(s=0.0)
    engine, _ = counted_engine(clock=lambda: now.s)
    for number in range(4):  # the one that measures has to wait, so that no prompt runs in the next steps
        params = SamplingParams(decoding="autoregressive", max_tokens=30 + number, ignore_eos=True)
        engine.add(f"ar {number}", [1, 2], params)

    def step() -> None:
        now.s += 0.01
        engine.step()

    for _ in range(5):
        step()
    measure = engine.runner.measure_costs

    def slow(costs, most_rows):
        now.s += 0.5
        measure(costs, most_rows)

    monkeypatch.setattr(engine.runner, "measure_costs", slow)
    ask(engine, (AUTO, 4))
    for _ in range(2):
        step()
    (by_budget,) = engine.controller.draft_budget._beside[0].values()
    assert max(by_budget.values()) <= 0.01
