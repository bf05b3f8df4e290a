# SPDX-License-Identifier: Apache-2.0
"""Auto streaming: its choices simulated, and windows that narrow and widen; auto decoding where one row is best."""

import math

import pytest
import torch

from tests.engine.test_draft_budget import CPU, GPU
from tests.engine.tiny_llm import check_empty, save_tiny
from wedlm import LLM, SamplingParams
from wedlm.engine.adaptive.draft_budget import AutoRows, StepCosts
from wedlm.engine.auto_window import WIDTHS, AutoWindow


def kept(width: int, most: float) -> float:
    """Tokens that a window keeps a step: soon more width brings nothing."""
    return 1 + most * (1 - math.exp(-(width - 1) / 5))


def simulate(table, padded, most, num_windows, width, num_steps=400) -> float:
    """Tokens a second of a window; ``width`` fixed, or an ``AutoWindow``."""
    costs = StepCosts(table, padded)
    tokens = seconds = 0.0
    for _ in range(num_steps):
        now = width.choose(num_windows, 16) if isinstance(width, AutoWindow) else width
        got = kept(now, most)
        seconds += costs(num_windows * (2 * now if padded else now + got))
        tokens += got
        if isinstance(width, AutoWindow):
            for _ in range(num_windows):
                width.observe(now, got, num_windows)
    return tokens / seconds


@pytest.mark.parametrize(("table", "padded"), [(GPU, True), (CPU, False)], ids=["gpu", "cpu"])
@pytest.mark.parametrize("num_windows", [1, 8, 64])
@pytest.mark.parametrize("most", [0.0, 0.5, 3.0])
def test_near_the_best_fixed_width(table, padded, num_windows, most):
    best = max(simulate(table, padded, most, num_windows, w, 20) for w in WIDTHS if w <= 16)
    auto = simulate(table, padded, most, num_windows, AutoWindow(StepCosts(table, padded)))
    assert auto >= 0.88 * best


def test_wide_alone_and_narrow_under_load():
    auto = AutoWindow(StepCosts(GPU, True))
    simulate(GPU, True, 3.0, 1, auto)
    alone = auto.width
    simulate(GPU, True, 3.0, 128, auto)
    assert auto.width < alone
    simulate(GPU, True, 3.0, 1, auto, 1500)
    assert auto.width == alone


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(save_tiny(tmp_path_factory.mktemp("auto") / "tiny"), device="cpu", dtype="float32", decoding="streaming")


def test_auto_costs_no_row_where_one_is_best(llm):
    """From the first step of a request on."""
    before, llm.engine.auto = llm.engine.auto, AutoRows(StepCosts([(1, 1.0), (2, 100.0)], True), row_budget=1)
    outputs = llm.generate(["Hello", "abc abc"], SamplingParams(decoding="auto", max_tokens=9, ignore_eos=True))
    llm.engine.auto = before
    assert [(o.stats.num_forwards, o.stats.num_rows) for o in outputs] == [(9, 9)] * 2


class Script:
    """Widths in a fixed order."""

    def __init__(self, widths):
        self.widths, self.count, self.seen = widths, 0, []

    def choose(self, num_windows, most):
        self.count += 1
        return min(most, self.widths[self.count % len(self.widths)])

    def observe(self, width, num_tokens, num_windows):
        self.seen.append((width, num_tokens))


def test_an_unchanged_width_gives_streamings_text(llm):
    common = {"max_tokens": 30, "wedlm_window_size": 6, "wedlm_entropy_threshold": 1.5}
    llm.engine.auto_window = Script([6])
    found, expected = (
        llm.generate(["Hello", "abc abc"], SamplingParams(decoding=mode, **common))
        for mode in ("auto_streaming", "streaming")
    )
    assert [(o.token_ids, o.token_steps) for o in found] == [(o.token_ids, o.token_steps) for o in expected]


@pytest.mark.parametrize("widths", [[2, 8], [1, 1, 12], [8, 8, 8, 3, 3, 3]])
def test_widths_that_change_cut_and_widen_windows(llm, widths):
    """Rows stay within the bound that the scheduler was told; every request gets all of its tokens, to the end of the
    model's length; steps beside other modes change nothing for those."""
    llm.engine.auto_window = script = Script(widths)
    length = llm.engine.config.max_model_len
    params = [
        SamplingParams(decoding=mode, max_tokens=length, ignore_eos=True, wedlm_window_size=12, seed=1, temperature=t)
        for mode, t in (("auto_streaming", 0), ("auto_streaming", 1), ("streaming", 1), ("verified", 1))
    ]
    prompts = ["Hello", "abc abc", "abc abc", "x"]
    bounds = []
    schedule = llm.engine.scheduler.schedule

    def watched():
        plan = schedule()
        bounds.extend((work.request, work.count, work.request.num_rows) for work in plan.work if work.decodes)
        return plan

    llm.engine.scheduler.schedule = watched
    try:
        outputs = llm.generate(prompts, params)
    finally:
        llm.engine.scheduler.schedule = schedule
    assert [o.stats.num_tokens + o.stats.num_prompt_tokens for o in outputs] == [length] * 4
    told: dict = {}
    for request, count, before in bounds:
        if id(request) in told:
            bound, rows = told[id(request)]
            assert before - rows <= bound
        told[id(request)] = (count, before)
    assert {width for width, _ in script.seen} >= set(widths)
    check_empty(llm)
    for prompt, one, output in zip(prompts[2:], params[2:], outputs[2:], strict=True):
        assert llm.generate([prompt], one)[0].token_ids == output.token_ids


# Padding rows are whatever lay in memory, and the interpreter reports what a GPU ignores.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_captured_steps_narrow_windows_alike(monkeypatch):
    pytest.importorskip("triton")
    from tests.kernels.test_graph_runner import engine, few_rows_beside_chunks, outcomes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    few_rows_beside_chunks(device, monkeypatch)
    params = SamplingParams(
        decoding="auto_streaming", max_tokens=6, wedlm_window_size=6, wedlm_entropy_threshold=3.0, ignore_eos=True
    )
    found = []
    for graphs in (False, True):
        one = engine(device, graphs)
        one.auto_window = Script([6, 6, 2, 4])
        found.append(outcomes(one, [([3, 4, 5, 6], params)])[0])
    assert found[0] == found[1]
    assert found[0][0][2] < 6 * 12, "windows stayed wide"
