# SPDX-License-Identifier: Apache-2.0
"""Random requests, and histories of an engine that gets, steps, aborts and preempts them."""

import random
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import replace
from typing import Any

from tests.engine.native_model import NativeModel
from tests.engine.stub_engine import check_engine, check_outcome, preempt_last, stub_engine
from tests.stub import StubModel
from wedlm.algorithm.params import DECODINGS, NEXT_TOKENS, REMASKINGS
from wedlm.engine.engine import Engine
from wedlm.engine.plan import StepPlan
from wedlm.engine.sampling_params import GAP_DECODINGS, SamplingParams

MODEL = StubModel()


def random_params(rng: random.Random, block_length: int = 1) -> SamplingParams:
    return SamplingParams(
        decoding=rng.choice(DECODINGS) if block_length == 1 else None,
        remasking_strategy=rng.choice([None, *REMASKINGS]),  # of block decoding; the others take no notice of it
        confidence_threshold=rng.choice([0.3, 0.85]),
        denoising_steps=rng.choice([None, None, 2, 3]),
        max_tokens=rng.randint(1, 25),
        min_tokens=rng.choice([0, 0, 1]),
        temperature=rng.choice([0.0, 0.0, 1.0]),
        top_k=rng.choice([0, 0, 3]),
        top_p=rng.choice([1.0, 1.0, 0.8]),
        seed=rng.randrange(2**63),
        stop_token_ids=rng.choice([(), (), (3,), (3, 5)]),
        logprobs=rng.choice([None, None, 2]),
        wedlm_window_size=rng.randint(1, 9) if block_length == 1 else None,
        wedlm_entropy_threshold=rng.choice([None, 0.4, 1.5]),
        wedlm_next_token=rng.choice(NEXT_TOKENS),
        wedlm_draft_entropy=rng.choice([0.5, 1.5, 5.0]),
        wedlm_lookup_drafts=rng.choice([None, None, 0, 3, 20]),
    )


def random_prompt(rng: random.Random, stems: list[list[int]], model: StubModel | NativeModel) -> list[int]:
    """Prompts share stems, so that prefix reuse happens; the mask id occurs as an ordinary token."""
    stem = rng.choice(stems)
    tail = [rng.randrange(model.vocab_size) for _ in range(rng.choice([0, 1, 3, 9]))]
    return (stem[: rng.randint(0, len(stem))] + tail) or [model.mask_token_id]


def with_gap(rng: random.Random, prompt: list[int], params: SamplingParams) -> tuple[list[int], SamplingParams]:
    """Some prompts, cut in two at any place, for a request that fills the gap: of the tokens of other ones, which stand
    at other positions."""
    if params.decoding not in GAP_DECODINGS or rng.random() < 0.4:
        return prompt, params
    at = rng.randrange(len(prompt))
    return prompt[:at], replace(params, suffix_token_ids=prompt[at:])


def run_history(seed: int, model: StubModel | NativeModel) -> dict[str, int]:
    """One history; returns how often each interesting thing happened."""
    rng, other_rng = random.Random(seed), random.Random(-1 - seed)
    native = model if isinstance(model, NativeModel) else None
    page_size = rng.choice([1, 1, 2, 4, 16])
    lagging, has_masked_rows = rng.random() < 0.5, rng.random() < 0.8
    engine = stub_engine(
        model,
        lagging=lagging,
        has_masked_rows=has_masked_rows,
        page_size=page_size,
        num_pages=-(-90 // page_size) + rng.randint(0, 60 // page_size),
        max_num_seqs=rng.randint(1, 5),
        max_num_batched_tokens=rng.choice([18, 24, 64]),
        scheduling_policy=other_rng.choice(["fcfs", "priority"]),
    )
    stems = [[rng.randrange(model.vocab_size) for _ in range(30)] for _ in range(2)]
    finished, aborted, added = [], 0, 0
    first_windows = first_windows_of(engine)
    preempted = reused = looked_up = gaps = preempted_gaps = reused_gaps = 0
    for _ in range(rng.randint(5, 40)):
        action = rng.random()
        if action < 0.3:
            turn = rng.choice([0, 0, 1, 3])
            prompt, params = random_prompt(rng, stems, model), random_params(rng, model.block_length)
            if has_masked_rows and model.block_length == 1:
                prompt, params = with_gap(rng, prompt, params)
            params = replace(params, priority=other_rng.choice([0, 0, 5, -5]))
            engine.add(f"r{added}", prompt, params, turn=turn)
            added += 1
        elif action < 0.36 and engine.requests:
            engine.abort(rng.choice(list(engine.requests)))
            aborted += 1
        elif not (action < 0.42 and preempt_last(engine)):
            finished += step(engine)
        check_engine(engine, native)
    while engine.has_work:
        finished += step(engine)
        check_engine(engine, native)
    assert engine.pool.num_available == engine.pool.num_pages
    assert len(finished) + aborted == added
    for request in finished:
        check_outcome(model, request, lagging)
        looked_up += request.counters.num_lookup_accepted
        preempted += request.progress.num_preemptions
        reused += request.progress.num_reused
        if request.params.suffix_token_ids:
            gaps += 1
            preempted_gaps += request.progress.num_preemptions > 0
            reused_gaps += request.progress.num_reused > request.decode.prefix_length
        if request.params.logprobs is not None:
            assert len(request.output.top_logprobs) == len(request.output.logprobs) == request.num_output_tokens
    counts = {"finished": len(finished), "aborted": aborted, "preempted": preempted, "reused": reused}
    counts |= {"first windows beside their chunks": sum(first_windows)}
    counts |= {"gaps": gaps, "preempted gaps": preempted_gaps, "suffixes reused": reused_gaps}
    return counts | {"accepted from the text": looked_up}


def first_windows_of(engine: Engine) -> list[int]:
    """For each plan that the engine will make: how many requests have both their last chunk and their first window in
    it."""
    counts: list[int] = []
    schedule = engine.scheduler.schedule

    def noted(*args: Any) -> StepPlan | None:
        plan = schedule(*args)
        if plan is not None:
            counts.append(num_first_windows(plan))
        return plan

    engine.scheduler.schedule = noted  # type: ignore[method-assign]
    return counts


def num_first_windows(plan: StepPlan) -> int:
    windows = {one.request.request_id for one in plan.scheduled if one.is_window}
    chunks = [one for one in plan.scheduled if not one.is_window and one.request.request_id in windows]
    assert all(one.start + one.count == one.request.progress.window.cached for one in chunks)
    assert len({one.request.request_id for one in plan.scheduled}) == len(plan.scheduled) - len(chunks)
    return len(chunks)


def step(engine: Engine) -> list:
    return [request for request in engine.step() if request.finish_reason is not None]


def run_histories(seeds: range, model: StubModel | NativeModel = MODEL) -> dict[str, int]:
    rare = {"accepted from the text"}  # texts that repeat themselves have a test of their own
    never = set() if model.block_length == 1 else {*rare, "gaps", "preempted gaps", "suffixes reused"}
    totals = add_up((run_history(seed, model) for seed in seeds), rare | never)
    assert not any(totals.pop(name) for name in never)
    return totals


def add_up(histories: Iterable[dict[str, int]], rare: Set[str] = frozenset()) -> dict[str, int]:
    """How often each thing happened in all of them. Each must have, but for ``rare`` ones: a history in which nothing
    happens proves nothing."""
    totals: Counter[str] = Counter()
    for counts in histories:
        totals.update(counts)
    assert all(value for name, value in totals.items() if name not in rare), totals
    return dict(totals)
