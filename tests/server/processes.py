# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve`` as a process of its own."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server.running import wait_until


@contextmanager
def process_of(directory: Path, *words: str) -> Iterator[tuple[subprocess.Popen, str, list[str]]]:
    """A process that serves, its address, and the lines of its standard error, all of which are there at the end."""
    options = ["--model", str(directory), "--port", "0", "--device", "cpu", "--threads", "1"]
    command = [sys.executable, "-m", "wedlm", "serve", *options, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))
    reader.start()
    try:
        pattern = re.compile(r"serving [^;]+ at (http://127\.0\.0\.1:\d+|unix:\S+);")
        wait_until(lambda: process.poll() is not None or bool(pattern.search("".join(lines))), seconds=60)
        yield process, pattern.search("".join(lines))[1], lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()
