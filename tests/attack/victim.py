# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve`` as a process that may be attacked, with a probe beside it and limits around it."""

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.attack.probe import resident, tree
from tests.server.running import wait_until

_AHEAD = 10  # steps of priority: on one machine attackers would otherwise take the processors, too
GRACE_S = 2.0
END_S = 8.0  # the grace, five seconds of the server's own, and one for a busy machine
_METRIC = re.compile(r"^wedlm_(\w+)(?:\{.*\})? (\S+)$", re.MULTILINE)


@dataclass
class Seen:
    """What the probe saw in a span of time."""

    health: list[float] = field(default_factory=list)  # seconds
    texts: list[tuple[float, str]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Of the times of /health, in seconds."""
        ordered = sorted(self.health)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")

    @property
    def slowest_text(self) -> float:
        return max((seconds for seconds, _ in self.texts), default=0.0)


class Victim:
    """A running server. ``lines`` is its log; what the probe says is read as it comes."""

    def __init__(self, process: subprocess.Popen, model: str, lines: list[str], probed: bool) -> None:
        self.process, self.model, self.lines = process, model, lines
        wait_until(lambda: process.poll() is not None or self._address() is not None, seconds=120)
        address = self._address()
        assert address is not None, "".join(lines)
        self.port = int(address)
        self._pause_s = 0.0
        self._records: list[tuple[str, float, Any]] = []
        self._probe = self._start_probe() if probed else None

    def _address(self) -> str | None:
        match = re.search(r"running on http://127\.0\.0\.1:(\d+)", "".join(self.lines))
        return None if match is None else match[1]

    def _start_probe(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.attack.probe", str(self.port), str(self.process.pid), self.model]
        probe = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_go_ahead)
        threading.Thread(target=self._read, args=(probe.stdout,), daemon=True).start()
        return probe

    def _read(self, lines: Any) -> None:
        with lines:
            for line in lines:
                self._records.append(tuple(json.loads(line)))

    def seen(self, start: float, end: float) -> Seen:
        """What the probe saw between two times of ``time.monotonic``."""
        seen = Seen()
        for kind, at, value in list(self._records):
            if not start <= at <= end:
                continue
            if kind == "health":
                seen.health.append(value)
            elif kind == "text":
                seen.texts.append(tuple(value))
            elif kind == "memory":
                seen.memory.append(value)
            else:
                seen.troubles.append(f"{kind}: {value}")
        return seen

    @property
    def memory(self) -> int:
        """Bytes of the process and all that come from it, now."""
        return sum(map(resident, tree(self.process.pid)))

    @property
    def num_threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    @property
    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def connect(self, timeout: float = 30.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def post(self, path: str, body: bytes, timeout: float = 60.0) -> tuple[int, bytes]:
        """Status and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> int:
        """Status of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", "/metrics")
            return {name: float(value) for name, value in _METRIC.findall(connection.getresponse().read().decode())}
        finally:
            connection.close()

    def idle(self) -> bool:
        """Whether nothing runs but, perhaps, the probe's text."""
        metrics = self.metrics()
        return metrics["requests_preparing"] + metrics["sequences_open"] <= (self._probe is not None)

    def end(self) -> float:
        """Seconds that the process takes to end after SIGTERM. It must do so by itself, with JSON alone in its log."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(END_S)
        took = time.monotonic() - start
        assert self.process.returncode == 0, (self.process.returncode, self.lines[-5:])
        return took

    def check_log(self) -> None:
        """JSON, and no exception that nobody foresaw."""
        for line in self.lines[1:]:
            if line.startswith("{"):
                entry = json.loads(line)
                assert "traceback" not in entry, entry
            else:
                assert not line.strip() or "serving" in line or "Ctrl-C" in line, line

    def pause_log(self, seconds: float) -> None:
        """Leave the log unread for a while."""
        self._pause_s = seconds

    def take_pause(self) -> float:
        """Seconds for which the log is to be left unread now."""
        seconds, self._pause_s = self._pause_s, 0.0
        return seconds

    def close(self) -> None:
        if self._probe is not None:
            self._probe.kill()
            self._probe.wait()
        self.process.kill()
        self.process.wait()


def _go_ahead() -> None:
    """Run before the attackers, and whoever else is at work here, where that may be asked for. Linux gives each session
    its share of the processors first, and looks at priorities within a session only."""
    os.setsid()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(-20, os.getpriority(os.PRIO_PROCESS, 0) - _AHEAD))
        Path("/proc/self/autogroup").write_text(str(-_AHEAD))


@contextmanager
def serving_process(
    model: Path,
    *words: str,
    probed: bool = True,
    descriptors: int | None = None,
    read_log: bool = True,
    entry: str = "wedlm",
) -> Iterator[Victim]:
    """``wedlm serve`` on a free port with few seconds of grace, and ``words`` as further options."""
    command = [sys.executable, "-m", entry, "serve", "--model", str(model), "--port", "0", "--device", "cpu"]
    command += ["--threads", "1", "--shutdown-timeout", str(GRACE_S), *words]

    def limit() -> None:
        _go_ahead()
        if descriptors is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    lines: list[str] = []
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True, preexec_fn=limit)
    assert process.stderr is not None

    def read() -> None:
        for line in process.stderr:
            lines.append(line)
            if victim is not None:
                time.sleep(victim.take_pause())
            if not read_log and "running on" in line:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    victim = None
    try:
        victim = Victim(process, model.name, lines, probed)
        yield victim
    finally:
        if victim is not None:
            victim.close()
        process.kill()
        process.wait()
        reader.join(5)
        process.stderr.close()
