# SPDX-License-Identifier: Apache-2.0
"""The engine with a real transformer (tiny, random, float32) against reference.py, token for token."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.engine.stub_engine import build, known_of
from wedlm.algorithm import reference
from wedlm.algorithm.params import DECODINGS, NEXT_TOKENS
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.engine import Engine
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import GAP_DECODINGS, SamplingParams
from wedlm.model import ModelConfig, Transformer, pack_for_inference

VOCAB, MASK, END, LENGTH = 40, 39, 7, 96
CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=LENGTH,
    qk_norm=True,
)


def random_model(config: ModelConfig = CONFIG, seed: int = 0, std: float = 0.35) -> Transformer:
    """Weights large enough that predictions differ in confidence, as a trained model's do; not packed."""
    torch.manual_seed(seed)
    transformer = Transformer(config).eval()
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=std)
    return transformer


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


def make_engine(model: Transformer, page_size: int, num_pages: int, max_num_seqs: int = 6) -> Engine:
    options = EngineOptions(max_num_seqs=max_num_seqs, max_num_batched_tokens=48)
    config = EngineConfig(VOCAB, MASK, (END,), LENGTH, options)
    return build(model, config, page_size, num_pages, (2, 2, 16))


def requests_of(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Mixed lengths, modes and parameters; every third prompt repeats an earlier one's beginning."""
    rng, cut = random.Random(seed), random.Random(seed)
    out: list[tuple[list[int], SamplingParams]] = []
    for i in range(12):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 15, 16, 17, 40]))]
        if i % 3 == 2:
            prompt = out[0][0] + prompt[:3]
        params = SamplingParams(
            decoding=DECODINGS[1 + i % 4],  # not auto, whose steps depend on the load
            max_tokens=rng.choice([1, 7, 30, 200]),
            temperature=0.0 if i < 8 else 0.8,
            seed=i,
            wedlm_window_size=rng.choice([1, 3, 8, 16]),
            wedlm_entropy_threshold=rng.choice([None, 0.8, 2.0]),
            wedlm_next_token=NEXT_TOKENS[1 - i // 4 % 2],
            wedlm_draft_entropy=rng.choice([1.0, 3.0]),
        )
        prompt = prompt[: LENGTH - 1]
        if params.decoding in GAP_DECODINGS and cut.random() < 0.5:  # the prompt cut in two, to fill what lies between
            at, gap = cut.randrange(len(prompt)), min(params.max_tokens, LENGTH - len(prompt))
            params = replace(params, suffix_token_ids=prompt[at:], max_tokens=gap)
            prompt = prompt[:at]
        out.append((prompt, params))
    return out


@pytest.mark.parametrize("page_size", [1, 16, 256])
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
