# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve --data-parallel-size``: several servers on one address, each with the model on its own devices.

The first process binds the sockets and starts the replicas, which all accept connections from them; a busy one accepts
fewer. It computes nothing itself. It restarts a replica that ends, and all replicas end with it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from wedlm.cli.options import EngineOptions
from wedlm.cli.terminal import note

_USAGE = 2  # exit code of what a user has to mend
_MAX_RESTARTS, _SETTLED_S = 5, 60.0  # of one replica, one after the other, each of which ran for less than that
_PAUSE_S = 1.0


@dataclass(frozen=True)
class Replica:
    """Which of ``count`` replicas this process is, and the sockets that it accepts from."""

    index: int
    count: int
    sockets: list[socket.socket]

    def engine(self, options: EngineOptions) -> EngineOptions:
        """The options with the devices of this replica. Raises ValueError if there are too few."""
        import dataclasses

        from wedlm.engine.resolve_options import read_device

        device = read_device(options.device)
        if device.type != "cuda":
            return options
        import torch

        size, there = options.tensor_parallel_size, torch.cuda.device_count()
        if self.count * size > there:
            raise ValueError(
                f"data_parallel_size is {self.count} with {size} GPUs each; expected at most {there} GPUs in all"
            )
        return dataclasses.replace(options, device=f"cuda:{self.index * size}")

    def threads(self, asked: int | None) -> int:
        """An equal part of a CPU's threads."""
        return asked or max(1, (os.cpu_count() or 1) // self.count)


class _Running:
    """One replica's process, and how often in a row it has ended early."""

    def __init__(self, index: int, command: list[str], fds: Sequence[int]) -> None:
        self.index, self._command, self._fds = index, command, fds
        self.failures = 0
        self.start()

    def start(self) -> None:
        self.since = time.monotonic()
        self.process = subprocess.Popen(self._command, pass_fds=self._fds)


def supervise(sockets: list[socket.socket], count: int, arguments: list[str]) -> int:
    """Run the replicas of ``wedlm ARGUMENTS`` until they have ended, and return the exit code."""
    life, ours = os.pipe()
    numbers = ",".join(str(one.fileno()) for one in sockets)
    fds = (life, *(one.fileno() for one in sockets))
    stopping: list[int] = []
    replicas: list[_Running] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopping.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches them by itself
            for one in replicas:
                one.process.terminate()

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for index in range(count):
            own = [sys.executable, "-m", "wedlm.cli.replica", f"{index}/{count}", numbers, str(life), *arguments]
            replicas.append(_Running(index, own, fds))
        return _watch(replicas, stopping)
    finally:
        os.close(ours)
        for one in replicas:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(2.0)
            one.process.kill()
            one.process.wait()
        os.close(life)
        for number, handler in former.items():
            signal.signal(number, handler)


def _watch(replicas: list[_Running], stopping: list[int]) -> int:
    while True:
        codes = [one.process.poll() for one in replicas]
        if stopping and None not in codes:
            return max((code for code in codes if code is not None and code > 0), default=0)
        for one, code in zip(replicas, codes, strict=True):
            if code is None or stopping:
                continue
            if code == _USAGE:
                return _USAGE
            one.failures = one.failures + 1 if time.monotonic() - one.since < _SETTLED_S else 1
            if one.failures > _MAX_RESTARTS:
                note(f"replica {one.index} ended {one.failures} times in a row", "red")
                return 1
            note(f"replica {one.index} ended with code {code} and is started again", "yellow")
            time.sleep(_PAUSE_S)
            if not stopping:
                one.start()
                if stopping:  # while it started, and the signal has not reached it
                    one.process.terminate()
        time.sleep(0.05)
