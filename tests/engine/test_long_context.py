# SPDX-License-Identifier: Apache-2.0
"""Contexts beyond the trained length: YaRN at 32k positions through pages and chunks, against one plain forward."""

from dataclasses import replace

import pytest
import torch

from tests.engine.random_transformer import CONFIG as SHORT_CONFIG
from tests.engine.random_transformer import END, MASK, VOCAB
from tests.engine.stub_engine import build
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import RopeScaling, Transformer, pack_for_inference

LENGTH = 32_768
CONFIG = replace(
    SHORT_CONFIG,
    model_type="qwen2",
    head_dim=8,
    rope_theta=1e6,
    rope_scaling=RopeScaling("yarn", factor=4.0, original_max_position_embeddings=LENGTH // 4),
    max_position_embeddings=LENGTH // 4,
    qk_norm=False,
    qkv_bias=True,
)


@pytest.mark.parametrize("length", [5_000, pytest.param(LENGTH - 8, marks=pytest.mark.long)])
@torch.inference_mode()
def test_yarn_beyond_the_trained_length(length):
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pack_for_inference(model)
    assert CONFIG.max_length == LENGTH
    num_pages = LENGTH // 16 + 2
    config = EngineConfig(VOCAB, MASK, (END,), LENGTH, EngineOptions(max_num_seqs=1, max_num_batched_tokens=2048))
    engine = build(model, config, 16, num_pages, (2, 2, 8))
    prompt = torch.randint(0, VOCAB, (length,)).tolist()
    params = SamplingParams(decoding="verified", max_tokens=7, ignore_eos=True, logprobs=0)
    request = engine.add("long", prompt, params)
    while engine.has_work:
        engine.step()
    assert request.num_output_tokens == 7
    tokens, last = torch.tensor(request.output.tokens), torch.arange(length - 1, length + 6)
    logits = model(tokens, torch.arange(len(tokens)), CausalAttend(), last).index_fill_(
        1, torch.tensor(MASK), -torch.inf
    )
    assert logits.argmax(-1).tolist() == request.output_token_ids
    expected = torch.log_softmax(model(tokens, torch.arange(len(tokens)), CausalAttend(), last), -1)
    chosen = expected.gather(1, tokens[length:, None])[:, 0]
    assert torch.allclose(torch.tensor(request.output.logprobs), chosen, atol=1e-3)
