# SPDX-License-Identifier: Apache-2.0
"""What an error leaves behind while a request is admitted: nothing. And plans as plain data."""

import math
import random

import pytest

from tests.engine.histories import first_windows_of, num_first_windows
from tests.engine.stub_engine import check_engine, check_outcome, stub_engine
from tests.stub import StubModel
from wedlm.algorithm.params import DECODINGS
from wedlm.engine import pages
from wedlm.engine.sampling_params import SamplingParams

MODEL = StubModel()
PARAMS = SamplingParams(decoding="verified", max_tokens=6, wedlm_window_size=4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["reserve", "pages_for", "table", "digest"])
def test_an_error_in_admission_leaks_no_page(monkeypatch, place, error):
    """The second request shares a page with what the first left in the prefix cache."""
    engine = stub_engine(MODEL)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    engine.add("first", prompt, PARAMS)
    while engine.has_work:
        engine.step()
    engine.add("second", prompt, PARAMS)
    calls = []

    def failing(*args):
        calls.append(args)
        if place != "digest" or len(calls) == 2:  # once a page has been found
            raise error("injected")
        return digest(*args)

    digest = pages._digest
    with monkeypatch.context() as patch:
        patch.setattr(*((pages, "_digest") if place == "digest" else (engine.pool, place)), failing)
        with pytest.raises(error, match="injected"):
            engine.step()
    check_engine(engine)
    assert engine.pool.num_available == engine.pool.num_pages
    request = engine.requests["second"]
    while engine.has_work:
        engine.step()
    assert request.progress.num_reused == 8
    assert engine.pool.num_available == engine.pool.num_pages


def forwards_to_first_token(length: int, lagging: bool, **params) -> int:
    """Of a prompt whose chunks have at most 16 rows."""
    engine = stub_engine(MODEL, max_num_batched_tokens=16, lagging=lagging)
    request = engine.add("one", [1 + i % 7 for i in range(length)], SamplingParams(max_tokens=9, **params))
    steps = 0
    while not request.output_token_ids:
        engine.step()
        check_engine(engine)
        steps += 1
    assert request.counters.num_forwards == 1
    while engine.has_work:
        engine.step()
    check_outcome(MODEL, request, lagging)
    return steps


