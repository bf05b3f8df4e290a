# SPDX-License-Identifier: Apache-2.0
"""Run Python code that a model wrote, without trusting it.

There is one level of protection, and no fallback: where the kernel does not give all of it, nothing runs and
``SandboxUnavailable`` says why. Needed is Linux 5.14 or newer (x86-64 or ARM), and root or the right to make user
namespaces (many containers take both away). In force while a program runs:

* its own process, mount, network, IPC and host-name namespaces: it sees no process but its own, no file but the
  system's libraries and Python (read-only) and an empty /tmp in memory, no /proc, no network interface;
* a user id without rights, no capabilities, no way to new ones; an empty environment; /dev/null as standard input;
* a seccomp filter: no sockets, no tracing, no mounts, no namespaces, no shared memory that outlives its process;
* limits on wall and CPU time, memory per process, files, processes and output;
* when it ends, or is ended, every process it left behind is killed by the kernel.

Not protected: the kernel itself (a program that exploits it gets out), the secrecy of what lies readable in /usr, and
the CPU's side channels. The limits add up: ``max_processes`` times ``memory_bytes`` at worst, times the workers. And a
program that looks for it finds the token that marks its end in the interpreter that runs it: "passed" is proof against
programs that end early or print what they like, not against one written to cheat this very file.
"""

import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "timed_out", "killed"]

_JAIL = Path(__file__).with_name("jail.py")
_DETAIL_CHARACTERS = 300
# Building the jail takes about 0.1 s; a crowded machine may need much longer, which is not the program's fault.
_START_SECONDS = 60.0
_CHUNK_BYTES = 2**16


class SandboxUnavailable(RuntimeError):
    """This machine does not offer the protection that running unknown code needs, so nothing was run."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. Memory is each process's address space; files are all of /tmp together."""

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    max_file_bytes: int = 16 * 2**20
    max_processes: int = 8
    max_output_bytes: int = 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.type is int
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else int | float)
                or not 0 < value < math.inf
            ):
                raise ValueError(f"{field.name} is {value!r}; expected {'an integer' if whole else 'a number'} above 0")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    ``passed``: it ran to the end of its source. ``failed``: it raised an exception, including SystemExit, or ended
    before that. ``timed_out``: it ran out of wall or CPU time. ``killed``: by a signal, or for its output. ``detail``
    is the last line of the error, at most 300 characters, and "" if passed. ``seconds`` is wall time, without building
    the jail.
    """

    status: Status
    detail: str
    seconds: float


@dataclass
class _Watch:
    """What the parent observed about a program."""

    report: bytes = b""
    started: float | None = None
    ended: float = 0.0
    output_bytes: int = 0
    stopped: Outcome | None = None

    def seconds(self) -> float:
        return self.ended - self.started if self.started is not None else 0.0


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run ``source`` as a separate program, under ``limits`` (default: ``Limits()``).

    Raises SandboxUnavailable if it cannot be confined; whatever the program does is an Outcome.
    """
    limits = limits or Limits()
    if sys.platform != "linux":
        raise SandboxUnavailable(f"the sandbox does not support {sys.platform}; running generated code needs Linux")
    token = secrets.token_hex(16)
    reader, writer = os.pipe()
    try:
        with tempfile.TemporaryFile() as order:
            request = {"source": source, "token": token, "report_fd": writer, "limits": asdict(limits)}
            order.write(json.dumps(request).encode())
            order.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_JAIL)],
                stdin=order,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(writer,),
                env={},
                cwd="/",
                start_new_session=True,
            )
        os.close(writer)
        writer = -1
        with process:
            try:
                watch = _watch(process, reader, limits)
            finally:
                # The session's first two processes; the second one's end is that of all inside.
                os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    return watch.stopped or _outcome(watch, token, limits)


def run_programs(sources: Sequence[str], limits: Limits | None = None, workers: int = 1) -> list[Outcome]:
    """Run programs, ``workers`` at a time; the outcomes are in the order of ``sources``. Raises like
    ``run_program``."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers is {workers!r}; expected an integer of at least 1")
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_program, source, limits) for source in sources]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _watch(process: "subprocess.Popen[bytes]", reader: int, limits: Limits) -> _Watch:
    """Read until the jail has reported or a limit is passed. Output is counted and dropped."""
    assert process.stdout is not None
    watch = _Watch()
    deadline = time.monotonic() + _START_SECONDS
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            watch.ended = time.monotonic()
            for key, _ in ready:
                data = os.read(key.fd, _CHUNK_BYTES)
                if key.fd != reader:
                    watch.output_bytes += len(data)
                    if not data:
                        selector.unregister(key.fileobj)
                    continue
                watch.report += data
                if watch.started is None and watch.report.startswith(b"ready\n"):
                    watch.started = watch.ended
                    deadline = watch.ended + limits.seconds
                if not data:  # the jail is gone, and has said what it had to
                    return watch
            if watch.output_bytes > limits.max_output_bytes:
                detail = f"wrote more than {limits.max_output_bytes} bytes"
                watch.stopped = Outcome("killed", detail, watch.seconds())
                return watch
            if watch.ended >= deadline:
                if watch.started is None:
                    raise SandboxUnavailable(f"the sandbox was not ready after {_START_SECONDS:g} seconds")
                watch.stopped = Outcome("timed_out", f"ran longer than {limits.seconds:g} seconds", watch.seconds())
                return watch


def _outcome(watch: _Watch, token: str, limits: Limits) -> Outcome:
    lines = watch.report.decode().splitlines()
    report: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if "refused" in report or watch.started is None:
        reason = report.get("refused", "its process ended without a word")
        raise SandboxUnavailable(
            f"the sandbox cannot be built here: {reason}; expected Linux 5.14 or newer, and root or the right to make "
            "user namespaces (see docs/sandbox.md)"
        )
    seconds = watch.seconds()
    if not report:
        return Outcome("killed", "its jail ended before it", seconds)
    code, note = report["exit"], report["note"]
    if code == 0 and note == token:
        return Outcome("passed", "", seconds)
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and report["cpu_seconds"] >= limits.cpu_seconds):
        return Outcome("timed_out", f"used more than {limits.cpu_seconds:g} seconds of CPU time", seconds)
    if code < 0:
        return Outcome("killed", f"ended by {_signal_name(-code)}", seconds)
    if code == 1 and note and note != token:
        return Outcome("failed", note.strip()[:_DETAIL_CHARACTERS], seconds)
    return Outcome("failed", f"ended with exit code {code} before its last line", seconds)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
