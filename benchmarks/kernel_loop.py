# SPDX-License-Identifier: Apache-2.0
"""The serving loop in ``kernel_variants``: streaming with and without kernels, slow steps of auto decoding."""

import argparse
import gc
import itertools
import statistics
import time
from typing import Any

from benchmarks import engine_speed
from benchmarks.engine_speed import ALL_MASKS, ALL_ROWS, ALWAYS, MASK, Bench, sampling
from benchmarks.kernel_timing import DEVICE, GPU, print_row
from wedlm.engine import device_step
from wedlm.engine.auto import AutoRows
from wedlm.engine.build import build_engine
from wedlm.engine.device_step import DeviceStep
from wedlm.engine.engine import Engine, EngineConfig
from wedlm.engine.graph_runner import GraphRunner
from wedlm.model import Transformer


def make_engine(model: Transformer, max_num_seqs: int = 128) -> Engine:
    config = EngineConfig(
        vocab_size=model.config.vocab_size, mask_token_id=MASK, end_token_ids=(2,),
        max_model_len=model.config.max_length if GPU else 512, max_num_seqs=max_num_seqs if GPU else 4,
        max_num_batched_tokens=8192,
    )  # fmt: skip
    return build_engine(model, config, None, kv_cache_bytes=22 * 10**9 if GPU else 2**22, cuda_graphs=GPU)


def window(model: Transformer, two: Transformer, args: argparse.Namespace) -> list[dict]:
    """Streaming steps in the serving loop with the window's arithmetic as kernels and as plain operations."""
    if not GPU:
        return []
    found = []
    bench = Bench(make_engine(model))
    kernels = DeviceStep._streaming
    for name, step in (("kernels", kernels), ("plain", DeviceStep._any), ("kernels again", kernels)):
        DeviceStep._streaming = step
        bench.engine.runner.forget_graphs()
        row: dict[str, Any] = {"name": f"streaming W=8, {name}"}
        for batch in (1, 8, 32):
            figures = bench.measure(batch, sampling("streaming", **ALL_MASKS), args.prompt, 8, 60)
            row[f"{batch}x16"] = figures["median_ms"]
        found.append(row)
        print_row(row)
    DeviceStep._streaming = kernels
    row = {"name": "loop"}
    for batch, decoding, options in ((1, "autoregressive", {}), (1, "verified", ALL_ROWS), (8, "autoregressive", {}),
                                     (8, "verified", ALL_ROWS)):  # fmt: skip
        figures = bench.measure(batch, sampling(decoding, **options), args.prompt, 8, 60)
        row[f"{batch} {decoding}"] = figures["median_ms"]
    found.append(row)
    print_row(row)
    return found


def auto(model: Transformer, two: Transformer, args: argparse.Namespace) -> list[dict]:
    """Slow steps of auto decoding: what happened in them."""
    if not GPU:
        return []
    engine = make_engine(model)
    bench = Bench(engine)
    captures: list[float] = []
    pauses: list[float] = []
    original = GraphRunner._captured

    def timed(self, shape, index):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        result = original(self, shape, index)
        captures.append(1e3 * (time.perf_counter() - start))
        return result

    def collected(phase: str, info: dict) -> None:
        pauses.append(-time.perf_counter()) if phase == "start" else pauses.__setitem__(
            -1, 1e3 * (pauses[-1] + time.perf_counter())
        )

    GraphRunner._captured = timed
    gc.callbacks.append(collected)
    found = []
    for batch, rates in ((64, ALWAYS), (128, (0.9,))):
        engine_speed.accept_at(rates, DEVICE)
        getattr(engine.runner, "forget_graphs", lambda: None)()
        if engine.auto is not None:
            engine.auto = AutoRows(engine.auto.costs)
        requests = bench.start(batch, sampling("auto", **ALL_ROWS), args.prompt)
        if not found:
            costs = {
                r: round(1e3 * s, 3) for r, s in zip(engine.auto.costs._rows, engine.auto.costs._seconds, strict=True)
            }
            print("costs", costs, f"{len(captures)} captures {sum(captures):.0f} ms")
        bench.steps(requests, 80)
        steps = []
        tokens = sum(r.num_output_tokens for r in requests)
        for number in range(150):
            captures.clear()
            pauses.clear()
            start = time.perf_counter()
            engine.step()
            took = 1e3 * (time.perf_counter() - start)
            steps.append((number, round(took, 2), engine.auto.row_budget, round(sum(captures)), round(sum(pauses))))
        tokens = sum(r.num_output_tokens for r in requests) - tokens
        median = statistics.median(took for _, took, *_ in steps)
        slow = [step for step in steps if step[1] > 1.25 * median]
        row = {"name": f"auto {batch} at {rates}", "median_ms": median, "mean_ms": statistics.mean(s[1] for s in steps),
               "tokens_per_step": tokens / 150 / batch, "slow": len(slow)}  # fmt: skip
        print_row(row)
        print("    slow (step, ms, budget, ms of captures, ms of garbage collection):", slow[:25])
        budgets = [step[2] for step in steps]
        print("    budgets:", [(b, budgets.count(b)) for b in sorted(set(budgets))],
              "changes", sum(a != b for a, b in itertools.pairwise(budgets)),
              "extra", {k: round(1e3 * v, 2) for k, v in engine.auto._extra.items()})  # fmt: skip
        found.append({**row, "steps": steps})
        bench.end(requests)
    gc.callbacks.remove(collected)
    GraphRunner._captured = original
    device_step.verified_advance = engine_speed._advance
    return found