@pytest.mark.parametrize("lagging", [False, True])
def test_a_prompts_last_step_is_also_the_first_of_its_answer(lagging):
    lengths = (1, 2, 15, 16, 17, 32, 33, 48, 49)
    found = [forwards_to_first_token(length, lagging, decoding="autoregressive") for length in lengths]
    assert found == [1, 1, 1, 1, 2, 2, 3, 3, 4]
    # A verified window has four rows here, which need a step of their own where they do not fit.
    params = {"decoding": "verified", "wedlm_window_size": 4}
    assert [forwards_to_first_token(length, lagging, **params) for length in lengths] == [1, 1, 2, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("decoding", DECODINGS)
def test_every_kind_of_window_starts_with_the_last_chunk(decoding):
    engine = stub_engine(MODEL)
    first_windows = first_windows_of(engine)
    request = engine.add("one", list(range(1, 10)), SamplingParams(decoding=decoding, max_tokens=6))
    while engine.has_work:
        engine.step()
        check_engine(engine)
    assert first_windows == [1] + [0] * (request.counters.num_forwards - 1)
    check_outcome(MODEL, request)


def test_a_first_window_takes_no_more_than_is_left():
    """It counts as rows of the prompt where those are limited, and no request is preempted for it."""
    params = SamplingParams(decoding="verified", max_tokens=6, wedlm_window_size=4)
    for rows, first_windows in ((7, 0), (11, 0), (12, 1), (None, 1)):
        engine = stub_engine(MODEL)
        engine.add("one", list(range(1, 10)), params)
        plan = engine.scheduler.schedule(rows)
        assert num_first_windows(plan) == first_windows
        assert sum(one.count for one in plan.scheduled) <= (rows or 64)
    engine = stub_engine(MODEL)
    engine.add("one", list(range(13)), params)
    reserve = engine.pool.reserve
    engine.pool.reserve = lambda name, slots: slots <= 12 and reserve(name, slots)
    plan = engine.scheduler.schedule()
    assert [(one.is_window, one.count) for one in plan.scheduled] == [(False, 12)]
    assert not plan.preempted


def test_preempted_requests_are_part_of_the_plan():
    engine = stub_engine(MODEL, num_pages=12)
    params = SamplingParams(decoding="verified", max_tokens=30, wedlm_window_size=4)
    first, second = (engine.add(name, [1, 2, 3, ord(name) % 11], params) for name in "ab")
    seen = []
    schedule = engine.scheduler.schedule

    def noted(*args):
        plan = schedule(*args)
        seen.extend(plan.preempted)
        return plan

    engine.scheduler.schedule = noted
    while engine.has_work:
        engine.step()
        check_engine(engine)
    assert set(seen) == {second}
    assert (first.progress.num_preemptions, second.progress.num_preemptions) == (0, len(seen))


def test_who_asks_for_many_keeps_nobody_out():
    """A request's further sequences make room for one that comes later, and have the text that they have alone."""
    engine = stub_engine(MODEL, max_num_seqs=4)
    params = SamplingParams(decoding="autoregressive", max_tokens=30)
    many = [engine.add(f"many {i}", [1, 2, 3, i], params, turn=i) for i in range(8)]
    engine.step()
    assert set(engine.scheduler.running) == set(many[:4])
    one = engine.add("one", [4, 5], PARAMS)
    engine.step()
    assert set(engine.scheduler.running) == {*many[:3], one}
    assert list(engine.scheduler.waiting) == many[3:]
    assert one.output_token_ids or one.progress.num_cached
    while engine.has_work:
        engine.step()
        check_engine(engine)
    assert [request.progress.num_preemptions for request in (one, *many)] == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    for request in (one, *many):
        check_outcome(MODEL, request)


@pytest.mark.parametrize("pages", [40, 1000])
def test_who_asks_for_many_keeps_nobody_from_pages(pages):
    """The first request's sequences would fill 40 pages."""
    engine = stub_engine(MODEL, max_num_seqs=8, num_pages=pages)
    params = SamplingParams(decoding="autoregressive", max_tokens=80)
    many = [engine.add(f"many {i}", [1, 2, 3, i], params, turn=i) for i in range(6)]
    for _ in range(22):
        engine.step()
    one = engine.add("one", list(range(1, 9)) * 2, PARAMS)
    for _ in range(20):
        engine.step()
        check_engine(engine)
    assert one.finish_reason
    assert one.progress.num_preemptions == 0
    while engine.has_work:
        engine.step()
    for request in (one, *many):
        check_outcome(MODEL, request)


@pytest.mark.parametrize(
    ("policy", "lagging"),
    [
        ("priority", True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("fcfs", False), ("fcfs", True), ("priority", False))
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))])
def test_those_that_run_come_first(seed, lagging, policy):
    """Where pages and rows suffice, of chunks too. Each group has one sequence or several, of one priority."""
    rng = random.Random(seed)
    limits = {"max_num_seqs": 4, "num_pages": 2000, "max_num_batched_tokens": 1000, "chunk_step_ratio": math.inf}
    engine = stub_engine(MODEL, lagging=lagging, scheduling_policy=policy, **limits)
    added: list = []
    moved = passed_over = 0
    for group in range(60):
        priority = rng.choice([0, 0, -3, 7])
        for turn in range(rng.choice([1, 1, 5])):
            decoding, most = rng.choice(["autoregressive", "verified"]), rng.randint(1, 20)
            params = SamplingParams(decoding=decoding, max_tokens=most, priority=priority)
            prompt = [rng.randrange(MODEL.vocab_size) for _ in range(rng.randint(1, 12))]
            added.append(engine.add(f"{group} {turn}", prompt, params, turn=turn))
        for _ in range(rng.randint(0, 6)):
            if engine.requests and rng.random() < 0.1:
                engine.abort(rng.choice(list(engine.requests)))
            before = list(engine.requests.values())
            engine.step()
            check_engine(engine)
            if not lagging:  # else it shows a step later
                first = sorted(before, key=lambda request: request.order)[:4]
                assert {r for r in first if not r.finish_reason} == set(engine.scheduler.running)
                runs = max((r.params.priority for r in engine.scheduler.running), default=-4)
                passed_over += any(r.params.priority < runs for r in engine.scheduler.waiting)
    while engine.has_work:
        engine.step()
        check_engine(engine)
    for request in added:
        moved += request.progress.num_preemptions
        if request.finish_reason != "abort":
            check_outcome(MODEL, request)
    assert moved > 3
    assert lagging or (passed_over > 0) == (policy == "fcfs")
    assert engine.pool.num_available == engine.pool.num_pages


@pytest.mark.parametrize("num_pages", [41, 42])
def test_the_only_window_gives_way_to_a_prompt_that_is_held_back(num_pages):
    """A step may allow chunks no rows, to see what windows cost. If it preempts the last window, prompts go on."""
    limits = {"page_size": 4, "num_pages": num_pages, "max_num_batched_tokens": 64, "max_model_len": 200}
    engine = stub_engine(MODEL, scheduling_policy="priority", **limits)
    held_back = 0

    def prefill_rows(window_rows: int | None) -> int | None:
        nonlocal held_back
        if window_rows is None:
            return None
        now = not engine.pool.num_available and not held_back
        held_back += now
        return 0 if now else 4

    engine.controller.prefill_rows = prefill_rows
    window = SamplingParams(decoding="autoregressive", max_tokens=60, priority=1)
    requests = [engine.add("window", [1, 2, 3], window)]
    engine.step()
    prompt = [token % MODEL.vocab_size for token in range(150)]
    requests.append(engine.add("prompt", prompt, SamplingParams(decoding="autoregressive", max_tokens=2, priority=0)))
    while engine.has_work:
        engine.step()
        check_engine(engine)
    assert held_back
    for request in requests:
        check_outcome(MODEL, request)


def test_a_plan_that_is_dropped_changes_no_window():
    """The next plan must expect the rows that the window has."""
    engine = stub_engine(MODEL)
    for rows in range(1, 65):  # each row costs as much, so AR is the best
        engine.controller.costs.add(rows, float(rows))
    engine.controller._most_rows_measured = 64
    request = engine.add("one", [1, 2, 3], SamplingParams(decoding="auto", max_tokens=3))
    most = request.limits.max_rows
    dropped = engine._plan({})
    assert num_first_windows(dropped) == 1
    assert request.limits.max_rows == most > dropped.row_budget
    engine.step()
    check_engine(engine)
    assert request.limits.max_rows == 1
