# SPDX-License-Identifier: Apache-2.0
"""Steps in the native library against ``EagerStep`` with the same model, their slow twin."""

import random
from typing import Any

import pytest
import torch

from tests.engine.histories import first_windows_of, random_params, random_prompt, with_gap
from tests.engine.native_model import NativeModel, needs_native
from tests.engine.stub_engine import check_engine, check_outcome, stub_engine
from tests.native.shapes import parts_of
from wedlm.engine.engine import Engine
from wedlm.engine.execution.base import StepExecutor
from wedlm.engine.execution.native_step import NativeStep
from wedlm.engine.plan import StepPlan
from wedlm.engine.sampling_params import SamplingParams
from wedlm.native import NativeError, decoder

pytestmark = needs_native


class Both:
    """Runs each step in both ways, from the same windows and cache, and compares what they leave."""

    runs_ahead = False
    has_padded_costs = False

    def __init__(self, engine: Engine) -> None:
        self.native, self.eager = engine.runner.executors
        self.windows, self.cache = engine.runner.windows, engine.runner.cache
        self.num_windows = self.num_tokens = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)

    def launch(self, plan: StepPlan) -> Any:
        new = [one.request for one in plan.scheduled]
        self.windows.load(new)
        before = self.windows.state.take(torch.arange(self.windows.num_slots))
        cached = [part.clone() for part in parts_of(self.cache)]
        top = {name: {at: list(one) for at, one in kept.items()} for name, kept in self.windows.top_logprobs.items()}
        expected = self.eager.launch(plan).wait()
        after = self.windows.state.take(torch.arange(self.windows.num_slots))
        kept = [part.clone() for part in parts_of(self.cache)]
        self.windows.state.put(torch.arange(self.windows.num_slots), before)
        for part, before_it in zip(parts_of(self.cache), cached, strict=True):
            part.copy_(before_it)
        self.windows.top_logprobs.clear()
        self.windows.top_logprobs.update(top)
        pending = self.native.launch(plan)
        found = pending.wait()
        # Without log-probabilities asked for, those of the eager step mean nothing.
        reports = any(one.is_window and one.request.params.logprobs is not None for one in plan.scheduled)
        for one, other in zip(found, expected, strict=True):
            if one is None or other is None:
                assert one is other
                continue
            assert (one.tokens, one.num_rows, one.num_cached) == (other.tokens, other.num_rows, other.num_cached)
            assert one.num_drafts == other.num_drafts
            assert not reports or one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            for mine, its in zip(one.top_logprobs, other.top_logprobs, strict=True):
                assert [value for _, value in mine] == pytest.approx([value for _, value in its], abs=1e-5)
            self.num_windows += 1
            self.num_tokens += len(one.tokens)
        state = self.windows.state
        column = torch.arange(state.tokens.shape[1])
        assert torch.equal(state.cached, after.cached)
        assert torch.equal(state.width, after.width)
        assert torch.equal(state.filled, after.filled)
        assert not (state.filled & (column >= state.width[:, None])).any()
        assert torch.equal(state.tokens * state.filled, after.tokens * after.filled)
        assert not reports or torch.allclose(state.logprobs * state.filled, after.logprobs * after.filled, atol=1e-5)
        assert all(map(torch.equal, parts_of(self.cache), kept))
        return pending


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "adapter, cache in int8"])
def model(request) -> NativeModel:
    return NativeModel(adapter=request.param, cache_dtype=torch.int8 if request.param else torch.float32)


@pytest.mark.parametrize("seed", range(12))
def test_every_step_is_the_eager_ones(model, seed):
    """Mixed modes, temperatures, windows, log-probabilities, chunks beside windows, pages of any size."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 4, 16])
    engine = stub_engine(
        model, page_size=page_size, num_pages=-(-400 // page_size), max_num_seqs=4,
        max_num_batched_tokens=rng.choice([20, 64]), max_model_len=rng.choice([60, 200]),
    )  # fmt: skip
    assert isinstance(engine.runner.executors[0], NativeStep)
    both = Both(engine)
    executors: tuple[StepExecutor, ...] = (both, both.eager)  # type: ignore[assignment]
    engine.runner.executors = executors
    engine.runner._direct = list(executors)
    stems = [[rng.randrange(model.vocab_size) for _ in range(30)] for _ in range(2)]
    for number in range(8):
        engine.add(f"r{number}", *with_gap(rng, random_prompt(rng, stems, model), random_params(rng)))
        engine.step()
    while engine.has_work:
        engine.step()
    assert both.num_windows > 20
    assert both.num_tokens > 20


def test_a_failed_forward_leaves_the_windows(model):
    """The step can be run again: what it was to change is as it was."""
    engine = stub_engine(model)
    request = engine.add("r", [1, 2, 3], random_params(random.Random(3)))
    engine.step()
    step = engine.runner.executors[0]
    assert isinstance(step, NativeStep)
    before = engine.runner.windows.state.take(torch.arange(1))
    pages = step.decoder._num_pages.copy()
    step.decoder._num_pages[:] = 0
    with pytest.raises(NativeError, match="a sequence has 0 pages; expected enough"):
        step.decoder.run()
    step.decoder._num_pages[:] = pages
    for name in ("cached", "width", "tokens", "filled", "logprobs"):
        assert torch.equal(getattr(engine.runner.windows.state.take(torch.arange(1)), name), getattr(before, name))
    while engine.has_work:
        engine.step()
    assert request.finish_reason == "length"


def test_a_choice_that_is_forced(model):
    """Benchmarks put their own choice in the place of the model's."""
    engine = stub_engine(model)
    step = engine.runner.executors[0]
    assert isinstance(step, NativeStep)
    step.force_choice = lambda state, results, params: torch.full_like(results.choice, 7)
    request = engine.add("r", [1, 2, 3], random_params(random.Random(1)))
    while engine.has_work:
        engine.step()
    assert set(request.output_token_ids) == {7}


def test_views_of_nothing():
    assert decoder._view(None, float, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("decoding", ["autoregressive", "verified", "streaming"])
@pytest.mark.parametrize("is_eager", [False, True])
def test_a_first_window_sees_all_of_a_long_chunk(model, decoding, is_eager):
    """The library runs 256 rows in a turn, and the first ends before, within or behind the window."""
    for length in (225, 250, 257):
        engine = stub_engine(model, num_pages=70, max_num_batched_tokens=512, max_model_len=280)
        if is_eager:
            engine.runner._direct = [engine.runner.eager]
        params = SamplingParams(decoding=decoding, max_tokens=3, wedlm_window_size=8)
        request = engine.add("one", [1 + (5 * i * i) % 11 for i in range(length)], params)
        first_windows = first_windows_of(engine)
        while engine.has_work:
            engine.step()
            check_engine(engine, model)
        assert first_windows[0] == 1
        check_outcome(model, request)
