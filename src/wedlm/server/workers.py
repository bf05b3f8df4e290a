# SPDX-License-Identifier: Apache-2.0
"""Threads for work that would hold up the event loop. They are daemons, so that work that does not end cannot keep the
process alive."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Busy(Exception):
    """Too much work is waiting already."""


class Workers:
    """``num_threads`` threads, started when first needed; at most ``max_waiting`` calls wait for one of them."""

    def __init__(self, name: str, num_threads: int, max_waiting: int) -> None:
        self._name, self._num_threads, self._max_waiting = name, num_threads, max_waiting
        self._calls: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.num_open = 0  # calls that somebody waits for
        self._working: set[int] = set()  # threads that are at work, wanted or not

    async def run(self, work: Callable[[], T]) -> T:
        """The result of ``work()``, or its error; raises Busy if there are too many calls. Work whose caller is
        cancelled before it begins is never done; work that has begun ends normally, and its result is thrown away."""
        if self.num_open >= self._num_threads + self._max_waiting:
            raise Busy(f"{self.num_open} pieces of work wait; expected fewer")
        if len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._serve, name=f"wedlm-{self._name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.num_open += 1
        self._calls.put((future, work))
        try:
            return await future
        finally:
            self.num_open -= 1

    @property
    def num_working(self) -> int:
        """Threads that are at work, including those whose client has left."""
        return len(self._working)

    def close(self) -> None:
        """Let the threads end after what they are doing."""
        for _ in self._threads:
            self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, work = call
            if not future.cancelled():
                self._working.add(threading.get_ident())
                result, error = None, None
                try:
                    result = work()
                except Exception as raised:
                    error = raised
                except BaseException as raised:  # a panic of a library's, say: it must not end the loop
                    error = RuntimeError(f"{type(raised).__name__}: {raised}")
                self._working.discard(threading.get_ident())
                try:
                    future.get_loop().call_soon_threadsafe(_settle, future, result, error)
                except RuntimeError:  # the loop has ended meanwhile
                    return
                result = error = None
            del call, future, work  # or the last one's memory stays until the next one comes


def _settle(future: "asyncio.Future[Any]", result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
