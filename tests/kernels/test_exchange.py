# SPDX-License-Identifier: Apache-2.0
"""The kernel by which ranks exchange few rows, interpreted: each rank a process, in memory that all of them have."""

import multiprocessing
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from wedlm.engine.ranks.group import add_up
from wedlm.kernels.exchange import _BLOCK, Exchange

WIDTH, MOST_ROWS = 600, 6

# On GPUs tests/engine/test_gpu_ranks.py runs it. Forked processes have the tests' memory at the same addresses.
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted alone"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def start(work: Callable, *arguments: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def exchanges(size: int, dtype: torch.dtype) -> list[Exchange]:
    """What each rank has after the ranks have met."""
    found = []
    for rank in range(size):
        one = Exchange.__new__(Exchange)
        one.most_blocks = -(-MOST_ROWS * WIDTH // _BLOCK)
        one.rank, one.size, one.dtype, one.most_rows = rank, size, dtype, MOST_ROWS
        one._half, one._turn = size * MOST_ROWS * WIDTH, 0
        one.buffer = torch.zeros(2 * one._half, dtype=dtype).share_memory_()
        one.flags = torch.zeros(2, size * one.most_blocks, dtype=torch.int32).share_memory_()
        one._counts = torch.zeros(2, one.most_blocks, dtype=torch.int32)
        one._stop = torch.zeros(1, dtype=torch.int32).share_memory_()
        found.append(one)
    for one in found:
        one._buffers = torch.tensor([other.buffer.data_ptr() for other in found])
        one._flags = torch.tensor([[other.flags[half].data_ptr() for other in found] for half in range(2)])
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bfloat16 is cut, not rounded, by the interpreter
def test_every_rank_gets_every_ranks_rows(size, dtype):
    """Several times in turn, of other sizes, whole and in parts: what gathering gets."""
    generator = torch.Generator().manual_seed(size)
    calls = [(1, None), (6, None), (3, 4), (6, 2), (1, 3)]
    given = [
        [
            torch.randn(rows, WIDTH, generator=generator).to(dtype)
            if parts is None
            else torch.randn(parts, rows, WIDTH, generator=generator)
            for rows, parts in calls
        ]
        for _ in range(size)
    ]
    shape = size, len(calls), size, MOST_ROWS, WIDTH
    got = torch.zeros(shape, dtype=dtype).share_memory_()

    def run(one: Exchange) -> None:
        for call, x in enumerate(given[one.rank]):
            got[one.rank, call, :, : x.shape[-2]] = one(x)

    processes = [start(run, one) for one in exchanges(size, dtype)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for call, (rows, parts) in enumerate(calls):
        expected = torch.stack(
            [given[r][call] if parts is None else add_up(given[r][call], dtype) for r in range(size)]
        )
        for rank in range(size):
            assert torch.equal(got[rank, call, :, :rows], expected)


def test_a_rank_that_waits_in_vain_can_be_stopped():
    one, _ = exchanges(2, torch.float32)
    process = start(one, torch.ones(1, WIDTH))
    process.join(0.5)
    assert process.exitcode is None
    one.stop()
    process.join(60)
    assert process.exitcode == 0
