# SPDX-License-Identifier: Apache-2.0
"""Models that see by blocks (SDAR): the engine against an oracle written apart, which has no cache and no window and
computes the whole text, with a mask of blocks, for each forward."""

import random
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.engine.random_transformer import CONFIG as CAUSAL_CONFIG
from tests.engine.random_transformer import END, MASK, VOCAB, random_model
from tests.engine.stub_engine import build
from tests.engine.tiny_llm import MASK as TINY_MASK
from tests.engine.tiny_llm import save_tiny
from tests.stub import BlockAttend
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.reference import choose_token
from wedlm.engine.llm import LLM
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.prompt_logprobs import PromptScorer
from wedlm.engine.request import Request
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.likelihood import LikelihoodScorer
from wedlm.model import ModelConfig, Transformer, load_model, pack_for_inference, save_model
from wedlm.model.init_checkpoint import init_checkpoint
from wedlm.model.quantize_checkpoint import quantize_checkpoint

LENGTH = 94  # no multiple of a block of 3, 4 or 8: the last one is short
CONFIG = replace(CAUSAL_CONFIG, model_type="sdar", max_position_embeddings=LENGTH, mask_token_id=MASK, block_size=4)


@cache
def model() -> Transformer:
    return pack_for_inference(random_model(CONFIG, seed=2, std=0.5))


