# SPDX-License-Identifier: Apache-2.0
"""A server on a socket of this machine, in a thread of the test's process, and ways to talk to it."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.engine.tiny_llm import check_empty
from wedlm import LLM
from wedlm.server.app import DEMO, create_app
from wedlm.server.config import ServerConfig
from wedlm.server.run import Server
from wedlm.server.served import ServedModel
from wedlm.server.service import Service

MODEL = "tiny"


class Running:
    """A server that listens; ``http`` talks to it."""

    def __init__(self, server: Server, thread: threading.Thread) -> None:
        self.server, self.thread = server, thread
        self.service: Service = server.service
        self.model: ServedModel = next(iter(self.service.models.values()))
        self.port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx2.Response:
        return self.http.post(path, json={"model": MODEL, **body}, headers=headers)

    def text(self, prompt: str, **options: Any) -> str:
        """A completion, at temperature 0 unless told otherwise."""
        answer = self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **options})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def settled(self) -> None:
        """Wait until nothing runs, then check that nothing is left behind."""
        for model in self.service.models.values():
            wait_until(lambda model=model: not model.engine.num_open and not model.llm.engine.has_work)
            check_empty(model.llm)
            assert not model.engine._live


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it should."""
    lines = [line for line in answer.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines), answer.text
    assert lines[-1] == "data: [DONE]", answer.text
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def figures(running: Running) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    lines = [line for line in running.http.get("/metrics").text.split("\n") if line and line[0] != "#"]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.005)


@contextmanager
def serving(llm: LLM | Mapping[str, LLM], demo: Path = DEMO, name: str = MODEL, **options: Any) -> Iterator[Running]:
    """A server of a model, or of several, until the end of the block; its thread must end, too."""
    models = {name: llm} if isinstance(llm, LLM) else llm
    server = Server(create_app(models, ServerConfig(**{"port": 0, **options}), demo))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        running = Running(server, thread)
        with running.http:
            yield running
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()
