# SPDX-License-Identifier: Apache-2.0
"""What the server adds: CPU microseconds per streamed token and per request, with an engine that computes nothing.

    python benchmarks/server_overhead.py --out benchmarks/results/server_overhead

The engine hands each open sequence one token a step and sleeps in between, so that all CPU time of the server's process
is the server's own: HTTP, JSON, queues, threads, text of tokens. It sleeps long enough for each token to be sent before
the next one comes, as a model would; a faster engine's tokens share sends. Clients are a process of their own. Last
line: JSON.

Per request: the CPU time of requests for one token that are not streamed. Per token: the CPU time of streams of
``TOKENS`` tokens, less that of as many streams of one token, by the tokens between. Every token is a chunk of its own.
"""

import argparse
import asyncio
import json
import multiprocessing
import platform
import statistics
import sys
import threading
import time
from collections import deque
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2

from wedlm.engine.admission import make_request
from wedlm.engine.options import EngineConfig
from wedlm.engine.request import Request
from wedlm.engine.sampling_params import SamplingParams
from wedlm.server.app import create_app
from wedlm.server.config import ServerConfig
from wedlm.server.run import Server

REQUESTS = {1: 32, 32: 128, 256: 512}  # streams at a time: requests of a measurement
TOKENS, REPETITIONS = 64, 5
WORDS = [" a", " quick", " fox", " jumps", " over", " it"]


class WordTokenizer:
    """One word per id."""

    has_chat_template = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * 16

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join([WORDS[i % len(WORDS)] for i in ids])


class NoEngine:
    """What ``AsyncEngine`` needs of an engine; a step gives every sequence one token."""

    def __init__(self) -> None:
        self.config = EngineConfig(vocab_size=100, mask_token_id=99, eos_token_ids=(), max_model_len=4096)
        self.requests: dict[str, Request] = {}
        self.scheduler = SimpleNamespace(waiting=deque(), running=[])
        self.pool = SimpleNamespace(num_pages=1000, num_available=1000, page_size=16)
        self.tokenizer = WordTokenizer()

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, request_id: str, prompt: list[int], params: SamplingParams, **how: bool) -> Request:
        times = {"arrival": len(self.requests), "arrival_time": time.perf_counter()}
        request = make_request(self.config, self.tokenizer, request_id, prompt, params, **times, **how)
        self.requests[request_id] = request
        return request

    def abort(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    def step(self) -> list[Request]:
        changed = list(self.requests.values())
        time.sleep(1e-3 + 1e-4 * len(changed))
        for request in changed:
            output, counters = request.output, request.counters
            output.tokens.append(len(output.tokens) % len(WORDS))
            output.text.push(output.tokens[-1])
            output.token_steps.append(counters.num_forwards)
            counters.num_forwards += 1
            counters.num_rows += 1
            if request.num_output_tokens == request.max_tokens:
                counters.finish_time = time.perf_counter()
                output.finish_reason = "length"
                del self.requests[request.request_id]
        return changed


async def _load(url: str, streams: int, requests: int, tokens: int, stream: bool) -> None:
    """``requests`` of them, ``streams`` at a time."""
    body = {"model": "none", "prompt": "x", "max_tokens": tokens, "stream": stream}
    left = iter(range(requests))

    async def worker(client: httpx2.AsyncClient) -> None:
        for _ in left:
            answer = await client.post(f"{url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as client:
        await asyncio.gather(*(worker(client) for _ in range(streams)))


def _client(url: str, pipe: Any) -> None:
    """The clients' process: a load at a time, until told None."""
    while (load := pipe.recv()) is not None:
        asyncio.run(_load(url, *load))
        pipe.send("done")


def measure(pipe: Any) -> dict[int, dict[str, list[float]]]:
    """Microseconds of CPU by number of streams, one figure per repetition."""

    def cpu_us(*load: Any) -> float:
        start = time.process_time()
        pipe.send(load)
        pipe.recv()
        return (time.process_time() - start) * 1e6

    figures: dict[int, dict[str, list[float]]] = {n: {"request": [], "token": []} for n in REQUESTS}
    cpu_us(8, 64, 8, True)  # warm
    for _ in range(REPETITIONS):
        for streams, count in REQUESTS.items():
            figures[streams]["request"].append(cpu_us(streams, count, 1, False) / count)
            one, many = (cpu_us(streams, count, tokens, True) for tokens in (1, TOKENS))
            figures[streams]["token"].append((many - one) / (count * (TOKENS - 1)))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    out = parser.parse_args().out
    engine = NoEngine()
    llm: Any = SimpleNamespace(
        engine=engine,
        tokenizer=engine.tokenizer,
        _encode=engine.tokenizer.encode,
        window_warning=lambda params: None,
    )
    server = Server(create_app({"none": llm}, ServerConfig(port=0, max_queue=1000)))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    here, there = multiprocessing.get_context("spawn").Pipe()
    clients = multiprocessing.get_context("spawn").Process(target=_client, args=(url, there))
    clients.start()
    try:
        figures = measure(here)
    finally:
        here.send(None)
        clients.join()
        server.should_exit = True
        thread.join()
    lines = ["| streams | CPU µs per request | per streamed token | spread of it |", "| --- | --- | --- | --- |"]
    for streams, one in figures.items():
        request, token = (statistics.median(one[name]) for name in ("request", "token"))
        lines.append(
            f"| {streams} | {request:.0f} | {token:.0f} | {min(one['token']):.0f} to {max(one['token']):.0f} |"
        )
    versions = f"Python {platform.python_version()}, {platform.machine()}, {sys.platform}"
    how = f"median of {REPETITIONS}, {TOKENS} tokens a stream"
    report = {"date": date.today().isoformat(), "versions": versions, "how": how, "cpu_us": figures}
    text = f"# What the server adds\n\n{report['date']}, {versions}; {how}.\n\n" + "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.with_suffix(".md").write_text(text)
        out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
