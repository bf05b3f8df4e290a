# SPDX-License-Identifier: Apache-2.0
"""Launched steps: how the host waits for their results."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from wedlm.engine.plan import StepResults, WindowResult
from wedlm.kernels.step_output import first_logprob


class PendingStep(Protocol):
    """A launched step."""

    def wait(self) -> StepResults:
        """Wait for the step, but not for steps launched after it. Call it once."""
        ...


class FinishedStep:
    """The ``PendingStep`` of an executor that computes the step while it launches it."""

    def __init__(self, results: StepResults) -> None:
        self._results = results

    def wait(self) -> StepResults:
        return self._results


class HostBuffer:
    """Pinned memory and an event for the results of one pending step at a time; both are slow to make."""

    def __init__(self, results: Tensor) -> None:
        on_gpu = results.is_cuda
        self.memory = torch.empty(results.shape, dtype=results.dtype, pin_memory=on_gpu and len(results) > 0)
        self.numbers = self.memory.numpy()
        self.done = torch.cuda.Event() if on_gpu else None


class DeviceStepResults:
    """A ``PendingStep`` whose results, laid out as in ``kernels.step_output``, are being copied to the host.

    ``free_buffers`` are free for this shape; a buffer returns to them once it is read.
    """

    def __init__(self, num_windows: int, num_chunks: int, results: Tensor, free_buffers: list[HostBuffer]) -> None:
        self._num_windows, self._num_chunks = num_windows, num_chunks
        self._free_buffers = free_buffers
        self._buffer = free_buffers.pop() if free_buffers else HostBuffer(results)
        self._buffer.memory.copy_(results, non_blocking=True)
        if self._buffer.done is not None:
            self._buffer.done.record()

    def wait(self) -> StepResults:
        if self._buffer.done is not None:
            self._buffer.done.synchronize()
        self._free_buffers.append(self._buffer)  # no step uses it before this has returned
        if not self._num_windows:
            return [None] * self._num_chunks
        numbers = self._buffer.numbers[: self._num_windows]
        counts = numbers[:, :4].T.tolist()
        widest = max(1, *counts[0])
        # In one list each: lists by the hundred keep the garbage collector busy.
        tokens = numbers[:, 4 : 4 + widest].ravel().tolist()
        logprobs = numbers[:, first_logprob(numbers.shape) :].view(np.float32)[:, :widest].ravel().tolist()
        results = [
            WindowResult(tokens[at : at + count], logprobs[at : at + count], (), rows, cached, drafts)
            for at, count, rows, cached, drafts in zip(range(0, len(tokens), widest), *counts, strict=True)
        ]
        return [*results, *[None] * self._num_chunks]
