# SPDX-License-Identifier: Apache-2.0
"""The engine on device steps against the engine on the plain runner: same text, steps and rows in every mode."""

import math
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from tests.engine.histories import num_first_windows
from tests.kernels.graph_engine import LENGTH, MASK, engine, factors, few_rows_beside_chunks, outcomes
from tests.model.tiny import our_model
from wedlm.algorithm.params import DECODINGS, NEXT_TOKENS, REMASKINGS
from wedlm.engine import factory
from wedlm.engine.execution.captured_step import CapturedStep
from wedlm.engine.execution.graphs import padding_shape, step_shape
from wedlm.engine.execution.sampling_tensors import BatchFlags
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import GAP_DECODINGS, SamplingParams
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.inference.triton_transformer import FusedTransformer
from wedlm.model.lora.row_factors import RowFactors


@pytest.fixture(autouse=True)
def few_rows(device, monkeypatch):
    few_rows_beside_chunks(device, monkeypatch)


# Padding rows are whatever lay in memory, and the interpreter reports what a GPU ignores.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN slice):RuntimeWarning")


@pytest.mark.parametrize(
    ("decoding", "temperature"),
    [("verified", 0.0), ("streaming", 0.0), pytest.param(None, 0.8, marks=pytest.mark.long)],
)
def test_same_as_runner(device, decoding, temperature):
    check_same_as_runner(device, decoding, temperature, num_requests=2, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("decoding", ["verified", "streaming"])
def test_same_as_runner_with_factors_for_masked_rows(device, decoding):
    check_same_as_runner(device, decoding, 0.0, num_requests=2, seed=1, masked_lora=True)


@pytest.mark.long
@pytest.mark.parametrize("decoding", ["verified", "streaming"])
def test_same_as_runner_with_adapters_by_name(device, decoding):
    check_same_as_runner(device, decoding, 0.0, num_requests=4 if decoding == "streaming" else 2, seed=2, by_name=True)


@pytest.mark.long
@pytest.mark.parametrize("masked_lora", [False, True])
def test_adapters_that_come_and_go_between_steps(device, masked_lora):
    """Captured steps hold the memory of the factors: a larger one, and one in the place of another."""
    texts = {}
    for graphs in (False, True):
        one = engine(device, graphs, masked_lora=masked_lora)
        for name, factor in zip("abc", factors(), strict=True):
            for loaded in one.adapters.names[:1] if name == "c" else []:
                one.unload_adapter(loaded)
            one.load_adapter(name, RowFactors(factor))
            params = SamplingParams(decoding="verified", max_tokens=3)
            done = [one.add(f"{name}{i}", [1, 2, i], params, adapter=name) for i in range(2)]
            while one.has_work:
                one.step()
            texts[graphs, name] = [request.output_token_ids for request in done]
    assert [texts[True, name] for name in "abc"] == [texts[False, name] for name in "abc"]


@pytest.mark.long
@pytest.mark.parametrize("decoding", [*DECODINGS, None])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_same_as_runner_longer(device, decoding, temperature, seed):
    kinds = {"masked_lora": seed == 2, "by_name": seed > 0}
    check_same_as_runner(device, decoding, temperature, num_requests=9, seed=seed, **kinds)


def check_same_as_runner(device, decoding, temperature, num_requests, seed, **kinds):
    rng = random.Random(f"{decoding}{temperature}{seed}")
    requests = [
        (
            [rng.randrange(80) for _ in range(rng.randint(1, 9))],
            SamplingParams(
                decoding=decoding or rng.choice(DECODINGS),
                max_tokens=rng.randint(1, 2 + 2 * num_requests),
                min_tokens=rng.choice([0, 1]),
                temperature=temperature if rng.random() < 0.7 else 0.0,
                top_k=rng.choice([0, 3]),
                seed=rng.randrange(99),
                logprobs=2 if rng.random() < 0.2 else None,
                wedlm_window_size=rng.choice([1, 4, 6, 9]),
                wedlm_entropy_threshold=rng.choice([None, 1.5]),
                wedlm_next_token=rng.choice(NEXT_TOKENS),
                remasking_strategy=rng.choice(REMASKINGS),  # of block decoding
                confidence_threshold=rng.choice([0.1, 0.85]),
                denoising_steps=rng.choice([None, 2]),
                wedlm_draft_entropy=rng.choice([2.0, 5.0]),
            ),
        )
        for _ in range(num_requests)
    ]
    for number, (prompt, params) in enumerate(requests):
        if params.decoding in GAP_DECODINGS and number % 2 == 0:  # fills the gap before a suffix
            requests[number] = prompt, replace(params, suffix_token_ids=[7, 8, 9, 10][: 1 + seed])
    expected, logprobs = outcomes(engine(device, False, **kinds), requests)
    actual, others = outcomes(engine(device, True, **kinds), requests)
    for one, other, (_, params) in zip(actual, expected, requests, strict=True):
        if params.decoding == "auto":  # how many steps it takes depends on the load
            assert (one[0], one[3]) == (other[0], other[3])
        else:
            assert one == other
    for one, other in zip(logprobs, others, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-3, atol=1e-4)


def test_the_steps_that_are_timed_have_no_masked_rows(device, monkeypatch):
    one = engine(device, True, masked_lora=True)
    (captured,) = (executor for executor in one.runner.executors if isinstance(executor, CapturedStep))
    called, forward = [], FusedTransformer.__call__
    monkeypatch.setattr(FusedTransformer, "__call__", lambda *given: called.append(given) or forward(*given))
    null = torch.full((1,), captured.windows.null_slot, dtype=torch.long, device=device)
    captured.step(padding_shape(4), null)
    ((*_, masked, adapters),) = called
    assert masked is None
    assert adapters is None


@pytest.mark.parametrize("captures", [True, False])
def test_whether_chunks_are_captured_is_the_configurations(device, monkeypatch, captures):
    monkeypatch.setattr(factory, "eager_reason", lambda *_: None)
    options = EngineOptions(capture_chunks=captures, kv_cache_bytes=2**20)
    config = EngineConfig(96, MASK, (5,), LENGTH, options)
    blueprint = factory.plan_engine(pack_for_inference(our_model("wedlm-qwen3").to(device)), config, None)
    one = blueprint.build()
    assert one.config.options.chunk_step_ratio == (1.8 if captures else math.inf)
    assert one.config.window_size("auto") == 64
    one.add("prompt", list(range(20)), SamplingParams(decoding="autoregressive"))
    plan = one.scheduler.schedule()
    assert [work.is_window for work in plan.scheduled] == [True, False]
    assert one.runner.can_launch(plan) == blueprint.rebuild(one).runner.can_launch(plan) == captures


@pytest.mark.long
def test_a_wide_window_and_a_later_common_one(device):
    params = [SamplingParams(decoding="streaming", wedlm_window_size=w, max_tokens=n) for w, n in ((33, 1), (2, 3))]
    requests = [([3, 4, 5], one) for one in params]
    captured, plain = (engine(device, graphs, length=80, most_rows=80) for graphs in (True, False))
    assert captured.runner.windows.state.tokens.shape[1] == 64
    assert outcomes(captured, requests)[0] == outcomes(plain, requests)[0]
    assert captured.runner.windows.state.tokens.shape[1] == 128  # the first did not fit


def test_logits_of_a_window_wider_than_any_step(device):
    """They are limited by the rows that it has, beside its prompt's chunk and alone."""
    one = engine(device, True)
    one.add("wide", [7, 8, 9], SamplingParams(decoding="streaming", wedlm_window_size=5000))
    window, chunk = one.scheduler.schedule(None).scheduled
    flags = BatchFlags.of([window.request.decode])
    for chunks in ([chunk], []):
        shape = step_shape([window], chunks, flags)
        assert shape.num_logits == shape.num_window_rows == 64


@pytest.mark.long
def test_a_window_wider_than_any_step(device):
    params = SamplingParams(decoding="streaming", max_tokens=3, wedlm_window_size=5000)
    captured, plain = (outcomes(engine(device, graphs), [([7, 8, 9], params)])[0] for graphs in (True, False))
    assert captured == plain


@pytest.mark.long
@pytest.mark.parametrize("decodings", [("verified", "auto"), ("streaming", "verified")])
def test_long_prompts_beside_windows(device, monkeypatch, decodings):
    shares, first_windows = [], 0
    launch = CapturedStep.launch

    def noted(self, plan):
        nonlocal first_windows
        first_windows += num_first_windows(plan)
        windows = sum(work.is_window for work in plan.scheduled)
        shares.append((windows, [work.start for work in plan.scheduled[windows:]]))
        return launch(self, plan)

    monkeypatch.setattr(CapturedStep, "launch", noted)
    requests = [
        ([7 + i for i in range(length)], SamplingParams(decoding=name, max_tokens=tokens, wedlm_window_size=3))
        for length, name, tokens in zip((20, 26, 22), (*decodings, decodings[0]), (6, 2, 2), strict=True)
    ]
    engines = [engine(device, graphs) for graphs in (True, False)]
    for one in engines:
        one.scheduler.max_num_batched_tokens = 18  # so that a prompt takes several steps
    actual, expected = (outcomes(one, requests)[0] for one in engines)
    assert [one[::3] for one in actual] == [one[::3] for one in expected]
    assert any(windows and max(starts, default=0) for windows, starts in shares), "no later chunk beside windows"
    assert any(starts and not windows for windows, starts in shares), "no chunks alone"
    assert first_windows, "no first window beside its own chunk"


@pytest.mark.long
def test_drafts_from_the_text(device):
    """Proposed one step late, as the host reads; the text is AR's."""
    prompts, texts = [[3, 4, 5, 6] * 3, [9, 8, 9, 8, 7]], []
    for decoding in ("autoregressive", "verified"):
        one = engine(device, graphs=decoding == "verified")
        params = SamplingParams(decoding=decoding, max_tokens=6, wedlm_window_size=6, wedlm_lookup_drafts=4)
        done = [one.add(str(number), prompt, params) for number, prompt in enumerate(prompts)]
        while one.has_work:
            one.step()
            one.pool.check_integrity()
        texts.append([request.output_token_ids for request in done])
    assert texts[0] == texts[1]
    assert sum(request.counters.num_lookup_drafted for request in done) > 0


def test_windows_of_auto_have_few_shapes(device):
    """Their rows change from step to step, and each shape is captured once."""
    one = engine(device, True, most_rows=64)
    for decoding, shapes in (("auto", {1, 4, 16, 64}), ("verified", {1, 2, 4, 8, 16, 24, 32, 48, 64})):
        one.add(decoding, [7, 8, 9], SamplingParams(decoding=decoding))
        window = next(work for work in one.scheduler.schedule(None).scheduled if work.request.request_id == decoding)
        flags = BatchFlags.of([window.request.decode])
        several = [replace(window, count=count) for count in range(1, 65)]
        assert {step_shape([work], [], flags).max_rows for work in several} == shapes
