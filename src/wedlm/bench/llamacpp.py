# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's server beside our engine: the same base model, prompts and threads; one process for each server."""

import http.client
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wedlm.bench.stats import Figures
from wedlm.extras import install_extras
from wedlm.model.demo import default_cache_dir, demo_model_path

KINDS = ("Q4_1", "Q8_0", "F16")  # of the base model; the best of them is compared with
SPECULATION = "ngram_mod"
_START_TIMEOUT_S, _ANSWER_TIMEOUT_S = 60.0, 120.0
_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Serving:
    """One server: ``context`` tokens for each of ``slots``; ``speculation`` names one of llama.cpp's ways to draft."""

    model: str
    threads: int
    slots: int = 1
    context: int = 2048
    speculation: str = ""
    binary: str = ""
    waiting: str = ""  # OMP_WAIT_POLICY; empty: unset


class LlamaServer:
    """A running server. Every question has a time limit."""

    def __init__(self, serving: Serving, address: str, about: dict[str, str]) -> None:
        self.serving, self.about, self._where = serving, about, urlsplit(address)

    def complete(self, prompt: Sequence[int], num_tokens: int, **more: Any) -> Figures:
        """An answer at temperature 0, with no part of the prompt cached unless ``more`` says so. llama.cpp's own clock
        gives ``prompt_ms``, ``step_ms`` for each token after the first, and ``seconds``, their sum; ``wall_s`` includes
        the way there and back."""
        request = {"temperature": 0, "cache_prompt": False, "n_predict": num_tokens, "prompt": list(prompt), **more}
        start = time.perf_counter()
        answer = self._ask("POST", "/completion", json.dumps(request))
        wall = time.perf_counter() - start
        timings = answer["timings"]
        return {
            "prompt_ms": timings["prompt_ms"],
            "prompt_tokens": timings["prompt_n"],
            "step_ms": timings["predicted_ms"] / max(1, timings["predicted_n"] - 1),
            "tokens": timings["predicted_n"],
            "seconds": (timings["prompt_ms"] + timings["predicted_ms"]) / 1e3,
            "wall_s": wall,
        }

    def complete_all(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Figures:
        """Ask all at once. Gives the number of tokens, and the seconds until the last has ended."""
        start = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: self.complete(prompt, num_tokens), prompts))
        return {"tokens": sum(one["tokens"] for one in answers), "seconds": time.perf_counter() - start}

    def answers(self, deadline: float) -> bool:
        """Wait until the server answers; returns False after the deadline (time.monotonic)."""
        while time.monotonic() < deadline:
            try:
                self._ask("GET", "/health", None)
                return True
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.1)  # it still loads
        return False

    def _ask(self, method: str, path: str, body: str | None) -> dict[str, Any]:
        assert self._where.hostname is not None
        connection = http.client.HTTPConnection(self._where.hostname, self._where.port, timeout=_ANSWER_TIMEOUT_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"llama.cpp answered {response.status}: {answer[:_SHOWN_CHARACTERS].decode()}")
        return json.loads(answer)


@contextmanager
def serving(*all_of: Serving) -> Iterator[list[LlamaServer]]:
    """Start servers, and yield them once they are up and warm; they end with the block. Raises ValueError if one does
    not start."""
    with ExitStack() as stack:
        servers = [stack.enter_context(_one(one)) for one in all_of]
        yield servers


@contextmanager
def _one(task: Serving) -> Iterator[LlamaServer]:
    with tempfile.TemporaryFile() as log:
        # Its own group, so that all of it can be ended; the same session, so that it has our share of the machine.
        process = subprocess.Popen(
            [sys.executable, "-m", "wedlm.bench.llamacpp_worker", json.dumps(asdict(task))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, process_group=0,
            env=_environment(task.waiting),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            deadline = time.monotonic() + _START_TIMEOUT_S
            ready, _, _ = select.select([process.stdout], [], [], _START_TIMEOUT_S)
            line = process.stdout.readline() if ready else b""
            about = json.loads(line) if line.startswith(b"{") else {"address": ""}
            server = LlamaServer(task, about.pop("address"), about)
            if not about or not server.answers(deadline):
                raise ValueError(f"llama.cpp did not start with {task.model}: {_last_words(log, line)}")
            yield server
        finally:
            _end(process)


def _environment(waiting: str) -> dict[str, str]:
    rest = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return {**rest, "OMP_WAIT_POLICY": waiting} if waiting else rest


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a server: it ends itself when its input does, and after five seconds the rest of its process group
    is killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()


def _last_words(log: Any, line: bytes) -> str:
    log.seek(0)
    text = (log.read() + line).decode(errors="replace")
    lines = [one.strip() for one in text.splitlines() if one.strip()]
    return ([one for one in lines if "rror" in one] or lines or ["(no output)"])[-1][-_SHOWN_CHARACTERS:]


def check_llamacpp(binary: str | None) -> None:
    """Raises ValueError if llama.cpp is not available."""
    if binary is None and find_spec("xllamacpp") is None:
        raise ValueError(
            f"--against is llamacpp, whose wheel is not installed here; expected {install_extras('llamacpp')} first, "
            "or --llama-server with the path of a llama-server"
        )
    if binary is not None and not os.access(binary, os.X_OK):
        raise ValueError(f"--llama-server is {binary}; expected the path of llama-server")


def base_files() -> dict[str, Path]:
    """Files of the demo model before its adaptation, by kind of weights: the published one, and those that are written
    from it into the cache once."""
    source = demo_model_path()
    files = {KINDS[0]: source}
    for kind in KINDS[1:]:
        files[kind] = default_cache_dir() / source.name.replace(KINDS[0], kind)
        if not files[kind].exists():
            from wedlm.model.quantize_checkpoint import quantize_checkpoint  # loads gguf, which only this needs

            quantize_checkpoint("demo-base", files[kind], to="gguf", type=kind.lower())
    return files
