# SPDX-License-Identifier: Apache-2.0
"""Grammars that cost too much, through the server: everybody else is served meanwhile, and it still ends."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.attack.schemas import multiples, nested_references
from tests.server.asking import check_error
from tests.server.running import MODEL, Running, serving, wait_until
from wedlm import LLM

CHAT = "/v1/chat/completions"
HONEST = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def asking(schema: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {"messages": [{"role": "user", "content": "x"}], "response_format": form, "max_tokens": 40}


def hostile(number: int) -> dict[str, Any]:
    """Another one for each number."""
    some = multiples(9973, 9967) if number % 2 else nested_references(6)
    return asking({**some["json_schema"], "title": str(number)})


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A machine with much else to do may need long for a second of processor time."""
    monkeypatch.setattr("wedlm.engine.constraints.trial._MAX_WALL_S", 300.0)


@pytest.fixture
def llm(directory) -> LLM:
    return LLM(directory, device="cpu", max_num_seqs=16)


def workers(running: Running) -> list[int]:
    return [worker.pid for worker in running.model._grammars._trials._idle]


def test_others_are_served_meanwhile(llm):
    with serving(llm) as running, ThreadPoolExecutor(6) as pool:
        attacks = [pool.submit(running.post, CHAT, hostile(i)) for i in range(6)]
        served = 0
        while not all(one.done() for one in attacks):
            running.text("abc", max_tokens=4)
            served += 1
        for one in attacks:
            error = check_error(one.result(), 400)
            assert "is not usable" in error["message"]
            assert error["param"] == "response_format"
        assert served > 5  # of a handful of milliseconds each; who waits for the attacks has one
        answer = running.post(CHAT, asking(HONEST))
        assert answer.status_code == 200, answer.text
        running.settled()


@pytest.mark.long
def test_what_was_left_behind_delays_nobody(llm):
    """30 schemas of a second each, whose clients have gone."""
    with serving(llm) as running:
        assert running.post(CHAT, asking(HONEST)).status_code == 200
        started = time.monotonic()
        check_error(running.post(CHAT, hostile(61)), 400)
        alone = time.monotonic() - started
        for number in range(30):
            body = json.dumps({"model": MODEL, **hostile(2 * number + 1)}).encode()
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(0.02)
        started = time.monotonic()
        assert running.post(CHAT, asking({**HONEST, "title": "behind them"})).status_code == 200
        assert time.monotonic() - started < 7 * alone  # half of what the others would have taken, two at a time
        wait_until(lambda: not running.service._num_at_work(), seconds=2)


def test_a_worker_that_dies_is_replaced(llm):
    with serving(llm) as running:
        assert running.post(CHAT, asking(HONEST)).status_code == 200
        for process in workers(running):
            os.kill(process, signal.SIGKILL)
        assert running.post(CHAT, asking({**HONEST, "title": "another"})).status_code == 200
        running.settled()


@pytest.mark.long
def test_the_server_ends_although_grammars_compile(llm):
    with ThreadPoolExecutor(6) as pool, serving(llm, shutdown_timeout_s=2) as running:
        attacks = [pool.submit(running.post, CHAT, hostile(2 * i + 1)) for i in range(6)]
        time.sleep(0.4)
        running.server.handle_exit(signal.SIGTERM, None)
        running.thread.join(20)
        assert not running.thread.is_alive()
        for one in attacks:
            one.exception()  # cut off, or refused


def test_no_more_than_a_few_wait(llm, monkeypatch):
    monkeypatch.setattr("wedlm.engine.constraints.grammar._MAX_WAITING", 2)
    with serving(llm) as running, ThreadPoolExecutor(6) as pool:
        answers = [one.result() for one in [pool.submit(running.post, CHAT, hostile(2 * i + 1)) for i in range(6)]]
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {400, 429}
        busy = next(answer for answer in answers if answer.status_code == 429)
        assert check_error(busy, 429)["code"] == "queue_full"
        assert busy.headers["Retry-After"] == "1"
        running.settled()
