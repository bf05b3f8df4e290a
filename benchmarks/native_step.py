# SPDX-License-Identifier: Apache-2.0
"""Step of the demo model at context 256 by rows: the native forward, the engine with it and in bfloat16, llama.cpp.

    python benchmarks/native_step.py --threads 2

The last line is JSON. All take turns within every repetition, because shared machines drift. Native is the forward
with its choice of tokens (greedy), from int8 and from the base's Q4_1 file; the engine's step is all of it. llama.cpp
runs the Q4_1 file by its Python wheel ``xllamacpp`` where that is installed: its own figure for a token, after a prompt
of 256 tokens.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cpu_step import PROMPT_TOKENS, ROWS, engine_step_ms

from wedlm import LLM
from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.machine import cpu_name
from wedlm.model import load_model
from wedlm.model.demo import demo_model_path
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.native import NativeAttend, NativeTransformer, describe
from wedlm.native.weights import native_from_gguf, native_from_torch

STEPS = 24


def native_step_ms(native: NativeTransformer, cache: KVCache, rows: int) -> list[float]:
    pages = list(range((PROMPT_TOKENS + rows) // cache.page_size + 1))
    attend = NativeAttend(cache, ExtendBatch([PROMPT_TOKENS], [rows], [pages]))
    tokens, times = torch.arange(rows) + 5, []
    for _ in range(STEPS):
        start = time.perf_counter()
        native.greedy(tokens, torch.arange(rows) + PROMPT_TOKENS, attend, torch.arange(rows))
        times.append((time.perf_counter() - start) * 1e3)
    return times


def llama_cpp(threads: int) -> Callable[[], list[float]] | None:
    """Gives ms a token of one completion by llama.cpp; None where its wheel is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(demo_model_path())
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def run() -> list[float]:
        request = {
            "prompt": list(range(1000, 1000 + PROMPT_TOKENS)),
            "n_predict": STEPS,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer: Any = server.handle_completions({**request, "temperature": 0})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        return [answer["timings"]["predicted_per_token_ms"]]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, config = load_model("demo", torch.float32)
    heads = config.num_kv_heads, config.head_dim
    cache = KVCache(config.num_layers, 32, 16, *heads, torch.float32, torch.device("cpu"))
    natives = {
        "native int8": native_from_torch(model, "int8", threads=args.threads),
        "native Q4_1": native_from_gguf(GGUFFile(demo_model_path()), threads=args.threads),
    }
    engines = {
        "engine bfloat16": LLM("demo", dtype="bfloat16", device="cpu", max_model_len=1024),
        "engine int8": LLM("demo", quantization="int8", device="cpu", max_model_len=1024),
    }
    prompt = (engines["engine int8"].tokenizer.encode("The history of mathematics is long. ") * 64)[:PROMPT_TOKENS]
    peer = llama_cpp(args.threads)
    samples: dict[tuple[str, int], list[list[float]]] = {}
    for repetition in range(args.repetitions + 1):
        turn: dict[tuple[str, int], list[float]] = {}
        for rows in ROWS:
            for name, native in natives.items():
                turn[name, rows] = native_step_ms(native, cache, rows)
            for name, llm in engines.items():
                turn[name, rows] = engine_step_ms(llm, prompt, rows)
            if peer is not None and rows == 1:
                turn["llama.cpp Q4_1", 1] = peer()
        if repetition:  # the first warms up
            for key, times in turn.items():
                samples.setdefault(key, []).append(times)
    print(describe())
    print("| variant | rows | ms, median | minimum | x its own 1 row, median |\n| --- | --- | --- | --- | --- |")
    results = []
    for (name, rows), times in samples.items():
        medians, lowest = [statistics.median(one) for one in times], min(min(one) for one in times)
        ratio = statistics.median(m / statistics.median(b) for m, b in zip(medians, samples[name, 1], strict=True))
        print(f"| {name} | {rows} | {statistics.median(medians):.2f} | {lowest:.2f} | {ratio:.2f} |")
        results.append({"variant": name, "rows": rows, "medians_ms": medians, "minimum_ms": lowest, "ratio": ratio})
    record = {"benchmark": "native_step", "cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__}
    print(json.dumps({**record, "native": describe(), "context": PROMPT_TOKENS, "results": results}))


if __name__ == "__main__":
    main()
