# SPDX-License-Identifier: Apache-2.0
"""Verified decoding gives AR decoding's text: the embedded model, real prompts, float32."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from wedlm import LLM, SamplingParams
from wedlm.bench import copying

_FILE = Path(__file__).parents[1] / "data/prompts.jsonl"
PROMPTS = [json.loads(line)["prompt"] for line in _FILE.read_text().splitlines()]
TIE = 1e-4  # AR's two best log-probabilities closer than this: float error may order them either way


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # unlike the stub, this model has work for them
    yield LLM("demo", dtype="float32", device="cpu", max_model_len=1024, max_num_seqs=32, max_num_batched_tokens=1024)
    torch.set_num_threads(threads)


def compare(llm: LLM, prompts: list[str], params: SamplingParams) -> dict[str, Any]:
    """Texts of both modes; a divergence is excused only at a tie, and each is listed."""
    encoded = [llm.chat_prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    ar = llm.generate(encoded, replace(params, decoding="autoregressive", logprobs=2), progress=False)
    verified = llm.generate(encoded, replace(params, decoding="verified"), progress=False)
    excused = []
    for index, (expected, found) in enumerate(zip(ar, verified, strict=True)):
        if expected.token_ids == found.token_ids:
            assert expected.text == found.text
            continue
        at = next(i for i, (a, b) in enumerate(zip(expected.token_ids, found.token_ids, strict=False)) if a != b)
        assert params.temperature == 0, f"prompt {index} diverges at token {at}"
        assert expected.top_logprobs is not None
        (_, best), (_, second) = expected.top_logprobs[at]
        assert best - second < TIE, f"prompt {index} diverges at token {at}, where AR's lead is {best - second:.2e}"
        excused.append((index, at, best - second))
    tokens = sum(len(output.token_ids) for output in verified)
    stats = [output.stats for output in verified if output.stats is not None]
    forwards = sum(one.num_forwards for one in stats)
    assert tokens >= forwards
    figures = {
        "prompts": len(prompts),
        "tokens": tokens,
        "excused": excused,
        "tokens/forward": f"{tokens / forwards:.3f}",
    }
    return figures | {"drafts from the text": sum(one.num_lookup_accepted for one in stats)}


@pytest.mark.demo_model
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.long), 1.0])
def test_verified_equals_ar(llm, temperature):
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=12, wedlm_window_size=6)
    compare(llm, PROMPTS[:2] + PROMPTS[-2:], params)


@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_from_the_text_give_ars_text(llm, temperature):
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=32, wedlm_lookup_drafts=7, wedlm_window_size=8)
    found = compare(llm, [copying.edits()[4], copying.extractions()[2]], params)
    assert found["drafts from the text"] > 0


@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_from_the_text_give_ars_text_on_100_prompts(llm, temperature, record_property):
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=64, wedlm_lookup_drafts=15)
    for name, value in compare(llm, copying.edits() + copying.extractions(), params).items():
        record_property(name, value)


@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_verified_equals_ar_on_200_prompts(llm, temperature, record_property):
    params = SamplingParams(temperature=temperature, seed=7, max_tokens=32, wedlm_window_size=8)
    for name, value in compare(llm, PROMPTS, params).items():
        record_property(name, value)
