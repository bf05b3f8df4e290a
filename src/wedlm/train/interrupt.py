# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C during training: the step finishes and is saved; a second Ctrl-C stops at once."""

import signal
import sys
import threading
from types import FrameType


class Interrupt:
    """Inside the block, the first Ctrl-C sets ``asked`` and the next raises KeyboardInterrupt.

    ``enabled`` False, and any thread except the main one, do not change Ctrl-C, because several processes would each
    stop after a different step.
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
