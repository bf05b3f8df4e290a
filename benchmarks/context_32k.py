# SPDX-License-Identifier: Apache-2.0
"""Decoding at a context of 32,000 tokens: whether verified text is AR's, milliseconds a step, memory.

    python benchmarks/context_32k.py demo --dtype float32 --out embedded.json
    python benchmarks/context_32k.py qwen3-8b --dtype bfloat16 --out 8b.json

``demo`` has its weights, and its length raised: RoPE goes on beyond the positions that it was trained for, so that its
text means nothing, but is as good as any other for comparing modes. Shapes of `wedlm bench` have random weights, whose
drafts are hardly ever right. Steps of verified decoding run all 16 rows. Prints and saves one JSON object.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wedlm.attention.base import KVCache
from wedlm.bench.prompts import Prompts
from wedlm.bench.shapes import MASK_TOKEN_ID, random_model, shape_config
from wedlm.engine import resolve_options
from wedlm.engine.engine import Engine
from wedlm.engine.factory import plan_engine
from wedlm.engine.load_weights import load_transformer
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.divergence import first_difference
from wedlm.model import load_tokenizer
from wedlm.model.formats.checkpoint import open_checkpoint

ROOM = 1024  # positions after the prompt
ALL_ROWS: dict[str, Any] = {"wedlm_window_size": 16, "wedlm_draft_entropy": 1e9, "wedlm_lookup_drafts": 0}


def build(name: str, dtype_name: str, device_name: str, context: int) -> tuple[Engine, Prompts, str]:
    """An engine for contexts of that length, and its description."""
    device, length = resolve_options.read_device(device_name), context + ROOM
    dtype = resolve_options.read_dtype(dtype_name, device)
    assert dtype is not None
    options = EngineOptions.of({"dtype": dtype_name, "max_num_seqs": 1})
    if name == "demo":
        checkpoint, tokenizer = open_checkpoint(name), load_tokenizer(name)
        raised = replace(checkpoint, config=replace(checkpoint.config, max_position_embeddings=length))
        model, config, options = load_transformer(raised, options, device)
    else:
        config, tokenizer = replace(shape_config(name), max_position_embeddings=length), None
        model = random_model(config, device, dtype)
    per_token = KVCache.bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    engine_config = EngineConfig(
        vocab_size=config.vocab_size,
        mask_token_id=MASK_TOKEN_ID if config.mask_token_id is None else config.mask_token_id,
        eos_token_ids=config.eos_token_ids,
        max_model_len=length,
        options=replace(options, kv_cache_bytes=per_token * (length + ROOM)),
    )
    blueprint = plan_engine(model, engine_config, None)
    return blueprint.build(), Prompts(tokenizer, config.vocab_size, length), blueprint.describe()


def decode(engine: Engine, prompt: list[int], mode: str, tokens: int, more: dict[str, Any]) -> tuple[Any, dict]:
    """A request's output, and what it took. All steps but the first ones with tokens are timed, which capture."""
    params = SamplingParams(decoding=mode, max_tokens=tokens, ignore_eos=True, **more)
    began = time.perf_counter()
    request = engine.add(f"{mode} {tokens} {began}", prompt, params)
    while request.num_output_tokens == 0:
        engine.step()
    first_token_s = time.perf_counter() - began
    times = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - start))
    counters = request.counters
    return request.output, {
        "mode": mode,
        "tokens": request.num_output_tokens,
        "first_token_s": round(first_token_s, 2),
        "step_ms": round(statistics.median(times[3:] or times or [0.0]), 3),
        "timed_steps": len(times[3:] or times),
        "tokens_per_forward": round(request.num_output_tokens / counters.num_forwards, 3),
        "rows_per_forward": round(counters.num_rows / counters.num_forwards, 1),
    }


def compare(engine: Engine, prompt: list[int], tokens: int) -> dict:
    """Both modes, AR first, so that its prompt is read and verified decoding finds it in the cache."""
    decode(engine, prompt[-64:], "autoregressive", 8, {})  # kernels are compiled
    decode(engine, prompt[-64:], "verified", 8, ALL_ROWS)
    ar, ar_row = decode(engine, prompt, "autoregressive", tokens, {})
    verified, verified_row = decode(engine, prompt, "verified", tokens, ALL_ROWS)
    a, b = ar.tokens[len(prompt) :], verified.tokens[len(prompt) :]
    at = first_difference(a, b)
    gap = None
    if at is not None:  # how near AR's two best were there
        asked, _ = decode(engine, prompt + a[:at], "autoregressive", 1, {"logprobs": 2})
        (_, best), (_, second) = asked.top_logprobs[0][:2]
        gap = best - second
    return {
        "rows": [ar_row, verified_row],
        "verified_is_ar": at is None,
        "same_tokens": tokens if at is None else at,
        "gap_at_difference": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="demo, or a shape of wedlm bench: qwen3-8b, smollm2-135m, tiny")
    parser.add_argument("--context", type=int, default=32000, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    engine, prompts, described = build(arguments.model, arguments.dtype, arguments.device, arguments.context)
    on_gpu = engine.runner.device.type == "cuda"
    with torch.inference_mode():
        found = compare(engine, prompts.of(0, arguments.context), arguments.tokens)
    report = {
        "model": arguments.model,
        "engine": described,
        "torch": torch.__version__,
        "context": arguments.context,
        **found,
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else None,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
