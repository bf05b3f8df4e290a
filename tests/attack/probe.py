# SPDX-License-Identifier: Apache-2.0
"""A process beside an attacked server: asks for /health every 20 ms and for a text every second, and reads how much
memory the server has. Writes a JSON object a line: kind, time on the machine's monotonic clock, value.

    python -m tests.attack.probe PORT PID MODEL
"""

import http.client
import json
import sys
import threading
import time
from pathlib import Path

EVERY_S, TEXT_EVERY_S, MEMORY_EVERY_S = 0.02, 1.0, 0.1
PATIENCE_S = 30.0
_lock = threading.Lock()


def say(kind: str, at: float, value: object) -> None:
    with _lock:
        print(json.dumps([kind, at, value]), flush=True)


def ask(port: int, connection: http.client.HTTPConnection | None, *request: object) -> tuple[object, int, bytes]:
    """Over the connection that is there, or a new one."""
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request(*request)  # type: ignore[arg-type]
    answer = connection.getresponse()
    return connection, answer.status, answer.read()


def health(port: int) -> None:
    """The time of each answer, from when it was due: a server that stops for a second delays 50 of them."""
    connection, due = None, time.monotonic()
    while True:
        try:
            connection, status, _ = ask(port, connection, "GET", "/health")
            say("health" if status == 200 else "refused", due, time.monotonic() - due)
        except (OSError, http.client.HTTPException) as error:
            connection = None
            say("broken", due, repr(error))
        due += EVERY_S
        time.sleep(max(0.0, due - time.monotonic()))


def text(port: int, model: str) -> None:
    """The time of each answer, and what it says."""
    body = json.dumps({"model": model, "prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True})
    while True:
        start = time.monotonic()
        try:
            request = ("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            _, status, answer = ask(port, None, *request)
            said = json.loads(answer)["choices"][0]["text"] if status == 200 else status
            say("text", start, [time.monotonic() - start, said])
        except (OSError, http.client.HTTPException, ValueError) as error:
            say("text", start, [time.monotonic() - start, repr(error)])
        time.sleep(max(0.0, start + TEXT_EVERY_S - time.monotonic()))


def tree(pid: int) -> list[int]:
    """The process and all that come from it."""
    found = [pid]
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            found += tree(int(child))
    return found


def resident(pid: int) -> int:
    """Bytes in memory; 0 of a process that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def main() -> None:
    port, pid, model = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for work in (lambda: health(port), lambda: text(port, model)):
        threading.Thread(target=work, daemon=True).start()
    while resident(pid):
        say("memory", time.monotonic(), sum(map(resident, tree(pid))))
        time.sleep(MEMORY_EVERY_S)


if __name__ == "__main__":
    main()
