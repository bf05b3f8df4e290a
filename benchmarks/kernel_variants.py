# SPDX-License-Identifier: Apache-2.0
"""Variants of the GPU kernels, timed as they run: captured forwards of the 8B shape, each variant checked first.

    python -m benchmarks.kernel_variants OUT.json [--parts forward,products,…] [--shape 8b|tiny]

A variant changes constants of modules (``attention.SHORT``, ``norm.NORM_COLUMNS_PER_WARP``, …) or the tilings of
products of few rows. "error" is ‖logits - plain‖ / ‖plain‖ on two layers of the shape, plain being the packed model in
float32 with ``PagedSdpa``. Times are milliseconds: medians over blocks of graph replays; the baseline is repeated last.
"""

import argparse
import copy
import functools
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.engine_speed import MASK, SHAPES, random_model
from benchmarks.kernel_loop import auto, window
from benchmarks.kernel_prompts import host, prefill
from benchmarks.kernel_timing import (
    DEVICE,
    DTYPE,
    GPU,
    PAGE,
    Variant,
    applied,
    captured_ms,
    print_row,
    profile,
    relative,
)
from wedlm.algorithm.window import WindowState
from wedlm.attention.base import ExtendBatch, KVCache, RowVisibility
from wedlm.attention.paged import PagedAttend
from wedlm.attention.sdpa import PagedSdpa
from wedlm.kernels import attention, matmul, norm, rope
from wedlm.kernels.attention import SHORT, PagedRows
from wedlm.kernels.logits import greedy_rows
from wedlm.kernels.matmul import Tiling, few_rows_product, tiling_for
from wedlm.kernels.verified import verified_rows
from wedlm.model import Transformer
from wedlm.model.fused import FusedTransformer


def tiles(**changes: Any) -> Callable[[int, int], Tiling]:
    """The default tilings with these changes."""
    return lambda size, depth: replace(tiling_for(size, depth), **changes)


def fewer_stages(size: int, depth: int) -> Tiling:
    """Early tiles need room of their own."""
    tiling = tiling_for(size, depth)
    return replace(tiling, early=True, stages=tiling.stages - 1)


ATTENTION_CASES = ((1, 1), (1, 16), (8, 1), (8, 16))
WIDE = ((1, 1), (1, 16), (8, 1), (8, 16), (32, 1), (64, 1))
VARIANTS = [
    Variant("baseline", cases=(*WIDE, (128, 1), (32, 8), (32, 16))),
    Variant("splits <= 16", ((attention, "MAX_SPLITS", 16),), cases=ATTENTION_CASES),
    Variant("splits <= 8", ((attention, "MAX_SPLITS", 8),), cases=ATTENTION_CASES),
    Variant("splits <= 4", ((attention, "MAX_SPLITS", 4),), cases=ATTENTION_CASES),
    Variant("one stage", ((attention, "SHORT", replace(SHORT, stages=1)),), cases=ATTENTION_CASES),
    Variant("32 keys", ((attention, "SHORT", replace(SHORT, keys=32)),), cases=ATTENTION_CASES),
    Variant("128 keys", ((attention, "SHORT", replace(SHORT, keys=128)),), cases=ATTENTION_CASES),
    Variant("attention 8 warps", ((attention, "SHORT", replace(SHORT, warps=8)),), cases=ATTENTION_CASES),
    Variant("attention 2 warps", ((attention, "SHORT", replace(SHORT, warps=2)),), cases=((1, 1), (8, 1))),
    Variant("once", tiling=tiles(once=True)),
    Variant("early", tiling=fewer_stages),
    Variant("early, all stages", tiling=tiles(early=True)),
    Variant("descriptors", tiling=tiles(descriptors=True)),
    Variant("descriptors, 2 deep", tiling=tiles(descriptors=True, depth=64, stages=6)),
    Variant("norm 128 a warp", ((norm, "NORM_COLUMNS_PER_WARP", 128),)),
    Variant("norm 512 a warp", ((norm, "NORM_COLUMNS_PER_WARP", 512),)),
    Variant("rope 4 heads", ((rope, "HEADS_PER_PROGRAM", 4),), cases=WIDE),
    Variant("rope 2 heads, 2 warps", ((rope, "HEADS_PER_PROGRAM", 2), (rope, "ROPE_WARPS", 2)), cases=WIDE),
    Variant("rope 16 heads", ((rope, "HEADS_PER_PROGRAM", 16),), cases=WIDE),
    Variant("cuBLASLt", blas="cublaslt", cases=((8, 16), (128, 1), (32, 8), (32, 16))),
    Variant("baseline again", cases=WIDE),
]


