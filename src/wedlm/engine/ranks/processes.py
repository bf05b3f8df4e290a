# SPDX-License-Identifier: Apache-2.0
"""The processes of the other ranks: rank 0 starts them, watches them, and they end with it.

Each has a connection to rank 0 and the reading end of a pipe that only rank 0's process can write to. When that process
ends, for whatever reason, the pipe closes and they end themselves. They meet in a temporary directory; no port and no
name is fixed.
"""

import json
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wedlm.engine.ranks.group import Group
from wedlm.engine.ranks.messages import Kind, encode
from wedlm.engine.ranks.reports import LOADED, receive_report
from wedlm.engine.request_stream import EngineFault
from wedlm.model.sharding import Shard

ANSWER_S = 8.0  # how long rank 0 waits for another one in one exchange
_LOADING_S = 3600.0  # reading weights from a slow disk takes long; a process that ends meanwhile is seen at once
_ENDING_S, _NOTICE_S = 2.0, 1.0
_CAUSE_S = 0.3  # how long a rank's word that it lost another one may wait for that other one's
_LOOK_MS = 500  # how often the thread that watches looks at the clock
_LATE = f"a rank did not answer within {ANSWER_S:.0f} s"


class RankFault(EngineFault):
    """A rank of tensor parallelism ended, failed or did not answer, so what the engine held is lost."""


