# SPDX-License-Identifier: Apache-2.0
"""Prompts that arrive while others decode, on a clock that costs what an H200 was measured to cost."""

import random
import statistics
from types import SimpleNamespace

import pytest

from tests.engine.measured_costs import GPU
from tests.engine.stub_engine import check_engine, check_outcome, stub_engine
from tests.stub import StubModel
from wedlm.engine.adaptive.prefill_budget import PrefillBudget
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.sampling_params import SamplingParams

COSTS = StepCosts(GPU, padded=True)
BESIDE_WINDOWS, BESIDE_CHUNKS = 0.3e-3, 0.4e-3  # seconds of a step besides its forward


def serve(
    ratio: float, decoding: str, gap: float, num_requests: int = 24, streamed: bool = True
) -> tuple[list[float], float]:
    """(seconds between the deliveries of a request while it decodes, seconds in all)."""
    clock = SimpleNamespace(now=0.0)
    model, rng = StubModel(), random.Random(1)
    engine = stub_engine(
        model, page_size=16, num_pages=2000, max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=1200,
        chunk_step_ratio=ratio, clock=lambda: clock.now,
    )  # fmt: skip
    run = engine.runner.run

    def timed(plan):
        results = run(plan)
        windows = sum(result.num_rows for result in results if result is not None)
        chunks = sum(work.count for work in plan.scheduled if not work.is_window)
        clock.now += COSTS(windows + chunks) + (BESIDE_CHUNKS if chunks else BESIDE_WINDOWS)
        return results

    engine.runner.run = timed
    engine.controller.measure_costs = lambda most_rows: None
    engine.controller.costs = COSTS
    arrivals = [gap * i for i in range(num_requests)]
    done, gaps, last = [], [], {}
    while arrivals or engine.has_work:
        while arrivals and (arrivals[0] <= clock.now or not engine.has_work):
            clock.now = max(clock.now, arrivals.pop(0))
            prompt = [rng.randrange(12) for _ in range(rng.randint(100, 1000))]
            params = SamplingParams(decoding=decoding, max_tokens=60, wedlm_window_size=4, seed=0)
            done.append(engine.add(str(len(done)), prompt, params, streamed=streamed))
        for request in engine.step():
            if request.request_id in last:
                gaps.append(clock.now - last[request.request_id])
            last[request.request_id] = clock.now
    check_engine(engine)
    check_outcome(model, done[0])
    assert all(request.num_output_tokens == 60 for request in done)
    return gaps, clock.now


def p99(gaps: list[float]) -> float:
    return sorted(gaps)[int(0.99 * (len(gaps) - 1))]


@pytest.mark.parametrize("decoding", [pytest.param("autoregressive", marks=pytest.mark.long), "verified"])
def test_tokens_keep_coming_while_prompts_arrive(decoding):
    gaps, seconds = serve(1.8, decoding, gap=0.03)
    others, unpaced = serve(float("inf"), decoding, gap=0.03)
    assert p99(gaps) <= 2 * statistics.median(gaps)
    assert p99(others) > 3 * statistics.median(others)  # what the limit is for
    assert seconds < 1.05 * unpaced


SECONDS_A_KEY, SECONDS_A_PAIR = 4e-8, 1.2e-9  # of attention: of a window's row; of a chunk's row and a key before it


def join(num_requests: int, prompt: int, quiet: int = 0, host: float = BESIDE_WINDOWS) -> tuple[float, list[float]]:
    """Requests that come at once beside one that has decoded alone for ``quiet`` steps, and that all decode on and on:
    (seconds until all prompts are read, each step's time divided by that of its windows alone)."""
    budget, windows, waiting, ratios, seconds = PrefillBudget(COSTS, 1.8), [prompt], [prompt] * num_requests, [], 0.0
    for _ in range(quiet):
        budget.observe(1, 0, COSTS(1) + host + SECONDS_A_KEY * prompt)
    while waiting:
        rows = min(budget.chunk_rows(len(windows)), 2048 - len(windows), sum(waiting))
        beside = host + SECONDS_A_KEY * sum(windows)
        took = COSTS(len(windows) + rows) + beside
        alone = COSTS(len(windows)) + beside
        windows = [keys + 1 for keys in windows]
        left = rows
        while left:
            read = min(left, waiting[0])
            took += SECONDS_A_PAIR * read * (prompt - waiting[0])
            waiting[0] -= read
            left -= read
            if not waiting[0]:
                windows.append(waiting.pop(0) + prompt)
        budget.observe(len(windows), rows, took)
        ratios.append(took / alone)
        seconds += took
    return seconds, ratios


@pytest.mark.parametrize("quiet", [0, 1000])
@pytest.mark.parametrize("host", [BESIDE_WINDOWS, 1e-3])
@pytest.mark.parametrize(("num_requests", "prompt"), [(64, 100), (128, 512), (16, 8192)])
def test_prompts_get_on_beside_windows_whose_attention_takes_as_long_as_a_forward(num_requests, prompt, host, quiet):
    """What attention costs is an H200's in the 8B shape. A chunk's own grows while a long prompt is read."""
    seconds, ratios = join(num_requests, prompt, quiet, host)
    assert max(ratios) < 1.95
    alone = COSTS(2048) / 2048 * num_requests * prompt
    assert seconds < 3.5 * alone + 0.3


@pytest.mark.long
def test_a_batch_that_is_not_streamed_is_not_slowed_for_its_windows():
    paced, unpaced, unread = (
        serve(ratio, "autoregressive", gap=0.0, num_requests=16, streamed=streamed)[1]
        for ratio, streamed in ((1.8, True), (float("inf"), True), (1.8, False))
    )
    assert unread == unpaced < 0.97 * paced


def test_chunk_rows():
    pacing = PrefillBudget(StepCosts([(1, 4e-3), (128, 8e-3), (1024, 32e-3)], padded=False), 2.0)
    rows = pacing.chunk_rows(1)
    assert rows == 128 - 1
    for _ in range(200):
        pacing.observe(1, rows, 8e-3 + 2e-3)  # the host needs 2 ms more: fewer rows fit
    assert pacing.chunk_rows(1) == 0  # to see what windows cost alone
    assert 60 <= pacing.chunk_rows(1) <= 70
    for _ in range(200):
        pacing.observe(1, 0, 4e-3 + 2e-3)  # so do windows alone
    assert pacing.chunk_rows(1) > 128
    for _ in range(200):
        pacing.observe(1, 60, 1.0)
    assert [pacing.chunk_rows(1) for _ in range(2)] == [0, 32]  # a prompt gets on


def test_rows_within():
    points = [(1, 1.0), (3, 2.0), (4, 2.0), (8, 4.0)]
    assert [StepCosts(points, True).rows_within(s) for s in (0.5, 1, 1.5, 2, 3, 5)] == [0, 1, 1, 4, 4, 10]
    assert [StepCosts(points, False).rows_within(s) for s in (0.5, 1, 1.5, 2, 3, 5)] == [0, 1, 2, 4, 6, 10]
    assert StepCosts([(2, 1.0)], padded=False).rows_within(2.5) == 5
    assert StepCosts([(1, 1.0), (3, 2.0)], padded=False).rows_within(4.0) == 7
