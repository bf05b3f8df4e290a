# SPDX-License-Identifier: Apache-2.0
"""On real prompts, in every weight format that a CPU runs: verified and auto decoding give AR's text, bit for bit."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.native_model import needs_native, torch_threads
from tests.engine.tiny_llm import check_empty, save_tiny
from wedlm import LLM, SamplingParams
from wedlm.attention.base import KVCache
from wedlm.model.formats.tokenizer import load_tokenizer
from wedlm.model.quantize_checkpoint import quantize_checkpoint
from wedlm.native import NativeTransformer

DATA = Path(__file__).parents[1] / "data/prompts.jsonl"
CACHE_IN_INT8 = "int8, cache in int8"
# Of the embedded model, and of random weights whose rows divide by 256, as blocks of k-quants must.
EMBEDDED = ("int8", "q8_0", "q4_0", "q4_k_m", CACHE_IN_INT8)
RANDOM = ("q4_k", "q6_k")
RANDOM_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "vocab_size": 49152,
    "mask_token_id": 16,
    "eos_token_ids": (2,),
}
SAMPLING = (
    SamplingParams(max_tokens=64, temperature=0.0),
    SamplingParams(max_tokens=64, temperature=1.0, seed=7),
    SamplingParams(max_tokens=64, temperature=0.0),
    SamplingParams(max_tokens=64, temperature=1.0, seed=8),
    SamplingParams(max_tokens=64, temperature=0.8, top_p=0.9, seed=9),
)
# A fifth of the prompts each: the batch, threads, and options that bring chunks, preemption and other pages.
PLACES = (
    {"batch": 1, "threads": 2},
    {"batch": 4, "threads": 1, "max_num_batched_tokens": 48},
    {"batch": 16, "threads": 2, "max_num_batched_tokens": 512},
    {"batch": 16, "threads": 1, "tokens": 1500, "page_size": 4},
    {"batch": 7, "threads": 2, "max_num_batched_tokens": 20, "page_size": 1, "wedlm_window_size": 8},
)


def load(source: str | Path, threads: int, **options) -> LLM:
    with torch_threads(min(threads, os.cpu_count() or 1)):
        llm = LLM(source, device="cpu", max_model_len=1024, **{"wedlm_window_size": 16, **options})
    assert isinstance(llm.model, NativeTransformer)
    return llm


@needs_native
@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("weights", [*EMBEDDED, *RANDOM])
def test_1000_real_prompts(tmp_path, weights, record_property):
    """200 prompts of 64 tokens in each of the embedded model's formats, and in two of random ones; temperatures 0 and
    1 in turn. What AR decoding gives alone on one thread is what verified and auto decoding give wherever they run. No
    difference is excused."""
    source: str | Path = "demo"
    if weights in RANDOM:
        source = save_tiny(tmp_path / "random", **RANDOM_SIZES)
        load_tokenizer("demo").save(source)
    cache: dict[str, Any] = {"kv_cache_dtype": "int8"} if weights == CACHE_IN_INT8 else {}
    if weights not in ("int8", CACHE_IN_INT8):
        source = quantize_checkpoint(source, tmp_path / "m.gguf", type=weights).path
    questions = [json.loads(line)["prompt"] for line in DATA.read_text().splitlines()]
    reference = load(source, 1, **cache)
    config, dtype = reference.model_config, reference.engine.runner.cache.keys.dtype
    slot_bytes = KVCache.bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    prompts = [reference.chat_prompt([{"role": "user", "content": question}]) for question in questions]
    counted = {"prompts": 0, "tokens": 0, "differences": 0, "preempted": 0, "forwards": 0}
    for number, place in enumerate(PLACES):
        chosen = {"max_num_seqs": 16, **cache, **place}
        batch, threads, tokens = chosen.pop("batch"), chosen.pop("threads"), chosen.pop("tokens", None)
        llm = load(source, threads, kv_cache_bytes=tokens and slot_bytes * tokens, **chosen)
        here = range(number, len(questions), len(PLACES))
        asked = [replace(SAMPLING[i % len(SAMPLING)], decoding="autoregressive") for i in range(len(here))]
        expected = [
            reference.generate(prompts[index], one, progress=False)[0].token_ids
            for index, one in zip(here, asked, strict=True)
        ]
        for decoding in ("verified", "auto"):
            for first in range(0, len(here), batch):
                part = slice(first, first + batch)
                outputs = llm.generate(
                    [prompts[index] for index in here[part]],
                    [replace(one, decoding=decoding) for one in asked[part]],
                    progress=False,
                )
                counted["differences"] += sum(
                    one.token_ids != ids for one, ids in zip(outputs, expected[part], strict=True)
                )
                counted["preempted"] += sum(output.stats.num_preemptions for output in outputs)
                counted["forwards"] += sum(output.stats.num_forwards for output in outputs)
            check_empty(llm)
        counted["prompts"] += len(here)
        counted["tokens"] += sum(map(len, expected))
        llm.model.close()
    for name, value in counted.items():
        record_property(name, value)
    assert counted["differences"] == 0
    assert counted["preempted"] > 0
    assert counted["prompts"] == len(questions)
