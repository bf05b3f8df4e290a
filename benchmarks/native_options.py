# SPDX-License-Identifier: Apache-2.0
"""Steps of the demo model on the native forward with an option against without; last line JSON.

    python benchmarks/native_options.py --threads 2

An adapter of masked rows (ranks 16 and 64 beside all matrices; all rows but one are masked), a cache in eight bits, and
weights in Q8_0 (a scale for each 32). All take turns within every repetition, and ratios are of the same repetition.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.machine import cpu_name
from wedlm.model import Transformer, load_model
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.lora.masked_rows import MaskedParts
from wedlm.model.quantize_checkpoint import quantize_checkpoint
from wedlm.native import NativeAttend, NativeTransformer, describe
from wedlm.native.weights import native_from_gguf, native_from_torch, set_masked_lora

Step = Callable[[int, int], float]  # (rows, context) -> ms


def random_adapter(model: Transformer, rank: int) -> MaskedParts:
    matrices = {
        name: (torch.randn(rank, weight.shape[1]) / 100, torch.randn(len(weight), rank) / 100)
        for name, weight in model.named_parameters()
        if name.startswith("model.layers.") and weight.dim() == 2
    }
    return matrices, torch.randn(model.config.hidden_size)


def stepper(native: NativeTransformer, dtype: torch.dtype, longest: int, steps: int) -> Step:
    """Minimum of ``steps`` steps."""
    shape = native.config
    num_pages = longest // 16 + 3
    sizes = shape.num_layers, num_pages, 16, shape.num_kv_heads, shape.head_dim
    cache = KVCache(*sizes, dtype, torch.device("cpu"))
    chunk = 256
    for start in range(0, longest, chunk):  # keys and values of some text, not zeros
        attend = NativeAttend(cache, ExtendBatch([start], [chunk], [list(range(num_pages))]))
        native(torch.randint(0, 40_000, (chunk,)), torch.arange(start, start + chunk), attend, torch.arange(0))

    def run(rows: int, context: int) -> float:
        attend = NativeAttend(cache, ExtendBatch([context], [rows], [list(range(num_pages))]))
        every, best = torch.arange(rows), float("inf")
        for _ in range(steps):
            start = time.perf_counter()
            native.greedy(every + 5, every + context, attend, every, masked=every[1:])
            best = min(best, (time.perf_counter() - start) * 1e3)
        return best

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048])
    args = parser.parse_args()
    torch.manual_seed(0)
    model, _ = load_model("demo", torch.float32)
    natives = {name: native_from_torch(model, "int8", threads=args.threads) for name in ("int8", "rank 16", "rank 64")}
    for rank in (16, 64):
        set_masked_lora(natives[f"rank {rank}"], *random_adapter(model, rank))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.gguf"
        quantize_checkpoint("demo", path, type="q8_0")
        natives["Q8_0"] = native_from_gguf(GGUFFile(path), threads=args.threads)
    longest = -(-max(args.contexts) // 256) * 256
    variants = {name: stepper(native, torch.float32, longest, args.steps) for name, native in natives.items()}
    variants["cache in int8"] = stepper(natives["int8"], torch.int8, longest, args.steps)
    samples: dict[tuple[str, int, int], list[float]] = {}
    for repetition in range(args.repetitions + 1):
        for context in args.contexts:
            for rows in args.rows:
                for name, run in variants.items():
                    ms = run(rows, context)
                    if repetition:  # the first warms up
                        samples.setdefault((name, rows, context), []).append(ms)
    print(describe())
    print("| variant | context | rows | ms, median | minimum | x int8, median of ratios |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = []
    for (name, rows, context), times in samples.items():
        ratios = [a / b for a, b in zip(times, samples["int8", rows, context], strict=True)]
        middle, ratio = statistics.median(times), statistics.median(ratios)
        print(f"| {name} | {context} | {rows} | {middle:.2f} | {min(times):.2f} | {ratio:.3f} |")
        results.append({"variant": name, "context": context, "rows": rows, "ms": times, "ratio": ratio})
    record = {"benchmark": "native_options", "cpu": cpu_name(), "threads": args.threads, "native": describe()}
    print(json.dumps({**record, "results": results}))


if __name__ == "__main__":
    main()
