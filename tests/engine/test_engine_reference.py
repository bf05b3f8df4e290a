# SPDX-License-Identifier: Apache-2.0
"""The engine with a real transformer (tiny, random, float32) against reference.py, token for token."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.engine.random_transformer import LENGTH, make_engine, random_model, requests_of
from tests.engine.stub_engine import known_of
from wedlm.algorithm import reference
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Transformer, pack_for_inference


@pytest.fixture(scope="module")
def model() -> Transformer:
    return pack_for_inference(random_model())


@pytest.fixture(scope="module")
def decode(model) -> Callable:
    """reference.py, which is asked for each request several times."""

    def rows_model(tokens: list[int], positions: list[int], num_masked: int) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor(tokens), torch.tensor(positions), CausalAttend())

    return cache(lambda prompt, *rest: reference.decode(rows_model, list(prompt), *rest))


@pytest.mark.parametrize(
    "page_size", [pytest.param(1, marks=pytest.mark.long), 16, pytest.param(256, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "preempting"])
def test_engine_equals_reference(model, decode, page_size, tight):
    """Two rounds of the same requests: the second finds the first's pages in the prefix cache."""
    num_pages = -(-LENGTH * (2 if tight else 8) // page_size)
    engine = make_engine(model, page_size, num_pages)
    finished, reused = [], []
    for turn in range(2):
        for i, (prompt, params) in enumerate(requests_of(seed=page_size)):
            engine.add(f"{turn}-{i}", prompt, params)
        while engine.has_work:
            finished += [request for request in engine.step() if request.finish_reason is not None]
            engine.pool.check_integrity()
        reused.append(sum(request.progress.num_reused for request in finished))
    for request in finished:
        prefix, suffix = known_of(request)
        expected = decode(tuple(prefix), request.max_tokens, request.decode, None, suffix)
        assert request.output_token_ids == expected.tokens
        assert request.counters.num_rows == sum(expected.rows)
    assert len(finished) == 24
    assert sum(bool(request.params.suffix_token_ids) for request in finished) > 4
    if page_size <= 16 and not tight:
        assert reused[1] > 2 * reused[0]
    if tight and page_size == 1:
        assert sum(request.progress.num_preemptions for request in finished) > 0


def test_log_probabilities_are_the_models(model):
    """Of AR decoding, where each can be recomputed in one forward over the whole text."""
    engine = make_engine(model, 16, 32)
    request = engine.add("a", [1, 2, 3], SamplingParams(decoding="verified", logprobs=3, max_tokens=20))
    while engine.has_work:
        engine.step()
    tokens = torch.tensor(request.output.tokens)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(tokens, torch.arange(len(tokens)), CausalAttend()), dim=-1)
    expected = logprobs[2:-1].gather(1, tokens[3:, None])[:, 0]
    assert torch.allclose(torch.tensor(request.output.logprobs), expected, atol=1e-4)
    top = logprobs[2:-1].topk(3)
    for i, reported in enumerate(request.output.top_logprobs):
        assert [token for token, _ in reported] == top.indices[i].tolist()
        assert torch.allclose(torch.tensor([value for _, value in reported]), top.values[i], atol=1e-4)
