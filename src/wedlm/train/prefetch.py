# SPDX-License-Identifier: Apache-2.0
"""A thread that makes items before their reader needs them."""

import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_T = TypeVar("_T")


def prefetch(iterable: Iterable[_T], depth: int) -> Generator[_T]:
    """The items of ``iterable``, made by a thread that keeps up to ``depth`` of them ready.

    The thread starts with the first requested item. It ends when the items do, when one raises (the exception is raised
    here) and when this generator is closed, which waits for the item in progress.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; expected at least 1")
    return _prefetch(iterable, depth)


def _prefetch(iterable: Iterable[_T], depth: int) -> Generator[_T]:
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, value: Any = None) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            with _closed_after(iter(iterable)) as items:
                for item in items:
                    put("item", item)
                    if stopped.is_set():
                        return
        except BaseException as error:  # whatever it is, it belongs to the reader
            put("error", error)
        else:
            put("end")

    thread = threading.Thread(target=produce, name="wedlm-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()


@contextmanager
def _closed_after(items: Iterator[_T]) -> Iterator[Iterator[_T]]:
    """Close a generator in the thread that runs it."""
    try:
        yield items
    finally:
        if isinstance(items, Generator):
            items.close()
