# SPDX-License-Identifier: Apache-2.0
"""What an error leaves behind while a request is admitted: nothing. And plans as plain data."""

import pytest

from tests.engine.stub_engine import check_engine, stub_engine
from tests.stub import StubModel
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