def block_diffusion(
    transformer: Transformer, prompt: list[int], num_tokens: int, length: int, params: DecodeParams
) -> tuple[list[int], int]:
    """(tokens, forwards): block by block from the one in which the prompt ends."""
    ends, mask = params.stop_token_ids, params.mask_token_id
    size, static = params.block_length, params.remasking == "low_confidence_static"
    steps = min(params.denoising_steps or size, size)
    text: list[int | None] = list(prompt)
    forwards = 0
    while len(text) < min(len(prompt) + num_tokens, length) and not set(ends).intersection(text[len(prompt) :]):
        first = len(text) // size * size
        last = min(first + size, length)
        text += [None] * (last - len(text))
        while None in text:
            tokens = torch.tensor([mask if token is None else token for token in text])
            positions = torch.arange(last)
            with torch.inference_mode():
                logits = transformer(tokens, positions, BlockAttend(positions, size)).float()
            forwards += 1
            found = {p: choose_token(logits[p], p, params) for p in range(first, last) if text[p] is None}
            chance = {p: float(torch.softmax(logits[p], dim=-1)[token]) for p, token in found.items()}
            # Which step of the block it is, as if each had filled what it had to.
            done, shares = last - first - len(found), [size // steps + (i < size % steps) for i in range(steps)]
            quota = next(share for i, share in enumerate(shares) if done < sum(shares[: i + 1]))
            sure = [] if static else [p for p in found if chance[p] > params.confidence_threshold]
            best = sorted(found, key=lambda p: (-chance[p], p))[:quota]
            for p in sure if len(sure) >= quota else best:
                text[p] = found[p]
    answer = [token for token in text[len(prompt) :] if token is not None][:num_tokens]
    cut = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[:cut], forwards


def run(page_size: int, block_length: int, prompts: list[list[int]], many: list[SamplingParams], **sizes: int):
    """The finished requests in order, twice: the second time they find what the first has cached."""
    pages, seqs, rows = sizes["num_pages"], sizes["max_num_seqs"], sizes["max_rows"]
    options = EngineOptions(max_num_seqs=seqs, max_num_batched_tokens=rows)
    config = EngineConfig(VOCAB, MASK, (END,), LENGTH, options, model_decoding="block", block_length=block_length)
    engine = build(model(), config, page_size, pages, (2, 2, 16))
    requests: list[Request] = []
    for turn in range(2):
        for i, (prompt, params) in enumerate(zip(prompts, many, strict=True)):
            requests.append(engine.add(f"{turn}-{i}", prompt, params))
        while engine.has_work:
            engine.step()
            engine.pool.check_integrity()
    assert engine.pool.num_available == engine.pool.num_pages
    return requests


def check_prompts(seed: int, num_prompts: int) -> dict[str, int]:
    """Random prompts that share stems, rules, temperatures, blocks, pages and batches."""
    rng = random.Random(seed)
    block_length = rng.choice([1, 2, 3, 4, 4, 8])
    stem = [rng.randrange(VOCAB - 1) for _ in range(24)]
    prompts = [
        stem[: rng.choice([0, 3, 8, 13, 24])] + [rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 9))]
        for _ in range(num_prompts)
    ]
    many = [
        SamplingParams(
            max_tokens=rng.choice([1, 5, 17, 50]),
            temperature=rng.choice([0.0, 0.0, 0.0, 0.7]),
            seed=i,
            ignore_eos=rng.random() < 0.7,
            remasking_strategy=rng.choice([None, "low_confidence_static", "low_confidence_dynamic"]),
            confidence_threshold=rng.choice([0.3, 0.5, 0.85]),
            denoising_steps=rng.choice([None, None, 1, 2, block_length]),
        )
        for i in range(num_prompts)
    ]
    page_size = rng.choice([1, 3, 4, 5, 16])
    room = rng.choice([1, 1, 8])  # a pool for one request of the model's length preempts others
    sizes = {"num_pages": -(-LENGTH // page_size) * room, "max_num_seqs": rng.choice([2, 4, 6])}
    requests = run(page_size, block_length, prompts, many, **sizes, max_rows=rng.choice([16, 24, 256]))
    for first, second in zip(requests[:num_prompts], requests[num_prompts:], strict=True):
        asked = first.prompt_token_ids, first.max_tokens
        expected, forwards = block_diffusion(model(), *asked, LENGTH, first.decode)
        for request in (first, second):
            assert request.output_token_ids == expected, (request.prompt_token_ids, request.params)
            assert request.counters.num_forwards == forwards
    return {
        "reused": sum(request.progress.num_reused for request in requests),
        "preempted": sum(request.progress.num_preemptions for request in requests),
        "sure": sum(request.num_output_tokens > request.counters.num_forwards for request in requests),
    }


def check_all(seeds: Iterable[int], num_prompts: int) -> None:
    totals = {"reused": 0, "preempted": 0, "sure": 0}
    for seed in seeds:
        for name, value in check_prompts(seed, num_prompts).items():
            totals[name] += value
    assert all(totals.values()), totals


def test_block_diffusion_equals_the_oracle():
    check_all((1, 4, 9), 4)  # blocks and pages of different sizes; the second preempts


@pytest.mark.long
def test_two_hundred_prompts():
    check_all(range(100, 125), 8)


def test_pages_that_end_inside_a_block_are_shared_only_with_the_whole_of_it():
    """Two prompts are alike up to the third of four tokens of a block: keys of all four differ."""
    prompts = [[5, 6, 7, 8, 1, 2, 3, 4, 9], [5, 6, 7, 8, 1, 2, 3, 9, 9], [5, 6, 7, 8, 1, 2, 3, 4, 1]]
    params = SamplingParams(max_tokens=6)
    one_by_one = [run(3, 4, [prompt], [params], num_pages=80, max_num_seqs=1, max_rows=64)[0] for prompt in prompts]
    together = run(3, 4, prompts, [params] * 3, num_pages=80, max_num_seqs=1, max_rows=64)
    assert [one.output_token_ids for one in together] == [one.output_token_ids for one in one_by_one] * 2
    assert [one.progress.num_reused for one in together] == [0, 3, 6, 6, 6, 6]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("sdar"), model_type="sdar", block_size=4, decoding=None)


def test_a_checkpoint_decodes_by_its_blocks(directory):
    """Default mode, rule and block are the checkpoint's; the text is the oracle's."""
    llm = LLM(directory, device="cpu")
    assert "sees and decodes by blocks of 4" in llm.describe()
    prompts = ["Hello", "abc abc", "The quick brown fox"]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=14))
    for prompt, output in zip(prompts, outputs, strict=True):
        rule = {"remasking": "low_confidence_dynamic", "confidence_threshold": 0.85, "denoising_steps": None}
        ends = llm.model_config.eos_token_ids
        params = DecodeParams("block", 4, block_length=4, mask_token_id=TINY_MASK, stop_token_ids=ends, **rule)  # type: ignore[arg-type]
        expected, _ = block_diffusion(llm.model, llm.tokenizer.encode(prompt), 14, 128, params)  # type: ignore[arg-type]
        assert output.token_ids == expected
        assert output.stats.decoding == "block"
    logprobs = llm.generate("Hello", SamplingParams(max_tokens=6, logprobs=2))[0]
    assert len(logprobs.logprobs) == len(logprobs.top_logprobs) == len(logprobs.token_ids)
    (shaped,) = llm.generate(["x"], SamplingParams(max_tokens=12, grammar='start: "(" /[a-z]/+ ")"'))
    assert shaped.text.startswith("(")
    with pytest.raises(ValueError, match="this task compares likelihoods and the model sees by blocks of 4"):
        list(LikelihoodScorer(llm).score([([1, 2], [3])]))


