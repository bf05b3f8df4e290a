# SPDX-License-Identifier: Apache-2.0
"""A command in a terminal of its own, typed at and read."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-_])")
# The command's standard input becomes the terminal that its Ctrl-C comes from.
_LAUNCH = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """``shown``: all that was written to it so far, without escape sequences."""

    def __init__(self, process: subprocess.Popen, descriptor: int) -> None:
        self.process, self._descriptor, self._raw = process, descriptor, b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the last writer has left
            while data := os.read(self._descriptor, 65536):
                self._raw += data

    @property
    def shown(self) -> str:
        return _ESCAPES.sub("", self._raw.decode(errors="replace")).replace("\r", "")

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    def wait_for(self, pattern: str, start: int = 0, seconds: float = 60) -> int:
        """Until the pattern is there, from that place of ``shown`` on; where it ends."""
        end = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.shown, start)) is None:
            assert time.monotonic() < end, f"{pattern!r} did not come:\n{self.shown}"
            time.sleep(0.02)
        return found.end()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._descriptor)


@contextmanager
def terminal(command: list[str], columns: int = 80, **environment: str) -> Iterator[Terminal]:
    """Runs a command there until the end of the block."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    # No terminal answers what a program asks about it.
    changed = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
    changed.pop("COLUMNS", None)
    launch = [sys.executable, "-c", _LAUNCH, *command]
    process = subprocess.Popen(launch, stdin=theirs, stdout=theirs, stderr=theirs, env=changed)
    os.close(theirs)
    one = Terminal(process, ours)
    try:
        yield one
    finally:
        one.close()
