# SPDX-License-Identifier: Apache-2.0
"""Turns of several engines that share a machine."""

import threading
from collections import deque


class Turns:
    """A lock that goes to threads in the order in which they asked. ``threading.Lock`` could return to the thread that
    has just released it, again and again."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._held:
                self._held = True
                return
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until the turn is handed over

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
