# SPDX-License-Identifier: Apache-2.0
"""Attention over pages on a GPU, in the shape of an 8B: our kernel by tile for steps of few rows, and beside
FlashAttention-3 for prompts; one JSON line a measurement.

    python benchmarks/paged_attention.py tiles     # µs a layer, a graph of 36 layers with a cache each
    python benchmarks/paged_attention.py prompts   # ms of one layer, call by call, so launches count at few rows
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wedlm.attention.flash import FlashRows, find_flash
from wedlm.kernels import attention
from wedlm.kernels.attention import COPIED, SHORT, PagedRows, Tile, paged_attention

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HEADS, KV_HEADS, HEAD_DIM, LAYERS = (32, 8, 128, 36) if CUDA else (4, 2, 16, 1)
MAX_KEYS = 40_960 if CUDA else 256
# Of windows: rows, keys, warps, stages; then whether keys are copied in whole tiles. None: as the engine has it.
TILES: dict[str, tuple[Tile | None, int | None]] = {
    "the engine's": (None, None),
    "copied": (COPIED[SHORT], None),
    "3 stages": (Tile(64, 64, 4, 3, True, True), None),
    "4 stages": (Tile(64, 64, 4, 4, True, True), None),
    "32 keys, 4 stages": (Tile(64, 32, 4, 4, True, True), None),
    "2 warps, 3 stages": (Tile(64, 64, 2, 3, True, True), None),
    "8 warps": (Tile(64, 64, 8, 2, True, True), None),
    "addresses, 3 stages": (Tile(64, 64, 4, 3, True), None),
    "keys in 2 parts": (None, 2),
    "keys in 4 parts": (None, 4),
}
STEPS = ((32, 1), (64, 1), (96, 1), (128, 1), (8, 16), (32, 6), (64, 6)) if CUDA else ((4, 1),)
KEYS = 540 if CUDA else 90
CHUNKS = ((2048, 0), (2048, 2048), (2048, 6144), (1024, 4096), (512, 4096)) if CUDA else ((40, 20),)  # rows, cached


@dataclass(frozen=True)
class Paged:
    """Queries and the rows that they belong to, over keys and values of each layer."""

    q: Tensor
    rows: PagedRows
    caches: Sequence[tuple[Tensor, Tensor]]


def paged(counts: Sequence[int], cached: Sequence[int], page_size: int, layers: int) -> Paged:
    """Random numbers for sequences of these rows behind these keys; each has its own pages, one after the other."""
    dtype = torch.bfloat16 if CUDA else torch.float16
    torch.manual_seed(0)
    width = -(-max(map(sum, zip(counts, cached, strict=True))) // page_size)
    table = torch.arange(len(counts) * width, device=DEVICE).view(len(counts), -1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    count = torch.tensor(counts, device=DEVICE)
    rows = PagedRows(
        row_start=count.cumsum(0) - count,
        num_rows=count,
        cached=torch.tensor(cached, device=DEVICE),
        table_row=torch.arange(len(counts), device=DEVICE),
        page_table=table,
        page_size=page_size,
        max_rows=max(counts),
        max_keys=MAX_KEYS,
    )
    slots = table.numel() * page_size
    cache = [(random(slots, KV_HEADS, HEAD_DIM), random(slots, KV_HEADS, HEAD_DIM)) for _ in range(layers)]
    return Paged(random(sum(counts), HEADS, HEAD_DIM), rows, cache)


@contextmanager
def tile(chosen: Tile | None, splits: int | None) -> Iterator[None]:
    """Use this tile for windows, and split keys into ``splits`` parts; None leaves the engine's choice."""
    before = COPIED[SHORT], attention.SINGLE, attention.num_splits
    if chosen is not None:
        COPIED[SHORT] = attention.SINGLE = chosen
    if splits is not None:
        attention.num_splits = lambda *_: splits
    try:
        yield
    finally:
        COPIED[SHORT], attention.SINGLE, attention.num_splits = before


def milliseconds(work: Callable[[], Any], in_graph: bool) -> float | None:
    """The median of five times of five calls; None without a GPU."""
    work()
    if not CUDA:
        return None
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 5)
    return statistics.median(times)


def tiles() -> None:
    for sequences, count in STEPS:
        # Lengths differ, as those of requests do.
        one = paged([count] * sequences, [KEYS - count + n % 40 for n in range(sequences)], 64, LAYERS)

        def work(one: Paged = one) -> None:
            for keys, values in one.caches:
                paged_attention(one.q, keys, values, one.rows)

        for name, (chosen, splits) in TILES.items():
            with tile(chosen, splits):
                ms = milliseconds(work, in_graph=True)
            us = None if ms is None else round(1e3 * ms / LAYERS, 2)
            print(json.dumps({"tile": name, "sequences": sequences, "rows": count, "us_a_layer": us}), flush=True)


def prompts() -> None:
    for page_size in (64, 128) if CUDA else (64,):
        for count, cached in CHUNKS:
            one = paged([count], [cached], page_size, 1)
            keys, values = one.caches[0]
            found = {"rows": count, "cached": cached, "page_size": page_size}
            ours = milliseconds(partial(paged_attention, one.q, keys, values, one.rows), in_graph=False)
            flash = find_flash(DEVICE, one.q.dtype, KV_HEADS, HEAD_DIM, page_size)
            theirs: float | str | None = flash.fault or "not installed"
            if flash.call is not None:
                planned = FlashRows(flash.call, one.rows, count)
                theirs = milliseconds(partial(planned, one.q, keys, values), in_graph=False)
            print(json.dumps({**found, "ours_ms": ours, "flash_attention_3_ms": theirs}), flush=True)


PARTS = {"tiles": tiles, "prompts": prompts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    PARTS[parser.parse_args().part]()


if __name__ == "__main__":
    main()