@pytest.mark.parametrize("decoding", ["auto", "verified", "autoregressive", "streaming"])
def test_other_modes_are_refused(directory, decoding):
    llm = LLM(directory, device="cpu", decoding=decoding)
    with pytest.raises(
        ValueError, match=rf"decoding is '{decoding}' and the model sees by blocks of 4; expected 'block'"
    ):
        llm.generate(["a"], SamplingParams(max_tokens=1))


def test_the_block_is_one_for_all(directory):
    llm = LLM(directory, device="cpu", block_length=8)
    assert llm.generate("Hello", SamplingParams(max_tokens=4, wedlm_window_size=8))[0].token_ids
    with pytest.raises(ValueError, match="wedlm_window_size is 4 and the model sees by blocks of 8"):
        llm.generate("Hello", SamplingParams(wedlm_window_size=4))
    with pytest.raises(ValueError, match="quantization is 'int8', but rows of sdar models see all of their block"):
        LLM(directory, device="cpu", quantization="int8")


def test_what_is_made_for_causal_models_refuses(directory, tmp_path):
    """Before anything is written."""
    sentence = "model_type is 'sdar'; expected a causal model"
    with pytest.raises(ValueError, match="has model_type 'sdar'; expected an AR checkpoint, which is causal"):
        init_checkpoint(directory, tmp_path / "adapted")
    with pytest.raises(ValueError, match=sentence):
        quantize_checkpoint(directory, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
    llm = LLM(directory, device="cpu")
    with pytest.raises(ValueError, match="log-probabilities of a prompt are asked for and the model sees by blocks"):
        PromptScorer(llm.engine, [1, 2, 3], 0)
    assert llm.window_warning(SamplingParams()) is None


def test_a_causal_model_has_no_block_length(tmp_path):
    with pytest.raises(ValueError, match="block_length is 8 and the model is causal"):
        LLM(save_tiny(tmp_path), device="cpu", block_length=8)


@pytest.mark.parametrize("given", [{}, {"block_size": 32, "mask_token_id": 5}], ids=["defaults", "named"])
def test_config(given):
    values: dict[str, Any] = {"model_type": "sdar", "vocab_size": 151936, "hidden_size": 64, "intermediate_size": 96}
    values |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ModelConfig.from_hf(values | {"max_position_embeddings": 32768, "eos_token_id": 151643} | given)
    assert (config.block_size, config.mask_token_id) == ((32, 5) if given else (4, 151669))
    assert (config.qk_norm, config.qkv_bias, config.head_dim, config.default_decoding) == (True, False, 128, "block")
    assert not config.is_wedlm
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_weights_in_16_bits_on_a_cpu(tmp_path):
    """Causal models run in 8 bits there; one that sees by blocks runs on torch, and says why."""
    save_tiny(tmp_path, model_type="sdar", block_size=4, decoding=None)
    save_model(*load_model(tmp_path, torch.bfloat16), tmp_path)
    llm = LLM(tmp_path, device="cpu")
    assert "weights are widened and steps take several times as long, because rows of sdar models see" in llm.describe()
    assert llm.generate("Hello", SamplingParams(max_tokens=4))[0].token_ids


def test_llada_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"model_type is 'llada'; expected one of .*sdar: rows of LLaDA see the whole"):
        ModelConfig.from_hf({"model_type": "llada"})
