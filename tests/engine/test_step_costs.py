# SPDX-License-Identifier: Apache-2.0
"""The table of what steps cost: it reaches the rows of every request that came, and all deciders read the same one."""

import time
from types import SimpleNamespace

import pytest
import torch

from tests.engine.stub_engine import stub_engine
from tests.stub import StubModel
from wedlm.engine import runner as runner_module
from wedlm.engine.engine import Engine
from wedlm.engine.sampling_params import SamplingParams

AUTO, STREAMING = "auto", "auto_streaming"


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
    monkeypatch.setattr(runner_module, "_MEASURING_S", float("inf"))


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
        ((AUTO, 4), (STREAMING, 4), 16, 32),  # as many rows again join a window
        ((STREAMING, 4), (AUTO, 16), 32, 64),
        ((AUTO, 1), (STREAMING, 64), 4, 256),  # and not 512: no step has more rows than max_num_batched_tokens
        ((AUTO, 16), (AUTO, 4), 64, 64),
    ],
)
def test_the_table_reaches_the_rows_of_every_request(first, second, before, after):
    engine, measured = counted_engine()
    ask(engine, first)
    (chooser,) = (c for c in (engine.auto, engine.auto_window) if c is not None)
    assert rows_of(chooser.costs) == up_to(before)
    ask(engine, second)
    for chooser in (engine.auto, engine.auto_window):
        assert chooser is None or rows_of(chooser.costs) == up_to(after)
    assert measured == [rows for rows in up_to(after) for _ in range(3)], "a number of rows was measured again"


def test_all_who_decide_read_one_table():
    engine, measured = counted_engine()
    ask(engine, (AUTO, 4), (STREAMING, 4), ("streaming", 64))
    assert rows_of(engine.auto.costs) == up_to(32)  # who does not adapt needs no table
    engine._chunk_rows(4)  # prompts and windows meet: chunks may fill a step
    ask(engine, (STREAMING, 30))
    assert engine.auto.costs is engine.auto_window.costs is engine.pacing.costs
    assert rows_of(engine.auto.costs) == up_to(256)
    assert measured == [rows for rows in up_to(256) for _ in range(3)]


def test_measuring_takes_limited_time_however_many_ask(monkeypatch):
    monkeypatch.setattr(runner_module, "_MEASURING_S", 1e-9)
    engine, measured = counted_engine()
    ask(engine, *((AUTO, size) for size in (2, 3, 9, 33)))
    assert measured == [1, 1, 1]


def test_captured_steps_are_timed_once_each(monkeypatch):
    pytest.importorskip("triton")
    from wedlm.engine import graph_runner
    from wedlm.engine.adaptive.draft_budget import StepCosts

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

    class Pretending(graph_runner.GraphRunner):
        def __init__(self):
            self.device, self.slots = SimpleNamespace(type="cuda"), SimpleNamespace(nobody=0)
            self._costs = StepCosts([], padded=True)

        def _captured(self, shape, index, chunks):
            captured.append(shape.num_rows)
            return SimpleNamespace(replay=lambda: None), None

    pretended = SimpleNamespace(full=lambda *_, **__: None, long=None, cuda=SimpleNamespace(Event=Event))
    monkeypatch.setattr(graph_runner, "torch", pretended)
    runner = Pretending()
    assert rows_of(runner.step_costs(20)) == [1, 2, 4, 8, 16, 24]
    runner.step_costs(24)
    assert rows_of(runner.step_costs(60)) == captured == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert runner.step_costs(9000) is runner.step_costs(9000)
    assert captured == graph_runner._SIZES


def test_an_error_while_measuring_leaves_no_request(monkeypatch):
    engine, _ = counted_engine()

    def interrupted(most_rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "step_costs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(engine, (AUTO, 4))
    assert not engine.has_work
    assert not engine.scheduler.waiting
    ask(engine, (AUTO, 4))
    while engine.has_work:
        engine.step()


def test_measuring_is_no_part_of_a_steps_time(monkeypatch):
    engine, _ = counted_engine()
    for number in range(4):  # the one that measures has to wait, so that no prompt runs in the next steps
        params = SamplingParams(decoding="autoregressive", max_tokens=30 + number, ignore_eos=True)
        engine.add(f"ar {number}", [1, 2], params)
    for _ in range(5):
        engine.step()
    measure = engine.runner.step_costs
    monkeypatch.setattr(engine.runner, "step_costs", lambda rows: time.sleep(0.5) or measure(rows))
    ask(engine, (AUTO, 4))
    for _ in range(2):
        engine.step()
    (seconds,) = engine.auto._beside[0].values()
    assert seconds < 0.3
