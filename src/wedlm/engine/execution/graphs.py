# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of device steps: their sizes, capture and replay."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from wedlm.algorithm.params import DecodeParams
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.execution.device_step import ChunkRows, StepShape
from wedlm.engine.execution.sampling_tensors import BatchFlags
from wedlm.engine.plan import ScheduledRequest

# Chunks come in few sizes, so that few steps are captured; a step of more rows keeps the GPU busy while it is launched.
_CHUNK_SIZES = [4, 16, 64, 256, 1024, 4096]
_FEWEST_CHUNK_ROWS = 128
_FEWEST_BESIDE = 64  # rows of windows there
# Of auto's windows, whose number of rows changes from step to step.
_ADAPTIVE_WINDOWS = [1, 4, 16, 64]
_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 3072, 4096]


class ShapedStep(Protocol):
    """A ``DeviceStep``, or another rank's share of one."""

    device: torch.device

    def __call__(self, shape: StepShape, index: Any, chunks: ChunkRows | None = None, /) -> Tensor: ...


Announce = Callable[[Literal["capture", "run"], StepShape], None]


class StepGraphs:
    """The steps captured so far, by shape. Without a GPU nothing can be captured, and the same device code runs
    directly, for the tests. ``announce`` is called with the shape before each capture and each run."""

    def __init__(self, step: ShapedStep, announce: Announce | None = None) -> None:
        self._step, self._announce = step, announce
        self.captures = step.device.type == "cuda"
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._latest: torch.cuda.CUDAGraph | None = None  # keeps alive the memory that all captured steps share
        # Torch's own is of the process's first device. One for all, since memory is reused within a stream.
        self._stream = torch.cuda.Stream(step.device) if self.captures else None

    def clear(self) -> None:
        """Forget the graphs, so that each step is captured again when it is next needed."""
        self._graphs.clear()
        self._latest = None

    def lacks(self, shape: StepShape) -> bool:
        """Whether the step has to be captured before it can run."""
        return self.captures and shape not in self._graphs

    def add(self, shape: StepShape, index: Tensor | None, chunks: ChunkRows | None) -> None:
        """Capture the step. While capturing, its inputs name the null slot and empty chunks, which no step changes."""
        self._graphs[shape] = self.capture(shape, index, chunks)

    def run(self, shape: StepShape, index: Tensor | None, chunks: ChunkRows | None) -> Tensor:
        """Start the step and return its results, which lie on the device. The inputs are those of the capture."""
        if self._announce is not None:
            self._announce("run", shape)
        if not self.captures:
            return self._step(shape, index, chunks)
        graph, results = self._graphs[shape]
        graph.replay()
        return results

    def capture(
        self, shape: StepShape, index: Tensor | None, chunks: ChunkRows | None
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a graph, and where its results will be."""
        if self._announce is not None:
            self._announce("capture", shape)
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(shape, index, chunks)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        pool = None if self._latest is None else self._latest.pool()
        # Other threads may look at their events meanwhile, as NCCL's does.
        with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
            results = self._step(shape, index, chunks)
        self._latest = graph
        return graph, results

    def measure_costs(self, costs: StepCosts, most_rows: int, index: Tensor) -> None:
        """Time steps of padding alone, which read all weights and no keys, once for each size. ``index`` [1] is the
        null slot."""
        if not self.captures:  # the time of interpreted kernels means nothing: the table is made up
            if not costs.most_rows:
                costs.add(1, 1.0)
                costs.add(2, 1.1)
            return
        for num_rows in [size for size in _SIZES if costs.most_rows < size <= _size(most_rows)]:
            shape = padding_shape(num_rows)
            graph, _ = self.capture(shape, index, None)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for repeat in range(5):
                if repeat == 1:
                    start.record()
                if self._announce is not None:
                    self._announce("run", shape)
                graph.replay()
            end.record()
            end.synchronize()
            costs.add(num_rows, start.elapsed_time(end) / 4e3)


def padding_shape(num_rows: int) -> StepShape:
    """A step of padding alone. No row is masked, because AR's steps have no masked rows: what an adapter of masked rows
    costs is observed beside the forward."""
    flags = replace(BatchFlags.of([DecodeParams("verified")]), groups=False)
    return StepShape.of_windows(1, num_rows, num_rows, 16, flags)


def step_shape(windows: list[ScheduledRequest], chunks: list[ScheduledRequest], flags: BatchFlags) -> StepShape:
    """The shape of a captured step that holds these windows, whose flags are ``flags``, and these chunks."""
    has_adapters = any(one.request.adapter is not None for one in (*windows, *chunks))
    return replace(_sizes(windows, chunks, flags), has_adapters=has_adapters)


def _sizes(windows: list[ScheduledRequest], chunks: list[ScheduledRequest], flags: BatchFlags) -> StepShape:
    counts = [one.count for one in windows]
    num_rows, most = sum(counts), max(counts, default=0)
    widest = _window_size if flags.adaptive else _size
    # A captured step does the same with and without these; windows of a row each have no groups, so auto is as AR.
    flags = replace(flags, adaptive=False, entropy=False, groups=flags.groups and most > 1)
    streaming = num_rows
    if flags.streaming:
        streaming = sum(
            w.count if w.request.decode.is_verified else min(w.count, w.request.decode.most_logits) for w in windows
        )
    if not chunks:
        rows = _size(num_rows)
        return StepShape.of_windows(_size(len(windows)), rows, min(rows, _size(streaming)), widest(most), flags)
    rows = _size(max(_FEWEST_CHUNK_ROWS, num_rows + sum(one.count for one in chunks)))
    num_chunks = _chunk_size(len(chunks))
    if not windows:
        return StepShape(0, rows, 0, 0, flags, 0, num_chunks)
    window_rows = min(rows, _chunk_size(max(_FEWEST_BESIDE, num_rows)))
    num_logits = min(window_rows, _chunk_size(max(_FEWEST_BESIDE, streaming)))
    most = _chunk_size(max(16, most))
    return StepShape(_chunk_size(len(windows)), rows, num_logits, most, flags, window_rows, num_chunks)


def _size(number: int) -> int:
    """The smallest captured size that holds ``number``."""
    at = bisect_left(_SIZES, number)
    return _SIZES[at] if at < len(_SIZES) else -(-number // 1024) * 1024


def _window_size(number: int) -> int:
    """``_size`` for the longest of adaptive windows; the rows that it adds have no attention to compute."""
    return next((size for size in _ADAPTIVE_WINDOWS if size >= number), _size(number))


def _chunk_size(number: int) -> int:
    """``_size`` for steps that chunks share."""
    return next(size for size in _CHUNK_SIZES if size >= number)
