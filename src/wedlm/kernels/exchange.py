# SPDX-License-Identifier: Apache-2.0
"""Few rows from each rank to every rank, by one kernel that writes into the other GPUs' memory and waits for theirs.

NCCL's gathering of so little takes two to three times as long as the bytes do, and partial sums would have to be added
up by a kernel before it. Needs GPUs that reach each other's memory; nothing here uses NVLink's multicast.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import Store

from wedlm.kernels.fp8 import triton_type
from wedlm.kernels.launch import launch_options, pdl_wait, supports_pdl

_BLOCK = 1024  # numbers of a program, which has a flag of its own


@triton.jit
def _exchange(
    x_ptr, buffers_ptr, flags_ptr, counts_ptr, stop_ptr, size, first, rank, MOST_BLOCKS: tl.constexpr,
    PARTS: tl.constexpr, RANKS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The sum of x's parts to [rank] of every rank's buffer, from its number ``first`` on; ends when all others' have
    come. ``buffers_ptr`` and ``flags_ptr``: addresses by rank; ``counts_ptr``: how often each program has done this."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    pdl_wait(PDL)
    value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(x_ptr + part * size + at, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(DTYPE)
    for other in tl.static_range(RANKS):
        buffer = tl.load(buffers_ptr + other).to(tl.pointer_type(DTYPE))
        tl.store(buffer + first + rank * size + at, rounded, mask=inside)
    turn = tl.load(counts_ptr + block) + 1
    tl.debug_barrier()  # all threads have written their numbers, and read the count
    tl.store(counts_ptr + block, turn)
    for other in tl.static_range(RANKS):
        flags = tl.load(flags_ptr + other).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + rank * MOST_BLOCKS + block, turn, sem="release", scope="sys")
    own = tl.load(flags_ptr + rank).to(tl.pointer_type(tl.int32)) + block
    for other in tl.static_range(RANKS):
        seen = tl.atomic_add(own + other * MOST_BLOCKS, 0, sem="acquire", scope="sys")
        looked = 0
        stopped = 0
        while (seen < turn) & (stopped == 0):
            looked += 1
            if looked % 1024 == 0:  # over the bus, which takes its time
                stopped = tl.load(stop_ptr, volatile=True)
            seen = tl.atomic_add(own + other * MOST_BLOCKS, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


class Exchange:
    """``x`` of every rank to all, for rows of ``width`` numbers of ``dtype``, at most ``most_rows``. Calls come in one
    order on all ranks, an even number of them in each forward: two buffers take turns, so that a rank that is ahead
    never writes what another still reads. Made by all ranks together under a ``name`` that no others of this process
    have; raises RuntimeError if they cannot."""

    def __init__(
        self, store: Store, name: str, rank: int, size: int, device: torch.device, width: int, dtype: torch.dtype,
        most_rows: int,
    ) -> None:  # fmt: skip
        self.rank, self.size, self.dtype, self.most_rows = rank, size, dtype, most_rows
        self.most_blocks = triton.cdiv(most_rows * width, _BLOCK)
        self._half = size * most_rows * width  # numbers of a buffer
        self.buffer, self._buffers, rows = _shared(store, f"{name}-rows", rank, size, device, (2 * self._half,), dtype)
        shape = 2, size * self.most_blocks
        self.flags, self._flags, flags = _shared(store, f"{name}-flags", rank, size, device, shape, torch.int32)
        self._mapped = rows, flags  # without these the others' memory is no longer there
        self._counts = torch.zeros(2, self.most_blocks, dtype=torch.int32, device=device)
        self._stop = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._turn = 0

    def stop(self) -> None:
        """End whatever waits for another rank, from any thread; nothing that is exchanged afterwards means anything."""
        self._stop.fill_(1)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, T, C] in the order of the ranks, until the call after next; x [T, C], or partial sums [P, T, C], which
        are added up in order, in float32, and rounded once."""
        rows, width = x.shape[-2:]
        assert rows <= self.most_rows
        half, self._turn = self._turn, 1 - self._turn
        count = rows * width
        pdl = supports_pdl(x.device)
        _exchange[(triton.cdiv(count, _BLOCK),)](
            x.contiguous(), self._buffers, self._flags[half], self._counts[half], self._stop,
            count, half * self._half, self.rank, self.most_blocks,
            PARTS=len(x) if x.ndim == 3 else 1, RANKS=self.size, DTYPE=triton_type(self.dtype),
            BLOCK=_BLOCK, PDL=pdl, num_warps=4, **launch_options(pdl),
        )  # fmt: skip
        start = half * self._half
        return self.buffer[start : start + self.size * count].view(self.size, rows, width)


class _FromFirst(Store):
    """A store whose keys PREFIX/NUMBER/RANK are counted from the first number that was used here: torch counts all that
    a process has ever shared, and the processes of the other ranks are new."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._first: int | None = None

    def _key(self, key: str) -> str:
        prefix, number, rank = key.rsplit("/", 2)
        if self._first is None:
            self._first = int(number)
        return f"{prefix}/{int(number) - self._first}/{rank}"

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._key(key))

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._store.wait([self._key(key) for key in keys], *timeout)


def _shared(
    store: Store, name: str, rank: int, size: int, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Any]:
    """(zeros in memory that the other ranks reach; by rank, where it is: addresses, for [2, ...] of each half; what
    keeps it mapped)."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    from torch._C import _distributed_c10d as c10d
    from torch.distributed import PrefixStore, ProcessGroup, _symmetric_memory

    meeting = _FromFirst(PrefixStore(name, store))
    group = ProcessGroup(meeting, rank, size)
    register: Any = c10d._register_process_group  # by this name torch finds the store, to share memory over
    register(name, group)
    own = _symmetric_memory.empty(shape, dtype=dtype, device=device)
    own.zero_()
    torch.cuda.synchronize(device)
    handle: Any = c10d._SymmetricMemory.rendezvous(own, name)
    parts = [handle.get_buffer(other, shape, dtype) for other in range(size)]
    if len(shape) == 1:
        addresses: list[Any] = [part.data_ptr() for part in parts]
    else:
        addresses = [[part[half].data_ptr() for part in parts] for half in range(2)]
    return own, torch.tensor(addresses, dtype=torch.long, device=device), (handle, parts, group, meeting)
