# SPDX-License-Identifier: Apache-2.0
"""The same text on CUDA as on the CPU, in float32 (TF32 is off by default), in every mode."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, SamplingParams
from wedlm.algorithm.params import DECODINGS

_FILE = Path(__file__).parents[1] / "data/prompts.jsonl"
PROMPTS = [json.loads(line)["prompt"] for line in _FILE.read_text().splitlines()][:150:10]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.long
@pytest.mark.demo_model
def test_cuda_text_is_cpu_text(record_property):
    devices = {
        name: LLM("demo", dtype="float32", device=name, max_model_len=1024, kv_cache_bytes=1 << 30)
        for name in ("cpu", "cuda")
    }
    same = total = 0
    for decoding in DECODINGS:
        for temperature in (0.0, 1.0):
            params = SamplingParams(
                decoding=decoding, max_tokens=32, temperature=temperature, seed=3, wedlm_entropy_threshold=0.8
            )
            texts = {}
            for name, llm in devices.items():
                prompts = [llm.chat_prompt([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
                texts[name] = [output.token_ids for output in llm.generate(prompts, params, progress=False)]
            same += sum(a == b for a, b in zip(texts["cpu"], texts["cuda"], strict=True))
            total += len(PROMPTS)
    record_property("device", torch.cuda.get_device_name())
    record_property("same text", f"{same}/{total}")
    assert same >= total - 2  # float error may order a tie either way; in practice none was seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.long
def test_models_that_share_a_device(tmp_path, record_property):
    """Two engines in two threads, as a server of two models has them: while one captures steps the other runs, and
    each gives the texts that it gives alone. Their caches are equal parts of what is left."""
    paths = {"one": save_tiny(tmp_path / "one"), "other": save_tiny(tmp_path / "other", rope_theta=100.0)}
    options = {"device": "cuda", "dtype": "float32", "kv_cache_bytes": 1 << 26}
    prompts = [f"{number} and then" for number in range(24)]
    batches = [prompts[start : start + count] for count in (1, 3, 7, 12, 24) for start in (0, 24 - count)]

    def texts(llm: LLM) -> list[list[int]]:
        return [
            output.token_ids
            for seed, batch in enumerate(batches)
            for decoding in DECODINGS
            for output in llm.generate(batch, SamplingParams(max_tokens=24, decoding=decoding, seed=seed))
        ]

    alone = {name: texts(LLM(path, **options)) for name, path in paths.items()}
    together = LLM.together(paths, **options)
    assert len({llm.engine.pool.num_pages for llm in together.values()}) == 1
    with ThreadPoolExecutor(2) as threads:
        found = dict(zip(together, threads.map(texts, together.values()), strict=True))
    record_property("device", torch.cuda.get_device_name())
    assert found == alone
