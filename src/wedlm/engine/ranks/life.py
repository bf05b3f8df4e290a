# SPDX-License-Identifier: Apache-2.0
"""Processes that end when the process that started them does, for whatever reason: they hold the reading end of a pipe
whose writing end only that process has. Imports nothing large."""

import os
import threading
from collections.abc import Callable


def end_with(life_fd: int, before: Callable[[], None] = lambda: None) -> None:
    """From now on, end this process, after calling ``before``, as soon as the pipe closes, whatever its threads wait
    for."""

    def watch() -> None:
        while os.read(life_fd, 1):
            pass
        before()
        os._exit(1)

    threading.Thread(target=watch, name="wedlm-life", daemon=True).start()
