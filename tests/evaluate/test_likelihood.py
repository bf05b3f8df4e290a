# SPDX-License-Identifier: Apache-2.0
"""Prefix reuse changes no score: ours against the harness's own transformers backend on the same weights."""

import random
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance

from tests.engine.tiny_llm import save_tiny
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.llm import LLM
from wedlm.evaluate.harness import EngineLM
from wedlm.evaluate.likelihood import LikelihoodScorer

LENGTH = 384
FAMILIES = {"qwen3": {}, "llama": {"qk_norm": False}}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    changes = {"model_type": request.param, "max_position_embeddings": LENGTH, "mask_token_id": None}
    return save_tiny(tmp_path_factory.mktemp(request.param), chat=False, **changes, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def llm(directory):
    return LLM(directory, device="cpu", dtype="float32", mask_token_id=100)


def texts(rng, low, high):
    return "".join(rng.choice("abcdefgh 12345.,") for _ in range(rng.randint(low, high))).strip() or "x"


def requests():
    """Mixed lengths, single tokens, choices that share beginnings, contexts with a common beginning, too long ones."""
    rng = random.Random(0)
    shots = texts(rng, 150, 150) + "\n"
    pairs = [(shots + texts(rng, 1, 40), " " + texts(rng, 1, 30)) for _ in range(6)]
    for prefix in ("", shots):
        context = prefix + texts(rng, 5, 60)
        pairs += [(context, " " + choice) for choice in ("a", "b", "c", "d")]  # two tokens each
        pairs += [(context, choice) for choice in ("a", "b")]  # one token
        pairs += [(context, " the same beginning" + texts(rng, 1, 90)) for _ in range(4)]  # more than one chunk
        pairs += [(context + " ", "trailing space")]
    pairs += [("", "no context"), ("x" * 500, " too long"), (shots, "q")]
    rng.shuffle(pairs)
    return [Instance("loglikelihood", {}, pair, 0, metadata=("t", i, 1)) for i, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def hf(directory):
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=4, max_length=LENGTH)


def test_scores_equal_those_of_transformers(llm, hf):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf.loglikelihood(requests(), disable_tqdm=True)
    ours = EngineLM(llm).loglikelihood(requests())

    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    torch.testing.assert_close([s for s, _ in ours], [s for s, _ in theirs], atol=1e-3, rtol=0)


def test_rolling_scores_equal_those_of_transformers(llm, hf):
    rng = random.Random(1)
    some = [Instance("loglikelihood_rolling", {}, (texts(rng, n, n),), 0, metadata=("t", n, 1)) for n in (3, 300, 900)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hf.loglikelihood_rolling(some, disable_tqdm=True)

    torch.testing.assert_close(EngineLM(llm).loglikelihood_rolling(some), theirs, atol=3e-3, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 40, 2000])
def test_scores_equal_one_plain_forward_each_however_they_are_batched(llm, max_rows):
    rng = random.Random(2)
    shots = [rng.randrange(90) for _ in range(100)]
    pairs = []
    for _ in range(12):
        context = (shots if rng.random() < 0.7 else []) + [rng.randrange(90) for _ in range(rng.randint(1, 80))]
        pairs += [(context, [rng.randrange(90) for _ in range(rng.choice((1, 1, 2, 7, 100)))]) for _ in range(4)]
    scorer = LikelihoodScorer(llm, max_rows)

    scores = dict(scorer.score(pairs))

    assert sorted(scores) == list(range(len(pairs)))
    for index, (context, continuation) in enumerate(pairs):
        tokens = torch.tensor([*context, *continuation])
        with torch.inference_mode():
            logprobs = llm.model(tokens, torch.arange(len(tokens)), CausalAttend()).log_softmax(-1)
        at = range(len(context) - 1, len(tokens) - 1)
        expected = sum(float(logprobs[row, tokens[row + 1]]) for row in at)
        assert scores[index].logprob == pytest.approx(expected, abs=1e-3)
        assert scores[index].greedy == all(int(logprobs[row].argmax()) == tokens[row + 1] for row in at)
    assert scorer.stats.num_reused_tokens > scorer.stats.num_computed_tokens
    llm.engine.pool.check_integrity()
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages


def test_a_shared_beginning_is_computed_once(directory):
    llm = LLM(directory, device="cpu", dtype="float32", mask_token_id=100)
    rng = random.Random(3)
    shots = [rng.randrange(90) for _ in range(160)]
    pairs = [([*shots, item], [rng.randrange(90), 5]) for item in range(20) for _ in range(3)]
    scorer = LikelihoodScorer(llm)

    list(scorer.score(pairs))

    # 160 + 1 of the first context, one each of the 19 others, one of each of 60 continuations
    assert scorer.stats.num_computed_tokens == 161 + 19 + 60
    assert scorer.stats.num_computed_tokens + scorer.stats.num_reused_tokens == 60 * 162


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([([], [1])], "empty context"),
        ([([1], [])], "empty context or continuation"),
        ([([1], [1] * (LENGTH + 1))], f"expected at most {LENGTH}"),
    ],
)
def test_impossible_pairs_are_refused(llm, pairs, message):
    with pytest.raises(ValueError, match=message):
        list(LikelihoodScorer(llm).score(pairs))


def test_a_pair_larger_than_the_cache_is_refused(directory):
    llm = LLM(directory, device="cpu", dtype="float32", mask_token_id=100, kv_cache_bytes=2 * 2 * 2 * 16 * 4 * 64)

    with pytest.raises(ValueError, match="larger kv_cache_bytes"):
        list(LikelihoodScorer(llm).score([([1], [1, 2]), ([1] * 100, [1])]))
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages


@pytest.mark.long
def test_scores_on_the_kernels_of_gpus_equal_those_of_plain_torch(llm):
    pytest.importorskip("triton")

    if llm.device.type == "cuda":
        pytest.skip("the interpreter is for machines without a GPU")
    engine = replace(llm.blueprint, packed=llm.model).build()
    rng = random.Random(2)
    shots = [rng.randint(1, 90) for _ in range(40)]
    pairs = [([*shots, n], [n + i] * (1 + 3 * i)) for n in range(3) for i in range(4)]

    ours = dict(LikelihoodScorer(SimpleNamespace(device=llm.device, engine=engine)).score(pairs))

    twin = dict(LikelihoodScorer(llm).score(pairs))
    assert [ours[i].greedy for i in range(len(pairs))] == [twin[i].greedy for i in range(len(pairs))]
    for index in twin:
        assert ours[index].logprob == pytest.approx(twin[index].logprob, abs=1e-4)
