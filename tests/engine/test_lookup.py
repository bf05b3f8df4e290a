# SPDX-License-Identifier: Apache-2.0
"""Drafts from the text in the engine: AR's text whatever is drafted, fewer steps where it repeats itself."""

import random
from dataclasses import replace

import pytest

from tests.engine.native_model import NativeModel, needs_native
from tests.engine.stub_engine import check_engine, check_outcome, stub_engine
from tests.stub import StubModel
from wedlm.algorithm.params import MOST_LOOKUP_DRAFTS
from wedlm.engine.admission import decode_params
from wedlm.engine.engine import Engine
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.request import Request, RequestStats
from wedlm.engine.sampling_params import SamplingParams

REPEATING = StubModel(period=4, agreement=20.0)


def serve(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Request]:
    added = [engine.add(str(i), *both) for i, both in enumerate(zip(prompts, params, strict=True))]
    while engine.has_work:
        engine.step()
        check_engine(engine)
    return added


def with_costs(engine: Engine, table: list[tuple[int, float]]) -> None:
    """Steps cost so much, whatever the machine."""
    for rows, seconds in table:
        engine.controller.costs.add(rows, seconds)
    engine.controller._most_rows_measured = table[-1][0]


def requests_of(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(seed)
    prompts = [[rng.randrange(11) for _ in range(rng.randint(1, 30))] for _ in range(6)]
    params = [
        SamplingParams(
            max_tokens=40,
            temperature=i % 2,
            seed=i,
            top_k=rng.choice([0, 4]),
            stop_token_ids=rng.choice([(), (3,)]),
            min_tokens=rng.choice([0, 9]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            wedlm_lookup_drafts=rng.choice([2, 7, 15]),
        )
        for i in range(6)
    ]
    return prompts, params


@pytest.mark.parametrize("lagging", [False, True], ids=["direct", "lagging"])
@pytest.mark.parametrize(
    "has_masked_rows", [True, pytest.param(False, marks=pytest.mark.long)], ids=["masked rows", "none"]
)
@pytest.mark.parametrize("decoding", [pytest.param("verified", marks=pytest.mark.long), "auto"])
def test_the_text_is_ars(decoding, has_masked_rows, lagging):
    """In batches, at both temperatures, with penalties, end tokens and pages for two of six requests."""
    prompts, params = requests_of(2)
    texts = {}
    for mode in ("autoregressive", decoding):
        engine = stub_engine(
            REPEATING,
            lagging=lagging,
            has_masked_rows=has_masked_rows,
            num_pages=30,
            max_num_seqs=5,
            clock=lambda: 0.0,
        )
        with_costs(engine, [(1, 1.0), (1000, 1.1)])
        asked = [replace(one, decoding=mode) for one in params]
        done = serve(engine, prompts, asked)
        texts[mode] = [request.output_token_ids for request in done]
        if mode == decoding:
            assert sum(request.counters.num_lookup_accepted for request in done) > 3
            assert sum(request.progress.num_preemptions for request in done) > 0
    assert texts[decoding] == texts["autoregressive"]


@pytest.mark.parametrize("lagging", [False, True], ids=["direct", "lagging"])
def test_a_text_that_repeats_itself_takes_few_steps(lagging):
    """A model without masked rows; lagging engines look up one step late, and lose little by it."""
    engine = stub_engine(StubModel(period=4, agreement=50.0), lagging=lagging, has_masked_rows=False)
    (request,) = serve(engine, [[1, 2]], [SamplingParams(decoding="verified", max_tokens=100)])
    check_outcome(engine.runner.eager.model, request, lagging)
    stats = RequestStats.of(request)
    assert stats.tokens_per_forward > 5
    assert stats.num_accepted == stats.num_lookup_accepted <= stats.num_lookup_drafted == stats.num_drafted
    assert stats.num_rows == stats.num_forwards + stats.num_drafted
    assert stats.num_tokens <= stats.num_forwards + stats.num_accepted  # max_tokens cuts the last step


def test_drafts_of_both_kinds_are_counted():
    engine = stub_engine(StubModel(agreement=12.0))
    params = SamplingParams(decoding="verified", max_tokens=60, wedlm_draft_entropy=10.0, wedlm_lookup_drafts=15)
    (request,) = serve(engine, [[1, 2, 3]], [params])
    counters = request.counters
    assert 0 < counters.num_lookup_drafted < counters.num_drafted
    assert counters.num_lookup_accepted < counters.num_accepted <= counters.num_drafted
    assert request.num_output_tokens == counters.num_forwards + counters.num_accepted


def test_no_drafts_from_the_text_where_none_were_asked_for():
    for options in (
        {"decoding": "verified"},
        {"decoding": "auto", "wedlm_lookup_drafts": 0},
        {"decoding": "autoregressive", "wedlm_lookup_drafts": 9},
        {"decoding": "streaming", "wedlm_lookup_drafts": 9},
    ):
        engine = stub_engine(REPEATING)
        (request,) = serve(engine, [[1, 2, 1, 2, 1, 2]], [SamplingParams(max_tokens=30, **options)])
        check_outcome(REPEATING, request)
        assert request.counters.num_lookup_drafted == 0


def test_the_engines_number_holds_where_a_request_names_none():
    params = SamplingParams(decoding="verified", wedlm_window_size=9)

    def most(default: int | None, asked: int | None, has_masked_rows: bool = True) -> int:
        options = EngineOptions(wedlm_lookup_drafts=default)
        config = EngineConfig(13, 12, (), 99, options, has_masked_rows=has_masked_rows)
        return decode_params(config, 3, replace(params, wedlm_lookup_drafts=asked)).max_lookup

    assert [most(None, None), most(None, None, False), most(4, None), most(4, 2), most(0, None, False)] == [
        0,
        8,
        4,
        2,
        0,
    ]
    with pytest.raises(ValueError, match="wedlm_lookup_drafts is -1; expected an integer >= 0"):
        EngineOptions(wedlm_lookup_drafts=-1)


def test_the_widest_window_looks_up_no_more_than_is_of_use():
    engine = stub_engine(REPEATING, has_masked_rows=False)
    params = SamplingParams(
        max_tokens=20, decoding="verified", wedlm_window_size=2**31 - 1, wedlm_lookup_drafts=2**31 - 1
    )
    request = engine.add("one", [1, 2, 1, 2], params)
    engine.step()
    assert request.limits.proposal is not None
    assert len(request.limits.proposal.tokens) == 2 * MOST_LOOKUP_DRAFTS + 1


def test_what_a_text_has_shown_is_not_kept_for_longer_than_it_runs():
    engine = stub_engine(REPEATING)
    done = serve(engine, [[1, 2, 3, 1, 2, 3]], [SamplingParams(max_tokens=9)])
    other = engine.add("aborted", [1, 2, 3, 1, 2, 3], SamplingParams(max_tokens=9))
    engine.step()
    engine.step()
    assert other.limits.lookup is not None
    engine.abort("aborted")
    assert all(one.limits.lookup is None and one.limits.proposal is None for one in (*done, other))


@needs_native
def test_native_steps_take_them():
    model = NativeModel()
    for seed in range(2):
        prompts, params = requests_of(seed)
        prompts = [[token % model.vocab_size for token in prompt] * 2 for prompt in prompts]
        params = [replace(one, decoding="verified") for one in params]
        engine = stub_engine(model, num_pages=60)
        for i, both in enumerate(zip(prompts, params, strict=True)):
            engine.add(str(i), *both)
        done = []
        while engine.has_work:
            done += [request for request in engine.step() if request.finish_reason is not None]
            check_engine(engine, model)
        for request in done:
            if request.output.constraint is None:
                check_outcome(model, request)
        assert sum(request.counters.num_lookup_drafted for request in done) > 0
