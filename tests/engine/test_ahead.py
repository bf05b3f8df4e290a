# SPDX-License-Identifier: Apache-2.0
"""Steps planned before the one before them is read, prompts included; and what goes to the device unawaited."""

from dataclasses import replace

import torch

from tests.engine.stub_engine import check_engine, check_outcome, stub_engine
from tests.stub import StubModel
from wedlm.engine.adaptive.draft_budget import Budget, DraftBudget
from wedlm.engine.execution.transfer import scatter_rows
from wedlm.engine.sampling_params import SamplingParams

MODEL = StubModel()


def test_prompts_are_planned_ahead(monkeypatch):
    engine = stub_engine(MODEL, lagging=True, max_num_batched_tokens=24, max_num_seqs=2, num_pages=90)
    events, shares = [], []
    launch = engine.runner.launch

    def noted(plan):
        events.append("launch")
        shares.append([(work.request.request_id, work.is_window, work.start, work.count) for work in plan.scheduled])
        pending = launch(plan)
        wait = pending.wait
        pending.wait = lambda: events.append("read") or wait()
        return pending

    monkeypatch.setattr(engine.runner, "launch", noted)
    # The third waits for a place, so its prompt comes beside the first one's window.
    prompts = [[1 + (i + length) % 5 for i in range(length)] for length in (61, 30, 22)]
    done = []
    for name, prompt, max_tokens in zip("abc", prompts, (30, 3, 3), strict=True):
        params = SamplingParams(decoding="verified", max_tokens=max_tokens, wedlm_window_size=2)
        done.append(engine.add(name, prompt, params))
    while engine.has_work:
        engine.step()
        check_engine(engine)
    for request in done:
        check_outcome(MODEL, request)
    # Nothing ran but what was launched, each step before the one before it was read.
    assert events == ["launch", *["launch", "read"] * (len(shares) - 1), "read"]
    chunks = {name: [share[2:] for step in shares for share in step if share[:2] == (name, False)] for name in "abc"}
    for name, prompt in zip("abc", prompts, strict=True):
        assert [start for start, _ in chunks[name]] == [0, *(start + count for start, count in chunks[name][:-1])]
        assert sum(chunks[name][-1]) == len(prompt) - 1
    assert len(chunks["a"]) > 2
    assert any(len({decodes for _, decodes, *_ in step}) == 2 for step in shares), "no step had both"


def test_a_plan_that_is_dropped_changes_no_budget(monkeypatch):
    """A step that needs the host is planned twice. The first of these plans must not limit the rows of windows that
    the step before it leaves, or the second one has fewer than they take."""
    engine = stub_engine(MODEL, lagging=True)
    params = SamplingParams(decoding="auto", max_tokens=30, wedlm_lookup_drafts=0)
    engine.add("ahead", [1, 2, 3], params)
    engine.step()
    assert engine._pending is not None
    engine.add("host", [4, 5, 6], replace(params, logprobs=1))
    monkeypatch.setattr(DraftBudget, "choose", lambda *_: Budget.of(1))
    engine.step()
    assert engine._pending is None, "the plan ahead was launched"
    process = engine.process

    def check(plan, results):
        rows = [(result.num_rows, one.count) for one, result in zip(plan.scheduled, results, strict=True) if result]
        assert all(ran <= planned for ran, planned in rows), rows
        return process(plan, results)

    monkeypatch.setattr(engine, "process", check)
    while engine.has_work:
        engine.step()
        check_engine(engine)


def test_scatter_rows():
    values = [torch.tensor([2**63 - 25, -1]), torch.tensor([-torch.inf, 0.1], dtype=torch.double),
              torch.tensor([[0.1, 2.0], [3.0, -torch.inf]]), torch.tensor([[True, False, True], [False, False, True]]),
              torch.tensor([1 / 3, 1e300], dtype=torch.double)]  # fmt: skip
    tables = [torch.zeros(5, *value.shape[1:], dtype=value.dtype) for value in values]
    scatter_rows([3, 1], list(zip(tables, values, strict=True)))
    for table, value in zip(tables, values, strict=True):
        assert torch.equal(table[[3, 1]], value)
        assert not table[::2].any()
