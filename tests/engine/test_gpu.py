# SPDX-License-Identifier: Apache-2.0
"""The same text on CUDA as on the CPU, in float32 (TF32 is off by default), in every mode."""

import asyncio
import json
from operator import itemgetter
from pathlib import Path

import pytest
import torch

from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, SamplingParams
from wedlm.algorithm.params import DECODINGS
from wedlm.engine.async_llm import AsyncEngine

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


async def _texts(llms: dict[str, LLM], batches: list[list[str]]) -> dict[str, list[list[int]]]:
    """Of each model, whose engines run in threads at the same time; every batch in every mode."""
    engines = {name: AsyncEngine(llm.engine, llm.blueprint.rebuild, turns=llm.turns) for name, llm in llms.items()}

    async def of(name: str) -> list[list[int]]:
        found = []
        for seed, batch in enumerate(batches):
            for decoding in DECODINGS:
                params = SamplingParams(max_tokens=24, decoding=decoding, seed=seed)
                prompts = [llms[name].tokenizer.encode(prompt) for prompt in batch]
                stream = engines[name].submit([(prompt, params) for prompt in prompts])
                outputs = [(index, piece.output) async for news in stream for index, piece in news if piece.output]
                found += [output.token_ids for _, output in sorted(outputs, key=itemgetter(0))]
        return found

    try:
        return dict(zip(llms, await asyncio.gather(*map(of, llms)), strict=True))
    finally:
        for engine in engines.values():
            await engine.stop()


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.long),
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
    ],
)
def test_models_that_share_a_device(tmp_path, device):
    """While one engine captures steps, or computes, the other waits for its turn; each gives the texts that it gives
    alone. Their caches are equal parts of what there is."""
    paths = {"one": save_tiny(tmp_path / "one"), "other": save_tiny(tmp_path / "other", rope_theta=100.0)}
    options = {"device": device, "dtype": "float32", "kv_cache_bytes": 1 << 26, "max_num_seqs": 16}
    prompts = [f"{number} and then" for number in range(12)]
    batches = [
        prompts[start : start + count]
        for count in ((1, 5, 12) if device == "cuda" else (4,))
        for start in (0, 12 - count)
    ]
    alone = {name: asyncio.run(_texts({name: LLM(path, **options)}, batches))[name] for name, path in paths.items()}
    together = LLM.together(paths, **options)
    assert len({llm.engine.pool.num_pages for llm in together.values()}) == 1
    for _ in range(4 if device == "cuda" else 1):
        assert asyncio.run(_texts(LLM.together(paths, **options), batches)) == alone
    assert alone["one"] != alone["other"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_models_on_two_devices(tmp_path):
    """Each thread works on its own model's device, whichever is the process's current one."""
    path = save_tiny(tmp_path)
    options = {"dtype": "float32", "kv_cache_bytes": 1 << 26, "max_num_seqs": 16}
    llms = {device: LLM(path, device=device, **options) for device in ("cuda:0", "cuda:1")}
    texts = asyncio.run(_texts(llms, [[f"{number} and then" for number in range(12)]]))
    assert texts["cuda:1"] == texts["cuda:0"]
    assert all(str(llm.engine.runner.device) == device for device, llm in llms.items())