@dataclass
class Windows:
    """S verified windows of R rows behind ``prompt`` tokens of random keys, and a forward of them."""

    model: Transformer
    num_sequences: int
    num_rows: int
    prompt: int
    model_length: int
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        shape, s = self.model.config, self.num_sequences
        pages = -(-(self.prompt + 64 + self.num_rows) // PAGE)
        heads = (shape.num_kv_heads, shape.head_dim, DTYPE, DEVICE)
        self.cache = KVCache(shape.num_layers, s * pages + 1, PAGE, *heads)
        torch.manual_seed(1)
        for part in (self.cache.keys, self.cache.values):
            part.normal_()
        self.table = torch.zeros(s, -(-self.model_length // PAGE), dtype=torch.long, device=DEVICE)
        self.table[:, :pages] = torch.randperm(s * pages, device=DEVICE).view(s, pages)
        self.lengths = [self.prompt + (7 * i) % 50 for i in range(s)]
        self.state = WindowState.empty(s, 64, DEVICE)
        self.state.cached.copy_(torch.tensor(self.lengths))
        self.state.width.fill_(self.num_rows)
        self.state.filled[:, : max(1, self.num_rows // 4)] = True
        self.state.tokens.random_(10, shape.vocab_size)
        self.index = torch.arange(s, device=DEVICE)

    def forward(self, fused: FusedTransformer) -> torch.Tensor:
        total = self.num_sequences * self.num_rows
        rows = verified_rows(self.state, self.index, self.table, PAGE, total, MASK, self.cache.keys.shape[1] - PAGE)
        groups = (rows.shared, rows.own_start) if self.num_rows > 1 else (None, None)
        plan = PagedRows(
            rows.row_start, rows.num_rows, rows.cached, self.index, self.table, PAGE, self.num_rows, self.model_length,
            *groups,
        )  # fmt: skip
        logits = fused(rows.tokens, rows.positions, PagedAttend(self.cache, [plan], rows.slots))
        self.rows = rows
        greedy_rows(logits, MASK)
        return logits


def plain_logits(windows: Windows, model: Transformer) -> torch.Tensor:
    """What the packed model in float32 says to the same rows over the same keys."""
    old = windows.cache
    shape = model.config
    heads = (shape.num_kv_heads, shape.head_dim, torch.float32, DEVICE)
    cache = KVCache(shape.num_layers, old.keys.shape[1] // PAGE, PAGE, *heads)
    cache.keys.copy_(old.keys)
    cache.values.copy_(old.values)
    windows.forward(FusedTransformer(windows.model))  # for the rows
    rows = windows.rows
    batch = ExtendBatch(
        windows.lengths, [windows.num_rows] * windows.num_sequences, windows.table.tolist(),
        RowVisibility(rows.shared, rows.own_start),
    )  # fmt: skip
    return model(rows.tokens, rows.positions, PagedSdpa(cache, batch), None)


def forward(model: Transformer, two: Transformer, args: argparse.Namespace) -> list[dict]:
    """Every variant: checked on two layers, then timed."""
    length = model.config.max_length
    exact = copy.deepcopy(two).float()
    checks = [Windows(two, s, r, 130, length) for s, r in ((1, 1), (3, 5), (1, 16), (8, 16))]
    expected = [plain_logits(windows, exact) for windows in checks]
    del exact
    cases: dict[tuple[int, int], Windows] = {}
    found = []
    for variant in VARIANTS:
        if time.perf_counter() - args.started > args.seconds and "again" not in variant.name:
            print(f"skipped for lack of time: {variant.name}")
            continue
        row: dict[str, Any] = {"variant": variant.name}
        try:
            with applied(variant):
                small = FusedTransformer(two, variant.tiling)
                pairs = zip(checks, expected, strict=True)
                row["error"] = max(relative(windows.forward(small), logits) for windows, logits in pairs)
                fused = FusedTransformer(model, variant.tiling)
                for case in variant.cases if GPU else variant.cases[:2]:
                    if case not in cases:
                        cases[case] = Windows(model, *case, args.prompt, length)
                    call = functools.partial(cases[case].forward, fused)
                    row["{}x{}".format(*case)] = round(captured_ms(call, 16), 4)
        except Exception as error:  # a variant that does not compile is a result
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        found.append(row)
        print_row(row)
    return found


TILINGS_16 = [
    Tiling(64, 128, 1, 3), Tiling(64, 128, 2, 4), Tiling(64, 64, 2, 6), Tiling(64, 256, 2, 3), Tiling(128, 64, 2, 4),
    Tiling(64, 128, 1, 3, descriptors=True), Tiling(64, 128, 2, 4, descriptors=True),
    Tiling(64, 256, 2, 3, descriptors=True), Tiling(128, 128, 1, 3, descriptors=True),
    Tiling(128, 64, 2, 6, descriptors=True), Tiling(64, 128, 4, 4, descriptors=True),
]  # fmt: skip
TILINGS_128 = [
    Tiling(128, 64, 1, 4, warps=8), Tiling(128, 64, 2, 4, warps=8), Tiling(128, 64, 1, 4, warps=8, descriptors=True),
    Tiling(128, 64, 2, 4, warps=8, descriptors=True), Tiling(128, 64, 4, 4, warps=8, descriptors=True),
    Tiling(256, 64, 1, 3, warps=8, descriptors=True), Tiling(64, 128, 4, 3, descriptors=True),
]  # fmt: skip


def rate(gigabytes: float, call: Callable[[torch.Tensor], Any], weights: list[torch.Tensor]) -> int | str:
    """GB/s, or what went wrong."""
    try:
        return round(1e3 * gigabytes / captured_ms(lambda: [call(weight) for weight in weights], 4, 3))
    except Exception as error:  # a tiling that does not compile is a result
        return type(error).__name__


def products(model: Transformer, two: Transformer, args: argparse.Namespace) -> list[dict]:
    """GB/s of each product: all layers' weights one after the other in a graph."""
    layers = model.model.layers
    weights = {
        "qkv": [layer.self_attn.qkv_proj.weight for layer in layers],
        "o": [layer.self_attn.o_proj.weight for layer in layers],
        "gate_up": [layer.mlp.gate_up_proj.weight for layer in layers],
        "down": [layer.mlp.down_proj.weight for layer in layers],
    }
    found = []
    for rows, tilings in ((16, TILINGS_16), (128, TILINGS_128)):
        matmul.MAX_ROWS = max(64, rows)
        for name, of_layers in weights.items():
            size, depth = of_layers[0].shape
            x = torch.randn(rows, depth, device=DEVICE, dtype=DTYPE)
            gigabytes = 1e-9 * size * depth * len(of_layers) * DTYPE.itemsize
            row: dict[str, Any] = {"name": f"{name} x{rows}"}

            for blas in ("cublas", "cublaslt") if GPU else ("cublas",):
                if GPU:
                    torch.backends.cuda.preferred_blas_library(blas)
                row[blas] = rate(gigabytes, functools.partial(F.linear, x), of_layers)
            if GPU:
                torch.backends.cuda.preferred_blas_library("cublas")
            for tiling in tilings if GPU else tilings[:6:5]:
                if tiling.splits > 1 and name == "gate_up":
                    continue
                if time.perf_counter() - args.started > args.seconds:
                    break
                label = f"{tiling.outputs}/{tiling.depth}/{tiling.splits}/{tiling.stages}" + "d" * tiling.descriptors
                call = functools.partial(few_rows_product, x, tiling=tiling, gated=name == "gate_up")
                row[label] = rate(gigabytes, call, of_layers)
            found.append(row)
            print_row(row)
    matmul.MAX_ROWS = 64
    return found


def step_profile(model: Transformer, two: Transformer, args: argparse.Namespace) -> list[dict]:
    """Kernels of captured steps, with the time that each takes beside its neighbours."""
    found = []
    for case in ((1, 1), (1, 16), (8, 16)) if GPU else ((1, 1),):
        windows, fused = Windows(model, *case, args.prompt, model.config.max_length), FusedTransformer(model)
        captured_ms(lambda windows=windows, fused=fused: windows.forward(fused), 1, 1)
        if GPU:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                windows.forward(fused)
            graph.replay()
            print(f"  {case[0]} x {case[1]}")
            found.append({"name": "profile {}x{}".format(*case), "kernels": profile(graph.replay)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--parts", default="window,forward,prefill,auto,step_profile,products,host")
    parser.add_argument("--prompt", type=int, default=512 if GPU else 40)
    parser.add_argument("--seconds", type=float, default=240.0, help="start no variant later than this")
    args = parser.parse_args()
    args.started = time.perf_counter()
    SHAPES["two layers"] = {**SHAPES[args.shape], "num_hidden_layers": 2}
    model, two = (random_model(shape, DEVICE, DTYPE) for shape in (args.shape, "two layers"))
    name = torch.cuda.get_device_name() if GPU else "cpu"
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "shape": args.shape}
    print(json.dumps(results))
    parts = {
        "window": window, "step_profile": step_profile, "forward": forward, "prefill": prefill, "host": host,
        "products": products, "auto": auto,
    }  # fmt: skip
    for part in args.parts.split(","):
        print(f"== {part} at {time.perf_counter() - args.started:.0f} s", flush=True)
        with torch.inference_mode():
            results[part] = parts[part](model, two, args)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
        args.out.write_text(json.dumps(results, indent=1))
    print(f"{time.perf_counter() - args.started:.0f} s")


if __name__ == "__main__":
    main()
