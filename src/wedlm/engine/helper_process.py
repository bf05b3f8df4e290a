# SPDX-License-Identifier: Apache-2.0
"""Processes that do the work which a stranger's input could make too long or too large, one question at a time.

``HelperProcess`` asks; the helper's module calls ``answer_questions`` at its end of the pipes. This module imports
nothing large, so that helpers start quickly and stay small.
"""

import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO

_LENGTH = struct.Struct("<Q")
_PIPE_BYTES = 2**16  # what a pipe holds, on most systems
_BEHIND = 5  # steps of priority: a third of the processor time that others have, where there is none to spare


class HelperProcess:
    """``python -m module arguments``, for one thread at a time; only ``kill`` may be called from any thread."""

    def __init__(self, module: str, *arguments: str) -> None:
        # One heap, so that a limit of memory is not taken for the address space of others.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        with suppress(OSError):  # on a machine of few cores this process must not wait for its helpers
            os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + _BEHIND)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        for stream in (self._questions, self._answers):
            os.set_blocking(stream.fileno(), False)
        self.late = False  # whether it was ended because it took too long

    def ask(self, question: bytes, limit_s: float) -> bytes | None:
        """The answer; None if the process ended while answering, or did not answer in time. Do not use it
        after that."""
        answer = None
        try:
            answer = self._exchange(question, time.monotonic() + limit_s)
        except TimeoutError:
            self.late = True
        except OSError:  # the question is not read
            pass
        if answer is None:
            self._process.kill()
            self._process.wait()
        return answer

    def _exchange(self, question: bytes, end: float) -> bytes | None:
        """Raises TimeoutError. A thread that watches the clock would also have to wait for a processor and
        for the GIL."""
        data = memoryview(_LENGTH.pack(len(question)) + question)
        while data:
            _wait(self._questions, select.POLLOUT, end)
            data = data[os.write(self._questions.fileno(), data[:_PIPE_BYTES]) :]
        answer, size = bytearray(), None
        while size is None or len(answer) < size:
            _wait(self._answers, select.POLLIN, end)
            piece = os.read(self._answers.fileno(), _PIPE_BYTES)
            if not piece:
                return None
            answer += piece
            if size is None and len(answer) >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(answer)
                del answer[: _LENGTH.size]
        return bytes(answer)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def killed(self) -> bool:
        """Whether something else ended the process."""
        return self._process.poll() == -signal.SIGKILL

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> int:
        """End the process and return its exit code."""
        self._process.kill()
        returncode = self._process.wait()
        for stream in (self._questions, self._answers):
            stream.close()
        return returncode


def _wait(stream: IO[bytes], event: int, end: float) -> None:
    """Wait until something can be read or written; raises TimeoutError if that does not happen before ``end``."""
    poll = select.poll()
    poll.register(stream, event)
    if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError


def answer_questions(answer: Callable[[bytes], bytes]) -> None:
    """Runs in the helper: answer questions until the other side closes."""
    while len(head := sys.stdin.buffer.read(_LENGTH.size)) == _LENGTH.size:
        (size,) = _LENGTH.unpack(head)
        question = sys.stdin.buffer.read(size)
        if len(question) < size:
            return
        written = answer(question)
        sys.stdout.buffer.write(_LENGTH.pack(len(written)))
        sys.stdout.buffer.write(written)
        sys.stdout.buffer.flush()
