# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of kernels share: graphs timed, variants applied, rows printed."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from wedlm.kernels.matmul import Tiling

PAGE = 16
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # the interpreter has no dot of bfloat16


@dataclass(frozen=True)
class Variant:
    """Constants to change, and how the tiling of products of few rows changes."""

    name: str
    constants: tuple[tuple[ModuleType, str, Any], ...] = ()
    tiling: Callable[[int, int], Tiling | None] | None = None
    cases: tuple[tuple[int, int], ...] = ((1, 1), (1, 16), (8, 1))
    blas: str = "cublas"


@contextlib.contextmanager
def applied(variant: Variant) -> Iterator[None]:
    before = [(module, name, getattr(module, name)) for module, name, _ in variant.constants]
    for module, name, value in variant.constants:
        setattr(module, name, value)
    if GPU:
        torch.backends.cuda.preferred_blas_library(variant.blas)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        if GPU:
            torch.backends.cuda.preferred_blas_library("cublas")


def captured_ms(call: Callable[[], Any], replays: int, blocks: int = 5) -> float:
    """Median milliseconds of a replay of ``call`` as a graph; without a GPU of the call itself."""
    if not GPU:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(blocks + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / replays)
    return statistics.median(times[1:])


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


def print_row(row: dict) -> None:
    text = " ".join(
        f"{key} {value:.4g}"
        if isinstance(value, float)
        else f"{value}"
        if key in ("variant", "name")
        else f"{key} {value}"
        for key, value in row.items()
    )
    print(text, flush=True)


def profile(call: Callable[[], Any], most: int = 14) -> list[tuple[str, int, float]]:
    """(kernel, launches, ms) by time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    events = sorted(prof.key_averages(), key=lambda e: -e.device_time_total)[:most]
    rows = [(e.key[:70], e.count, round(e.device_time_total / 1e3, 3)) for e in events]
    for name, count, ms in rows:
        print(f"    {ms:9.3f} ms  {count:4d} x  {name}")
    return rows


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()
