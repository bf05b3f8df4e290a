# SPDX-License-Identifier: Apache-2.0
"""What the system knows of other processes."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether it has not ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """Of its main thread, the eldest first."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def peak_bytes(pid: int) -> int:
    """The most memory that it has had since its program began. What getrusage says of a process includes that of the
    one which started it."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """It does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
