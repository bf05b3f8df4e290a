# SPDX-License-Identifier: Apache-2.0
"""``wedlm`` with faults: after SIGUSR1 the next forward raises, after SIGUSR2 the next tokenisation, and for three
seconds after SIGRTMIN the disk is full that the log is written to. After SIGRTMAX the event loop hangs.

python -m tests.attack.faulty serve ...
"""

import errno
import os
import signal
import sys
import time
from typing import Any

from wedlm.cli import main
from wedlm.engine.engine import Engine
from wedlm.model import Tokenizer


def arm(cls: type, name: str, number: signal.Signals) -> None:
    """Let the method raise once after each signal."""
    method, armed = getattr(cls, name), []
    signal.signal(number, lambda *_: armed.append(True))

    def faulty(*args: Any, **options: Any) -> Any:
        if armed:
            armed.clear()
            raise RuntimeError("a fault that a test has injected")
        return method(*args, **options)

    setattr(cls, name, faulty)


def arm_disk() -> None:
    write, full_until = os.write, [0.0]

    def faulty(descriptor: int, data: bytes) -> int:
        if descriptor == sys.stderr.fileno() and time.monotonic() < full_until[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    os.write = faulty  # type: ignore[assignment]
    signal.signal(signal.SIGRTMIN, lambda *_: full_until.__setitem__(0, time.monotonic() + 3))


def hang(*_: Any) -> None:
    """Never return. In naps, because Python's handlers of further signals run only between them, if the system gives
    a signal to another thread."""
    while True:
        time.sleep(0.1)


if __name__ == "__main__":
    arm(Engine, "step", signal.SIGUSR1)
    arm(Tokenizer, "encode", signal.SIGUSR2)
    arm_disk()
    signal.signal(signal.SIGRTMAX, hang)
    main()