class _Processes:
    """One generation of the other ranks' processes, and the thread that watches them."""

    def __init__(self, tasks: Sequence[Mapping[str, Any]], directory: Path) -> None:
        self.directory = directory
        self.reason: str | None = None  # why they were ended, unless they were asked to
        self.closing = False
        self.deadline = math.inf  # by time.monotonic, when someone will have waited too long
        self.on_fault = lambda: None
        self._lock = threading.RLock()  # the garbage collector may close while this thread fails
        self.connections: list[socket.socket] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._thread: threading.Thread | None = None
        life, self._life = os.pipe()
        try:
            for task in tasks:
                self._start(task, life)
        finally:
            os.close(life)

    def _start(self, task: Mapping[str, Any], life: int) -> None:
        ours, theirs = socket.socketpair()
        self.connections.append(ours)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(task["threads"])}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "wedlm.engine.ranks.worker", str(theirs.fileno()), str(life)],
                pass_fds=(theirs.fileno(), life),
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self.processes.append(process)
        data = json.dumps(task).encode()
        ours.sendall(len(data).to_bytes(8, "little") + data)

    def wait_until_loaded(self) -> list[dict[str, Any]]:
        """What each rank reports about its weights. Raises RankFault if one ends or fails first."""
        end = time.monotonic() + _LOADING_S
        reports: dict[int, dict[str, Any]] = {}
        while len(reports) < len(self.connections):
            missing = [one for i, one in enumerate(self.connections) if i not in reports]
            readable, _, _ = select.select(missing, [], [], max(0.0, end - time.monotonic()))
            if not readable:
                raise self._failed(f"the ranks did not load their weights within {_LOADING_S:.0f} s")
            for connection in readable:
                index = self.connections.index(connection)
                report = receive_report(connection)
                if report is None or report["kind"] != LOADED:
                    raise self._failed(self._explain(index, report))
                reports[index] = report
        return [reports[index] for index in range(len(self.connections))]

    def _failed(self, reason: str) -> RankFault:
        self.fail(reason)
        return RankFault(reason)

    def _explain(self, index: int, report: Mapping[str, Any] | None) -> str:
        name = f"rank {index + 1} of {len(self.processes) + 1}"
        if report is not None:
            return f"{name} failed: {report.get('message', '')}"
        try:
            code = self.processes[index].wait(_NOTICE_S)
        except subprocess.TimeoutExpired:
            return f"{name} closed its connection"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{name} {how}"

    def watch(self) -> None:
        """From now on, notice at once when a rank ends or fails, and end all others."""
        self._thread = threading.Thread(target=self._watch, name="wedlm-ranks", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        poll = select.poll()
        for connection in self.connections:
            poll.register(connection, select.POLLIN)
        places = {connection.fileno(): index for index, connection in enumerate(self.connections)}
        while not poll.poll(_LOOK_MS):
            if time.monotonic() > self.deadline:
                self.fail(_LATE)
                return
        if not self.closing:
            self.fail(self._cause(poll, places))

    def _cause(self, poll: select.poll, places: Mapping[int, int]) -> str:
        """Why the ranks are lost. Those that lost another one say so, too, and may come first."""
        end = time.monotonic() + _CAUSE_S
        reason = ""
        while self.reason is None and (left := end - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(1e3 * left):
                poll.unregister(descriptor)
                index, report = places[descriptor], None
                with suppress(OSError, ValueError):
                    report = receive_report(self.connections[index])
                if report is None or not _lost_another(report):
                    return self._explain(index, report)
                reason = reason or self._explain(index, report)
        return reason

    def fail(self, reason: str) -> None:
        """End all of them, for this reason unless there was an earlier one. Whoever sees a ``reason`` finds them ended,
        unless a device takes longer than ``_NOTICE_S`` to let one go."""
        with self._lock:
            if self.closing or self.reason is not None:
                return
            for process in self.processes:
                process.kill()
            self._wait(_NOTICE_S)
            self.reason = reason
        self.on_fault()

    def _wait(self, seconds: float) -> list[subprocess.Popen[bytes]]:
        """Wait for all of them to end, at most this long, and return those that have not."""
        end = time.monotonic() + seconds
        late = []
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(process)
        return late

    def close(self) -> None:
        """End all of them; they first get the chance to end themselves when the connection closes."""
        with self._lock:
            if self.closing:
                return
            self.closing = True
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._life >= 0:
            os.close(self._life)
        for process in self._wait(_ENDING_S):
            process.kill()
            process.wait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for connection in self.connections:
            connection.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class Ranks:
    """All ranks of one model; this process is the first and has ``shard``.

    ``tasks``: what each of the others is told at its start, in the form that ``worker.py`` reads, without the directory
    where they meet.
    """

    def __init__(self, group: Group, shard: Shard, tasks: Sequence[Mapping[str, Any]]) -> None:
        self.group, self.shard, self.size = group, shard, shard.size
        self._tasks = tasks
        self.reports: list[dict[str, Any]] = []
        self.bytes_told = 0  # to all others together
        self._processes: _Processes | None = None
        self._finalizer: weakref.finalize | None = None

    @property
    def broken(self) -> bool:
        """Whether the ranks have to be started before anything can run."""
        return self._processes is None or self._processes.reason is not None

    @property
    def pids(self) -> list[int]:
        """The process ids of the other ranks."""
        return [] if self._processes is None else [process.pid for process in self._processes.processes]

    def start(self) -> None:
        """Start the others, which begin to load their weights."""
        self.close()
        directory = Path(tempfile.mkdtemp(prefix="wedlm-ranks-"))
        self._processes = _Processes([{**task, "directory": str(directory)} for task in self._tasks], directory)
        self._finalizer = weakref.finalize(self, _close, self.group, self._processes)

    def connect(self) -> None:
        """Wait until the others have their weights, and connect to them. Raises RankFault."""
        processes = self._running
        self.reports = processes.wait_until_loaded()
        processes.watch()
        group = self.group
        processes.on_fault = group.abort
        try:
            group.connect(processes.directory, ANSWER_S)
        except BaseException as error:
            raise self._fault(error) from error

    def tell(self, kind: Kind, arrays: Sequence[np.ndarray]) -> None:
        """Send all others a message. Raises OSError if one has gone."""
        data = encode(kind, arrays)
        for connection in self._running.connections:
            connection.sendall(data)
        self.bytes_told += len(data) * (self.size - 1)

    @contextmanager
    def together(self, kind: Kind, arrays: Sequence[np.ndarray]) -> Iterator[None]:
        """Run what all ranks do: the others because they are told, this one within the block. An error in it ends all
        ranks, which would otherwise wait for each other forever; it becomes a RankFault if a rank caused it."""
        with self.guarded():
            self.tell(kind, arrays)
            yield

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """``together`` for code that tells the others itself. Also raises RankFault if one of them has failed in the
        meantime."""
        try:
            yield
        except BaseException as error:
            fault = self._fault(error)
            if isinstance(error, RuntimeError | OSError) and not isinstance(error, torch.OutOfMemoryError):
                raise fault from error
            raise
        reason = self._running.reason
        if reason is not None:
            raise RankFault(_lost(reason))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for this process's GPU, which may wait for the others': at most ``ANSWER_S``."""
        processes = self._running
        processes.deadline = time.monotonic() + ANSWER_S
        try:
            yield
        finally:
            processes.deadline = math.inf

    def _fault(self, error: BaseException) -> RankFault:
        """End all ranks after an exchange that failed, and say why, as far as that is known."""
        processes = self._running
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        late = "imed out" in first
        end = time.monotonic() + (0.0 if late else _NOTICE_S)
        while processes.reason is None and time.monotonic() < end:  # the thread may be about to see it
            time.sleep(0.01)
        processes.fail(_LATE if late else f"rank 0 failed: {first}")
        return RankFault(_lost(processes.reason or first))

    @property
    def _running(self) -> _Processes:
        if self._processes is None:
            raise RankFault("the ranks are not running")
        return self._processes

    def close(self) -> None:
        """End the others. None of them is left when this returns."""
        if self._finalizer is not None:
            self._finalizer()
        self._processes = None


def _close(group: Group, processes: _Processes) -> None:
    group.close()
    processes.close()


def _lost_another(report: Mapping[str, Any]) -> bool:
    """Whether a rank failed because another one had gone, by what gloo and NCCL say then."""
    message = str(report.get("message"))
    return "/gloo/" in message or message.startswith("DistBackendError")


def _lost(reason: str) -> str:
    return f"the engine's ranks were ended, and what they were generating is lost: {reason}"
