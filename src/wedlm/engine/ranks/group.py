# SPDX-License-Identifier: Apache-2.0
"""What ranks exchange while they compute: gloo between processes on a CPU, NCCL between GPUs."""

import os
import threading
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import AllgatherOptions

from wedlm.engine.resolve_options import make_current

# More rows than this are added up by NCCL's own sum, which sends fewer bytes; gathering takes one exchange instead of
# two, which is what few rows wait for. Of two ranks both send the same.
_MOST_GATHERED_ROWS = 64
_MOST_ROWS_OF_TWO = 256
_ABORT_S = 10.0


class Group:
    """The ranks of one model on ``device``, once they are connected. All ranks make a step's exchanges in the same
    order.

    ``deterministic``: no bit of a sum depends on the number of rows. On a CPU this always holds. Make it before the
    weights are loaded, because it makes ``device`` the current one.
    """

    def __init__(self, rank: int, size: int, device: torch.device, deterministic: bool = False) -> None:
        self.rank, self.size, self.device = rank, size, device
        make_current(device)
        self.always_gathers = deterministic or device.type != "cuda"
        self.bytes_sent = 0  # by this rank, of numbers; what the libraries add is not counted
        self.rows_of: tuple[int, torch.dtype] | None = None  # width and type of the rows that are summed, once known
        self.captured: weakref.WeakSet[Any] = weakref.WeakSet()  # ``StepGraphs`` that have exchanges in them
        self._group: Any = None
        self._exchange: Any = None  # between GPUs
        self._aborting: threading.Thread | None = None

    def connect(self, directory: Path, timeout_s: float) -> None:
        """Connect to the other ranks, which know the same empty directory. A rank that waits longer for another gets a
        RuntimeError. Between processes on a CPU only the loopback interface is used."""
        store = distributed.FileStore(str(directory / "store"), self.size)
        timeout = timedelta(seconds=timeout_s)
        if self.device.type == "cuda":
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
        if self.device.type == "cuda" and self.rows_of is not None:
            from wedlm.kernels.exchange import Exchange  # which imports triton

            most = _MOST_ROWS_OF_TWO if self.size == 2 else _MOST_GATHERED_ROWS
            self._exchange = Exchange(store, directory.name, self.rank, self.size, self.device, *self.rows_of, most)
        self.gather(torch.zeros(1, device=self.device))  # NCCL connects at its first exchange, no later one may

    def abort(self) -> None:
        """End every wait for another rank with an error; call it from any thread."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.stop()
        group, self._group = self._group, None
        if group is not None and self.device.type == "cuda":
            # It ends what waits at once, and returns only when no captured step has its exchanges any longer.
            self._aborting = threading.Thread(target=group.abort, name="wedlm-abort", daemon=True)
            self._aborting.start()

    def close(self) -> None:
        """``abort``, and nothing of the libraries is left; from the thread that runs the steps. They are captured again
        when they are next needed."""
        self.abort()
        for graphs in list(self.captured):
            graphs.clear()
        if self._aborting is not None:
            self._aborting.join(_ABORT_S)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` [T, ...], with the same bits on each rank. Gathered numbers are added in the
        order of the ranks, in float32, and rounded once."""
        if self.always_gathers or len(x) <= _MOST_GATHERED_ROWS:
            return add_up(self.gather(x))
        self._count(2 * (self.size - 1) * x.nbytes // self.size)
        _end(self._connected.allreduce([x], _on_this_stream(distributed.AllreduceOptions())))
        return x

    def parts(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Parts that add up to all ranks' ``x`` as ``sum`` would: [N, T, C], or their sum [T, C]. ``x`` is [T, C], or
        partial sums [P, T, C], which are added in order, in float32, and rounded to ``dtype``."""
        exchange = self._exchange
        if exchange is not None and x.shape[-2] <= exchange.most_rows:
            self._count((self.size - 1) * x.shape[-2] * x.shape[-1] * dtype.itemsize)
            return exchange(x)
        x = add_up(x, dtype) if x.ndim == 3 else x
        return self.gather(x) if self.always_gathers or len(x) <= _MOST_GATHERED_ROWS else self.sum(x)

    def gather(self, x: Tensor) -> Tensor:
        """All ranks' ``x``, of one shape: [N, ...] in their order."""
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
            self._count((self.size - 1) * x.nbytes)
            # Bytes, because gloo does not know every type.
            given, taken = x.contiguous().view(torch.uint8), out.view(torch.uint8)
            options = _on_this_stream(AllgatherOptions())
            _end(self._connected._allgather_base(taken.view(-1), given.view(-1), options))
        return out

    def gather_to_first(self, x: Tensor) -> Tensor | None:
        """All ranks' ``x``, of one shape, on rank 0: [N, ...]; None on the others."""
        options = _on_this_stream(distributed.GatherOptions())
        options.rootRank = 0
        x = x.contiguous()
        if self.rank:
            self._count(x.nbytes)
            _end(self._connected.gather([], [x], options))
            return None
        out = x.new_empty(self.size, *x.shape)
        _end(self._connected.gather([list(out.unbind())], [x], options))
        return out

    def broadcast(self, x: Tensor) -> None:
        """Send rank 0's ``x`` to all, in place."""
        self._count(0 if self.rank else (self.size - 1) * x.nbytes)
        options = _on_this_stream(distributed.BroadcastOptions())
        options.rootRank = 0
        _end(self._connected.broadcast([x], options))

    @property
    def _connected(self) -> Any:
        if self._group is None:
            raise RuntimeError("the ranks are not connected")
        return self._group

    def _count(self, num_bytes: int) -> None:
        self.bytes_sent += num_bytes


def _on_this_stream(options: Any) -> Any:
    """Run an exchange on our kernels' stream; otherwise NCCL uses its own stream, and each exchange costs two waits."""
    options.asyncOp = False
    return options


def _end(work: Any) -> None:
    """Of an exchange; NCCL has nothing to wait for on the stream of its caller."""
    if work is not None:
        work.wait()


def add_up(parts: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The sum over the first dimension, in order, in float32 and rounded once to ``dtype`` (None: the input's)."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(dtype or parts.dtype)
