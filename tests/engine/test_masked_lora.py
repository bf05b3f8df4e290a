# SPDX-License-Identifier: Apache-2.0
"""The engine with an adapter of masked rows: equal to reference.py, and AR text is that of the base."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.engine.native_model import attach_random
from tests.engine.random_transformer import CONFIG, LENGTH, VOCAB, make_engine, random_model, requests_of
from tests.engine.stub_engine import known_of
from wedlm.algorithm import reference
from wedlm.attention.sdpa import CausalAttend, PagedSdpa
from wedlm.engine.engine import Engine
from wedlm.engine.request import Request
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Transformer, pack_for_inference


def model_of(adapter: bool) -> Transformer:
    """The base of test_engine_reference's tests, with or without a random LoRA for masked rows."""
    model = random_model()
    if adapter:
        attach_random(model)
    return pack_for_inference(model)


@pytest.fixture(scope="module")
def base() -> Transformer:
    return model_of(adapter=False)


@pytest.fixture(scope="module")
def adapted() -> Transformer:
    return model_of(adapter=True)


@pytest.fixture(scope="module")
def decode(adapted) -> Callable:
    """reference.py, which is asked for each request several times."""

    def rows_model(tokens: list[int], positions: list[int], num_masked: int) -> Tensor:
        masked = torch.arange(len(tokens)) >= len(tokens) - num_masked
        with torch.inference_mode():
            return adapted(torch.tensor(tokens), torch.tensor(positions), CausalAttend(), masked=masked)

    return cache(lambda prompt, *rest: reference.decode(rows_model, list(prompt), *rest))


def finish(engine: Engine, requests: list[tuple[list[int], SamplingParams]], apart: int = 0) -> list[Request]:
    """All requests; with ``apart`` they arrive so many steps after each other."""
    added = []
    for i, (prompt, params) in enumerate(requests):
        added.append(engine.add(f"{len(engine.requests)}-{i}-{id(added)}", prompt, params))
        for _ in range(apart):
            engine.step()
    while engine.has_work:
        engine.step()
        engine.pool.check_integrity()
    return added


@pytest.mark.parametrize("tight", [False, pytest.param(True, marks=pytest.mark.long)], ids=["roomy", "preempting"])
def test_engine_equals_reference(adapted, decode, tight):
    """Every mode but auto; prompts hold the mask token as an ordinary one, too; the second round reuses pages."""
    engine = make_engine(adapted, 16, -(-LENGTH * (2 if tight else 8) // 16))
    requests = finish(engine, requests_of(seed=16)) + finish(engine, requests_of(seed=16))
    for request in requests:
        prefix, suffix = known_of(request)
        expected = decode(tuple(prefix), request.max_tokens, request.decode, None, suffix)
        assert request.output_token_ids == expected.tokens
        assert request.counters.num_rows == sum(expected.rows)
    assert any(CONFIG.vocab_size - 1 in request.prompt_token_ids for request in requests)
    assert sum(request.progress.num_reused for request in requests) > 0


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
def test_verified_text_is_the_bases_ar_text(base, adapted, seed):
    """Random histories: arrivals, chunks, preemptions, page sizes, neighbours in other modes, a grammar of biases."""
    rng = random.Random(seed)
    requests, asked = [], []
    for i in range(10):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 20, 50]))]
        params = SamplingParams(
            decoding=rng.choice(["verified", "auto", "autoregressive", "streaming"]),
            max_tokens=rng.choice([4, 25]),
            temperature=rng.choice([0.0, 0.8]),
            seed=i,
            logit_bias=rng.choice([None, {3: 2.0, 9: -1.0}]),
            wedlm_window_size=rng.choice([2, 6, 16]),
            wedlm_draft_entropy=rng.choice([1.5, 4.0]),
        )
        requests.append((prompt, params))
        asked.append(params.decoding != "streaming")
    page_size = rng.choice([1, 16])
    found = finish(make_engine(adapted, page_size, -(-2 * LENGTH // page_size), 3), requests, apart=rng.choice([0, 2]))
    ar = [(prompt, replace(params, decoding="autoregressive")) for prompt, params in requests]
    expected = finish(make_engine(base, 16, 8 * LENGTH // 16), ar)
    assert sum(asked) > 3
    for request, other, is_ar_text in zip(found, expected, asked, strict=True):
        if is_ar_text:
            assert request.output_token_ids == other.output_token_ids


def test_observed_rows_are_the_bases_bit_for_bit(base, adapted):
    """Logits and keys of each step, with the base run on the same rows over the same cache."""
    engine = make_engine(adapted, 16, 8 * LENGTH // 16)
    seen = {"observed": 0, "masked": 0}

    def both(tokens: Tensor, positions: Tensor, attend: PagedSdpa, wanted: Tensor, masked: Tensor | None) -> Tensor:
        expected = base(tokens, positions, attend, wanted)
        slots = attend.new_slots
        keys = engine.runner.cache.keys[:, slots].clone()
        logits = adapted(tokens, positions, attend, wanted, masked)
        is_masked = torch.zeros(len(tokens), dtype=torch.bool)
        if masked is not None:
            is_masked[masked] = True
        assert torch.equal(engine.runner.cache.keys[:, slots][:, ~is_masked], keys[:, ~is_masked])
        assert torch.equal(logits[~is_masked[wanted]], expected[~is_masked[wanted]])
        changed = (logits != expected).any(dim=1)
        assert torch.equal(changed, is_masked[wanted])
        seen["observed"] += int((~is_masked[wanted]).sum())
        seen["masked"] += int(changed.sum())
        return logits

    engine.runner.eager.model = both
    finish(engine, requests_of(seed=3), apart=1)
    assert min(seen.values()) > 100
