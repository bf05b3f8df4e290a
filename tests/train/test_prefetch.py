# SPDX-License-Identifier: Apache-2.0
"""Prefetching: all items in order, errors where they belong, and no thread left behind."""

import threading
import time
from contextlib import closing

import pytest

from wedlm.train.prefetch import prefetch


@pytest.fixture(autouse=True)
def _no_thread_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "wedlm-prefetch"]


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_all_items_in_order(depth):
    assert list(prefetch(range(50), depth)) == list(range(50))
    assert list(prefetch([], depth)) == []
    assert list(prefetch(["item", "end", "error", None], depth)) == ["item", "end", "error", None]


def test_items_are_made_ahead_but_not_further():
    made = []
    asked = threading.Event()

    def items():
        for number in range(100):
            made.append(number)
            if number == 3:
                asked.set()
            yield number

    with closing(prefetch(items(), 3)) as reader:
        assert next(reader) == 0
        assert asked.wait(10)  # without another item being asked for
        time.sleep(0.05)
        assert len(made) <= 1 + 3 + 1  # given out, ready, and one that waits for room


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise RuntimeError("boom")

    reader = prefetch(items(), 5)
    assert [next(reader), next(reader)] == [1, 2]
    with pytest.raises(RuntimeError, match="boom"):
        next(reader)
    with pytest.raises(StopIteration):
        next(reader)


def test_closing_early_ends_the_thread_and_the_source():
    ended = []

    def items():
        try:
            while True:
                yield 0
        finally:
            ended.append(threading.current_thread().name)

    reader = prefetch(items(), 2)
    next(reader)
    reader.close()
    assert ended == ["wedlm-prefetch"]


def test_a_reader_that_fails_ends_the_thread():
    def read():
        with closing(prefetch(iter(int, 1), 2)) as reader:
            for _ in reader:
                raise KeyError("the reader's")

    with pytest.raises(KeyError, match="the reader's"):
        read()


def test_depth_is_checked_at_once():
    with pytest.raises(ValueError, match="depth is 0; expected at least 1"):
        prefetch([], 0)
