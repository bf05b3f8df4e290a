# SPDX-License-Identifier: Apache-2.0
"""Processes that do for this one what a stranger's input could make too long or too large, a question at a time.

``HelperProcess`` is the asking side; its module calls ``answer_questions`` at its own end of the pipes. Imports nothing
large: helpers start quickly and stay small.
"""

import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO

_LENGTH = struct.Struct("<Q")


class HelperProcess:
    """``python -m module arguments``, for one thread at a time; only ``kill`` may come from any."""

    def __init__(self, module: str, *arguments: str) -> None:
        # One heap, so that a limit of memory is not taken for the address space of others.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self.late = False  # whether it was ended because it took too long

    def ask(self, question: bytes, limit_s: float) -> bytes | None:
        """The answer; None if the process ended over it, or did not give it in time. It is of no use then."""
        timer = threading.Timer(limit_s, self._be_late)
        timer.daemon = True
        timer.start()
        try:
            _write(self._questions, question)
            answer = _read(self._answers)
        except OSError:
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            self._process.kill()
            self._process.wait()
        return answer

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def killed(self) -> bool:
        """Whether the process was ended as only others do it."""
        return self._process.poll() == -getattr(signal, "SIGKILL", 0)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> int:
        """End the process; its return code."""
        self._process.kill()
        returncode = self._process.wait()
        for stream in (self._questions, self._answers):
            with suppress(OSError):  # what was not written has no reader
                stream.close()
        return returncode

    def _be_late(self) -> None:
        self.late = True
        self._process.kill()


def answer_questions(answer: Callable[[bytes], bytes]) -> None:
    """In the helper: answer what comes until the other side closes."""
    while (question := _read(sys.stdin.buffer)) is not None:
        _write(sys.stdout.buffer, answer(question))


def _write(stream: IO[bytes], message: bytes) -> None:
    stream.write(_LENGTH.pack(len(message)))
    stream.write(message)
    stream.flush()


def _read(stream: IO[bytes]) -> bytes | None:
    """None at the end, which may come in the middle of a message."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    message = stream.read(size)
    return message if len(message) == size else None
