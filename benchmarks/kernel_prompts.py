# SPDX-License-Identifier: Apache-2.0
"""Prompts in ``kernel_variants``: attention of long chunks, whole prompts, and what the host takes to launch them."""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

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
    synchronize,
)
from wedlm.attention import paged
from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.attention.paged import plan_paged
from wedlm.kernels import attention
from wedlm.kernels.attention import LONG, PagedRows, Tile, paged_attention
from wedlm.model import Transformer
from wedlm.model.fused import FusedTransformer


def attention_of_a_prompt(heads: int, kv_heads: int, d: int, start: int, count: int) -> list[dict]:
    """TFLOP/s of attention of a chunk of ``count`` rows behind ``start`` keys, by tile and by library."""
    keys, values = (torch.randn(start + count + PAGE, kv_heads, d, device=DEVICE, dtype=DTYPE) for _ in range(2))
    q = torch.randn(count, heads, d, device=DEVICE, dtype=DTYPE)
    visible = count * start + count * (count + 1) / 2
    flops = 4 * heads * d * visible

    def tensor(value: int) -> torch.Tensor:
        return torch.tensor([value], device=DEVICE)

    table = torch.arange((start + count) // PAGE + 1, device=DEVICE)[None]
    rows = PagedRows(
        tensor(0), tensor(count), tensor(start), tensor(0), table, PAGE, max_rows=count, max_keys=start + count
    )
    share = heads // kv_heads
    tail = max(1, count - 64)  # check the last rows in float64 on plain operations
    k, v = (x[: start + count].double().repeat_interleave(share, 1) for x in (keys, values))
    scores = torch.einsum("thd,jhd->htj", q[tail:].double(), k) * d**-0.5
    limit = start + torch.arange(tail, count, device=DEVICE)
    scores.masked_fill_(torch.arange(start + count, device=DEVICE) > limit[:, None], -torch.inf)
    expected = torch.einsum("htj,jhd->thd", scores.softmax(-1), v).float()
    del k, v, scores
    found = []

    def note(name: str, call: Callable[[], torch.Tensor]) -> None:
        row: dict[str, Any] = {"name": name, "start": start, "count": count}
        try:
            row["error"] = relative(call()[tail:], expected)
            ms = captured_ms(call, 3, 3)
            row.update(ms=round(ms, 4), tflops=round(1e-9 * flops / ms, 1))
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:160]
        found.append(row)
        print_row(row)

    long_tiles = [
        LONG, replace(LONG, halves=True), Tile(128, 64, 8, 3, True), Tile(128, 128, 8, 2, True),
        Tile(128, 128, 8, 3, True), Tile(128, 32, 8, 4, True), Tile(64, 64, 4, 3, True), Tile(128, 64, 4, 3, True),
        Tile(256, 64, 8, 3, True),
    ]  # fmt: skip
    for tile in long_tiles if GPU else long_tiles[:2]:
        with applied(Variant("", ((attention, "LONG", tile),))):
            note(f"ours {tile.rows}/{tile.keys}/{tile.warps}/{tile.stages}{' halves' if tile.halves else ''}",
                 lambda: paged_attention(q, keys, values, rows))  # fmt: skip
    chunk = paged.Chunk(0, count, torch.arange(start + count, device=DEVICE))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if GPU else (SDPBackend.MATH,):
        with sdpa_kernel(backend):
            note(f"gather + {backend.name}", lambda: chunk.attend(q, keys, values))
    note("gather + torch's choice", lambda: chunk.attend(q, keys, values))
    if GPU:
        own = q.transpose(0, 1)[None]
        k, v = (x[: start + count].transpose(0, 1)[None] for x in (keys, values))
        bias = causal_lower_right(count, start + count)
        note("no gather", lambda: F.scaled_dot_product_attention(own, k, v, attn_mask=bias, enable_gqa=True)[0]
             .transpose(0, 1))  # fmt: skip
        try:
            from torch.nn.attention.varlen import varlen_attn

            ends = [torch.tensor([0, n], device=DEVICE, dtype=torch.int32) for n in (count, start + count)]
            note("varlen_attn, no gather", lambda: varlen_attn(
                q, keys[: start + count], values[: start + count], *ends, count, start + count,
                window_size=(-1, 0), enable_gqa=True,
            ))  # fmt: skip
        except ImportError as error:
            print("varlen:", error)
    return found


def prefill(model: Transformer, two: Transformer, args: argparse.Namespace) -> list[dict]:
    """Attention of prompts, then the whole prompt of 8,192 with where its time goes."""
    shape = model.config
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    found = []
    for start, count in ((0, 8192), (6144, 2048), (512, 512)) if GPU else ((0, 80), (40, 60)):
        found += attention_of_a_prompt(*heads, start, count)
    length = 8192 if GPU else 64
    cache = KVCache(shape.num_layers, length // PAGE + 1, PAGE, *heads[1:], DTYPE, DEVICE)
    batch = ExtendBatch([0], [length], [list(range(length // PAGE))])
    tokens = torch.randint(10, shape.vocab_size, (length,), device=DEVICE)
    positions, last = torch.arange(length, device=DEVICE), torch.tensor([length - 1], device=DEVICE)
    fused = FusedTransformer(model)

    def whole() -> torch.Tensor:
        return fused(tokens, positions, plan_paged(cache, batch), last)

    for name, library, tile in (("ours", None, LONG), ("ours, halves", None, replace(LONG, halves=True, stages=3)),
                                ("library", 256, LONG)):  # fmt: skip
        with applied(Variant("", ((paged, "LIBRARY_ROWS", library), (attention, "LONG", tile)))):
            times = []
            for _ in range(4 if GPU else 1):
                synchronize()
                start_s = time.perf_counter()
                whole()
                synchronize()
                times.append(time.perf_counter() - start_s)
            row = {"name": f"prompt of {length}, {name}", "ms": round(1e3 * min(times), 2)}
            row["tokens_per_second"] = round(length / min(times))
            found.append(row)
            print_row(row)
            if GPU and name != "ours, halves":
                found.append({"name": f"profile, {name}", "kernels": profile(whole)})
    return found


def host(model: Transformer, two: Transformer, args: argparse.Namespace) -> list[dict]:
    """Chunks outside of graphs: when Python is done, and when the GPU is."""
    shape = model.config
    cache = KVCache(shape.num_layers, 4096 // PAGE, PAGE, shape.num_kv_heads, shape.head_dim, DTYPE, DEVICE)
    fused = FusedTransformer(model)
    found = []
    for count in (64, 128, 256, 512, 1024, 2048) if GPU else (16,):
        tokens, positions = (
            torch.randint(10, shape.vocab_size, (count,), device=DEVICE),
            torch.arange(count, device=DEVICE),
        )
        batch = ExtendBatch([0], [count], [list(range(-(-count // PAGE)))])
        last = torch.tensor([count - 1], device=DEVICE)
        best = [1e9, 1e9, 1e9]
        for _ in range(4 if GPU else 1):
            synchronize()
            start = time.perf_counter()
            plan = plan_paged(cache, batch)
            planned = time.perf_counter()
            fused(tokens, positions, plan, last)
            returned = time.perf_counter()
            synchronize()
            times = (planned - start, returned - start, time.perf_counter() - start)
            best = [min(a, 1e3 * b) for a, b in zip(best, times, strict=True)]
        row = {
            "name": f"chunk of {count}",
            **dict(zip(("plan", "host", "all"), (round(b, 2) for b in best), strict=True)),
        }
        found.append(row)
        print_row(row)
    return found
