# SPDX-License-Identifier: Apache-2.0
"""Threads for work beside the loop: results, errors, the most that waits, and work that nobody wants any more."""

import asyncio
import threading

import pytest

from wedlm.server.workers import Busy, Workers


class Panic(BaseException):
    """As a library written in Rust raises it."""


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


def test_results_and_errors():
    async def main() -> None:
        workers = Workers("test", 2, 10)
        assert await asyncio.gather(*(workers.run(lambda i=i: i) for i in range(8))) == list(range(8))
        with pytest.raises(ValueError, match="wrong"):
            await workers.run(raising(ValueError("wrong")))
        with pytest.raises(RuntimeError, match="Panic: lost"):
            await workers.run(raising(Panic("lost")))
        assert await workers.run(lambda: 1) == 1
        assert (workers.num_open, workers.num_working) == (0, 0)
        workers.close()
        for thread in workers._threads:
            thread.join(5)
            assert not thread.is_alive()

    asyncio.run(main())


def test_the_most_that_waits_and_what_nobody_wants():
    done: list[str] = []
    gate = threading.Event()

    async def main() -> None:
        workers = Workers("test", 1, 2)
        first = asyncio.ensure_future(workers.run(gate.wait))
        left = asyncio.ensure_future(workers.run(lambda: done.append("left")))
        stays = asyncio.ensure_future(workers.run(lambda: done.append("stays")))
        await asyncio.sleep(0.05)
        assert (workers.num_open, workers.num_working) == (3, 1)
        with pytest.raises(Busy):
            await workers.run(lambda: done.append("too many"))
        left.cancel()
        first.cancel()
        await asyncio.sleep(0)
        assert (workers.num_open, workers.num_working) == (1, 1)  # one that has begun ends by itself
        gate.set()
        await stays
        workers.close()

    asyncio.run(main())
    assert done == ["stays"]


def test_work_that_outlives_the_loop():
    gate = threading.Event()
    workers = Workers("test", 1, 2)

    async def main() -> None:
        asyncio.ensure_future(workers.run(gate.wait))  # noqa: RUF006
        await asyncio.sleep(0.05)

    asyncio.run(main())
    gate.set()
    workers._threads[0].join(5)
    assert not workers._threads[0].is_alive()
