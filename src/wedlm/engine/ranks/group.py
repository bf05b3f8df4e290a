# SPDX-License-Identifier: Apache-2.0
"""What ranks exchange while they compute: gloo between processes on a CPU, NCCL between GPUs."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import AllgatherOptions

# More rows than this are added up by NCCL's own sum, which sends fewer bytes; gathering takes one exchange instead of
# two, which is what few rows wait for.
_MOST_GATHERED_ROWS = 64


class Group:
    """The ranks of one model on ``device``, once they are connected. A step's exchanges come in one order on all.

    ``deterministic``: no bit of a sum depends on how many rows there are. On a CPU that is always so.
    """

    def __init__(self, rank: int, size: int, device: torch.device, deterministic: bool = False) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.always_gathers = deterministic or device.type != "cuda"
        self.bytes_sent = 0  # by this rank, of numbers; what the libraries add is not counted
        self._group: Any = None

    def connect(self, directory: Path, timeout_s: float) -> None:
        """Meet the others, who know the same empty directory; whoever then waits longer for one of them gets a
        RuntimeError. Only the loopback interface is used between processes on a CPU."""
        store = distributed.FileStore(str(directory / "store"), self.size)
        timeout = timedelta(seconds=timeout_s)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # Torch would end this whole process when another rank does not answer; rank 0's has more to do.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = distributed.ProcessGroupNCCL(store, self.rank, self.size, options)
        else:
            gloo: Any = distributed.ProcessGroupGloo
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            options._timeout = timeout
            self._group = gloo(store, self.rank, self.size, options)
        self.gather(torch.zeros(1, device=self.device))  # NCCL connects at its first exchange, no later one may

    def abort(self) -> None:
        """End what waits for another rank, with an error, from any thread."""
        group, self._group = self._group, None
        if group is not None and self.device.type == "cuda":
            group.abort()

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` [T, ...], the same bits on each rank. Gathered numbers are added up in the order
        of the ranks, in float32, and rounded once."""
        parts = self.parts(x)
        return parts if parts.ndim == x.ndim else add_up(parts)

    def parts(self, x: Tensor) -> Tensor:
        """``sum``, or what is still to be added up so: [N, T, ...]."""
        if self.always_gathers or len(x) <= _MOST_GATHERED_ROWS:
            return self.gather(x)
        self._count(2 * (self.size - 1) * x.nbytes // self.size)
        self._connected.allreduce([x], _on_this_stream(distributed.AllreduceOptions())).wait()
        return x

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x``, of one shape: [N, ...] in their order."""
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
            self._count((self.size - 1) * x.nbytes)
            # Bytes, because gloo does not know every type.
            given, taken = x.contiguous().view(torch.uint8), out.view(torch.uint8)
            options = _on_this_stream(AllgatherOptions())
            self._connected._allgather_base(taken.view(-1), given.view(-1), options).wait()
        return out

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """All ranks' ``x``, of one shape, on rank 0: [N, ...]; None on the others."""
        options = _on_this_stream(distributed.GatherOptions())
        options.rootRank = 0
        x = x.contiguous()
        if self.rank:
            self._count(x.nbytes)
            self._connected.gather([], [x], options).wait()
            return None
        out = x.new_empty(self.size, *x.shape)
        self._connected.gather([list(out.unbind())], [x], options).wait()
        return out

    def broadcast(self, x: Tensor) -> None:
        """Rank 0's ``x`` to all, in place."""
        self._count(0 if self.rank else (self.size - 1) * x.nbytes)
        options = _on_this_stream(distributed.BroadcastOptions())
        options.rootRank = 0
        self._connected.broadcast([x], options).wait()

    @property
    def _connected(self) -> Any:
        if self._group is None:
            raise RuntimeError("the ranks are not connected")
        return self._group

    def _count(self, num_bytes: int) -> None:
        self.bytes_sent += num_bytes


def _on_this_stream(options: Any) -> Any:
    """For an exchange between our kernels: NCCL has a stream of its own otherwise, and each exchange two waits."""
    options.asyncOp = False
    return options


def add_up(parts: Tensor) -> Tensor:
    """The sum over the first dimension, one after the other, in float32 and rounded once."""
    total = parts[0].float() + parts[1]
    for part in parts[2:]:
        total += part
    return total.to(parts.dtype)
