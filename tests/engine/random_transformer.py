# SPDX-License-Identifier: Apache-2.0
"""A small random transformer on an engine, and requests that mix modes, lengths and parameters."""

import random
from dataclasses import replace

import torch

from tests.engine.stub_engine import build
from wedlm.algorithm.params import DECODINGS, NEXT_TOKENS
from wedlm.engine.engine import Engine
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import GAP_DECODINGS, SamplingParams
from wedlm.model import ModelConfig, Transformer

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
