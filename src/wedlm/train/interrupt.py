# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C while training: the step ends and is saved; a second one stops at once."""

import signal
import sys
import threading
from types import FrameType


class Interrupt:
    """While it is entered, the first Ctrl-C sets ``asked`` and the next raises KeyboardInterrupt.

    ``enabled`` False, and any thread but the main one, leave Ctrl-C as it is: of several processes each would stop
    after a step of its own.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.asked = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interrupt":
        if self._enabled:
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
