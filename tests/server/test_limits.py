# SPDX-License-Identifier: Apache-2.0
"""Load, time, size, keys, origins, disconnects, shutdown."""

import asyncio
import json
import logging
import re
import socket
import threading
import time

import httpx2
import pytest

from tests.engine.tiny_llm import check_empty
from tests.server.asking import LONG, TEXT, check_error
from tests.server.running import MODEL, events, serving, wait_until
from wedlm import SamplingParams
from wedlm.server.config import ServerConfig
from wedlm.server.sse import EventStream


@pytest.fixture
def slow(llm, monkeypatch):
    """Each step takes 10 ms more, so that a request lasts."""
    original = llm.engine.runner.run
    monkeypatch.setattr(llm.engine.runner, "run", lambda plan: (time.sleep(0.01), original(plan))[1])
    return llm


def test_full_queue(slow):
    """16 run, 4 wait, the next is refused at once; those that were accepted finish."""
    with serving(slow, max_queue=4) as running:
        answers = []

        def ask(n: int) -> None:
            answers.append(running.post(TEXT, {**LONG, "max_tokens": 40, "n": n}))

        threads = [threading.Thread(target=ask, args=(n,)) for n in (16, 4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: running.model.engine.num_open == 20)
        wait_until(lambda: running.model.engine.load.num_running > 3)  # the cache has room for a few only
        refused = running.post(TEXT, {"prompt": "x"})
        assert check_error(refused, 429)["code"] == "queue_full"
        assert int(refused.headers["Retry-After"]) >= 1
        metrics = running.http.get("/metrics").text
        counts = [
            float(re.search(rf"\nwedlm_sequences_{name}{{.*}} (.*)", metrics)[1]) for name in ("running", "waiting")
        ]
        assert sum(counts) == 20
        assert min(counts) >= 4
        for thread in threads:
            thread.join()
        assert sorted(len(answer.json()["choices"]) for answer in answers) == [4, 16]
        assert running.text("x")
        running.settled()


def test_more_choices_than_the_queue_can_ever_hold(llm):
    """Trying again would not help, so 429 would be wrong."""
    with serving(llm, max_queue=4) as running:
        message = check_error(running.post(TEXT, {"prompt": "x", "n": 21}))["message"]
        assert "is 21; expected at most 20" in message
        assert running.post(TEXT, {"prompt": "x", "n": 20, "max_tokens": 2}).status_code == 200


def test_requests_that_take_too_long(slow):
    with serving(slow, request_timeout_s=0.3) as running:
        assert check_error(running.post(TEXT, LONG), 504)["code"] == "timeout"
        answer = running.post(TEXT, {**LONG, "stream": True})
        last = events(answer)[-1]
        assert last["error"]["code"] == "timeout"
        assert len(events(answer)) > 2  # what came in time was sent
        running.settled()


@pytest.mark.parametrize("decoding", ["streaming", "block", "verified"])
def test_an_absurd_window_costs_the_others_nothing(running, reference, decoding):
    """The state of windows is shared: one of millions of columns would slow every later step."""
    options = {"decoding": decoding, "wedlm_window_size": 2**31 - 1, "max_tokens": 8}
    assert running.text("abc", **options) == reference.generate("abc", SamplingParams(**options))[0].text
    engine = running.model.llm.engine
    assert engine.runner.windows.state.tokens.shape[1] <= engine.config.max_model_len


def test_a_client_that_stops_reading():
    """It holds its stream for a limited time."""
    ends = []

    async def events_without_end():
        while True:
            yield b"x"

    async def main() -> None:
        never = asyncio.Event()
        sent = []

        async def send(message) -> None:
            sent.append(message)
            if len(sent) > 3:
                await never.wait()

        scope = {"type": "http", "wedlm.log": {}}
        await EventStream(events_without_end(), lambda: ends.append(len(sent)), 0.05, {})(scope, never.wait, send)
        assert scope["wedlm.log"] == {"stuck": True}

    asyncio.run(asyncio.wait_for(main(), 5))
    assert ends == [4]


def test_bodies_that_are_too_large_or_too_slow(llm):
    with serving(llm, max_body_bytes=1000, body_timeout_s=0.3) as running:
        assert check_error(running.post(TEXT, {"prompt": "x" * 1000}), 413)["code"] == "body_too_large"
        chunks = (b"x" * 500 for _ in range(6))  # of a length not told beforehand
        check_error(running.http.post(TEXT, content=chunks), 413)
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        assert running.text("x")


def test_only_so_many_bodies_are_on_their_way(llm):
    """64 times the size of the largest. Their memory comes back with the end of each."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(llm, max_body_bytes=1000) as running:

        def send() -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", running.port), timeout=10)
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n" + b" " * 999)
            return connection

        held = [send() for _ in range(64)]
        wait_until(lambda: len(running.server.server_state.connections) >= 64)
        time.sleep(0.2)
        with send() as one_more:
            assert one_more.recv(100).startswith(b"HTTP/1.1 429")
        for connection in held:
            connection.close()
        wait_until(lambda: len(running.server.server_state.connections) <= 1)
        with send() as again:
            again.sendall(b" ")
            assert again.recv(100).startswith(b"HTTP/1.1 400")
        assert running.text("x")


def test_an_answer_that_is_not_taken(llm, monkeypatch):
    """The kernel ends its connection: nothing else would tell that the client is there no more."""
    monkeypatch.setattr("wedlm.server.connections._STUCK_S", 1.0)
    with serving(llm) as running:
        body = json.dumps({"model": MODEL, **LONG, "max_tokens": 150, "n": 28, "logprobs": 20}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", running.port))
            head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: running.model.engine.num_open > 0)
            wait_until(lambda: running.model.engine.num_open == 0, seconds=60)
            assert len(running.server.server_state.connections) == 1
            wait_until(lambda: not running.server.server_state.connections, seconds=30)
        assert running.text("x")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_a_client_that_leaves(slow, stream, started):
    """Its request ends within a step, wherever it was, and leaves nothing."""
    with serving(slow) as running:
        body = json.dumps({"model": MODEL, **LONG, "stream": stream, "n": 3}).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: running.model.engine.load.num_running == 3 if started else True)
        wait_until(lambda: running.model.engine.num_open == 0, seconds=1)
        running.settled()
        assert "wedlm_sequences_finished_total{" not in running.http.get("/metrics").text


def test_api_keys(llm, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(llm, api_keys=("first-key", "second-key")) as running:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer"},
            {"Authorization": "first-key"},
            {"Authorization": "Basic first-key"},
            {"Authorization": "Bearer first-keys"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = running.http.get(path, headers=headers)
                assert check_error(answer, 401)["code"] == "invalid_api_key"
            check_error(running.post(TEXT, {"prompt": "x"}, **headers), 401)
        for key in ("first-key", "second-key"):
            assert running.post(TEXT, {"prompt": "x"}, Authorization=f"Bearer {key}").status_code == 200
        assert running.http.get("/health").status_code == 200
    assert "first-key" not in caplog.text
    assert "first-key" not in repr(running.service.config)


def test_origins(llm):
    origin = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    with serving(llm) as running:
        for answer in (running.http.get("/v1/models", headers=origin), running.http.options(TEXT, headers=origin)):
            assert check_error(answer, 403)["code"] == "unknown_origin"
            assert "access-control-allow-origin" not in answer.headers
    with serving(llm, cors_origins=("https://page.example",), api_keys=("key",)) as running:
        assert running.http.options(TEXT, headers=origin).headers["access-control-allow-origin"] == origin["Origin"]
        other = running.http.options(TEXT, headers={**origin, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_shutdown_lets_running_requests_finish(slow):
    """New ones are refused, /health tells, and the process then ends by itself."""
    with serving(slow, shutdown_timeout_s=30) as running:
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(running.post(TEXT, {**LONG, "max_tokens": 50, "stream": True}))
        )
        thread.start()
        wait_until(lambda: running.model.engine.num_open == 1)
        running.server.handle_exit(15, None)
        wait_until(lambda: running.service.draining)
        refused = running.post(TEXT, {"prompt": "x"})
        assert check_error(refused, 503)["code"] == "draining"
        assert "Retry-After" in refused.headers
        assert running.http.get("/health").status_code == 503
        thread.join()
        assert events(answers[0])[-1]["choices"][0]["finish_reason"] == "length"
        running.thread.join(10)
        assert not running.thread.is_alive()


@pytest.mark.parametrize("stream", [True, False])
def test_shutdown_does_not_wait_forever(slow, stream):
    with serving(slow, shutdown_timeout_s=0.2) as running:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(running.post(TEXT, {**LONG, "stream": stream})))
        thread.start()
        wait_until(lambda: running.model.engine.load.num_running == 1)
        running.server.handle_exit(15, None)
        thread.join(10)
        if stream:
            assert events(answers[0])[-1]["error"]["code"] == "shutting_down"
        else:
            assert check_error(answers[0], 503)["code"] == "shutting_down"
        running.thread.join(10)
        assert not running.thread.is_alive()
    check_empty(slow)


def test_page_of_a_folder(llm, tmp_path):
    """Only with an index, only the folder's own files, and the addresses of the API stay."""
    demo = tmp_path / "demo"
    demo.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (demo / "app.js").write_text("let x")
    with serving(llm, demo=demo) as running:
        check_error(running.http.get("/app.js"), 404)
    (demo / "index.html").write_text("<p>hello")
    with serving(llm, demo=demo) as running:
        page = running.http.get("/")
        assert (page.status_code, page.text) == (200, "<p>hello")
        assert page.headers["Content-Type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
        assert "javascript" in running.http.get("/app.js").headers["Content-Type"]
        for path in ("/../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt"):
            check_error(httpx2.get(running.url + path), 404)
        assert running.http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "options",
    [
        {"port": 70000},
        {"max_queue": -1},
        {"request_timeout_s": 0},
        {"shutdown_timeout_s": -1},
        {"body_timeout_s": float("nan")},
        {"api_keys": ("ok", "")},
    ],
)
def test_options_are_checked(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match="API key" if name == "api_keys" else name):
        ServerConfig(**options)
