# SPDX-License-Identifier: Apache-2.0
"""Many streams at once, clients that leave at random, and memory over thousands of requests."""

import gc
import os
import random
import socket
import time
from pathlib import Path

import pytest

from tests.server.asking import TEXT
from tests.server.running import MODEL, Running, serving, wait_until
from tests.server.streams import all_streams, text_of
from wedlm import LLM, SamplingParams

PROMPTS = [f"{i}: tell me" for i in range(256)]


def check_streams(llm: LLM, reference: LLM, prompts: list[str], decoding: str, max_tokens: int) -> None:
    """All at once through the server: each has the text that it has alone."""
    params = SamplingParams(max_tokens=max_tokens, decoding=decoding)
    with serving(llm) as running:
        texts = [text_of(one) for one in all_streams(running, prompts, max_tokens=max_tokens, decoding=decoding)]
        running.settled()
    assert texts == [reference.generate(prompt, params)[0].text for prompt in prompts]


def test_48_streams_have_the_texts_they_have_alone(llm, reference):
    check_streams(llm, reference, PROMPTS[:48], "verified", max_tokens=8)


@pytest.mark.long
@pytest.mark.parametrize("decoding", ["streaming", "verified", "block", "autoregressive"])
def test_256_streams_have_the_texts_they_have_alone(llm, reference, decoding):
    check_streams(llm, reference, PROMPTS, decoding, max_tokens=32)


def leave_at_random(running: Running, count: int, rng: random.Random) -> None:
    """Connections that are cut while the request is sent, queued, running, or answered."""
    for i in range(count):
        options = (
            f'"max_tokens": {rng.randint(1, 100)}, "n": {rng.randint(1, 3)}, "stream": {rng.choice(["true", "false"])}'
        )
        body = f'{{"model": "{MODEL}", "prompt": "{"abc " * rng.randint(1, 20)}{i}", "ignore_eos": true, {options}}}'
        head = f"POST {TEXT} HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        data = (head + body).encode()
        connection = socket.create_connection(("127.0.0.1", running.port))
        with connection:
            connection.sendall(data[: rng.randint(1, len(data))] if rng.random() < 0.1 else data)
            time.sleep(rng.choice([0, 0.001, 0.01, 0.03]))


def check_disconnects(llm: LLM, count: int) -> None:
    with serving(llm, max_queue=64) as running:
        expected = running.text("abc", max_tokens=20)
        leave_at_random(running, count, random.Random(0))
        running.settled()
        assert running.model.engine.num_faults == 0
        assert running.text("abc", max_tokens=20) == expected
        running.settled()
        wait_until(lambda: len(running.server.server_state.tasks) == 0)


def test_clients_that_leave_at_random(llm):
    check_disconnects(llm, 100)


@pytest.mark.long
def test_1000_clients_that_leave_at_random(llm):
    check_disconnects(llm, 1000)


def resident_mb() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def check_memory(llm: LLM, warm_up: int, count: int, allowed_mb: float) -> float:
    """Growth of the process's memory over ``count`` requests, clients included."""
    with serving(llm) as running:

        def send(number: int) -> None:
            for start in range(0, number, 50):
                prompts = [f"{start + i} x" for i in range(50)]
                all_streams(running, prompts, max_tokens=4, decoding="verified")
            wait_until(lambda: not running.server.server_state.connections)

        send(warm_up)
        before, tasks = resident_mb(), len(gc.get_objects())
        send(count)
        running.settled()
        grown, objects = resident_mb() - before, len(gc.get_objects()) - tasks
        assert grown < allowed_mb
        assert objects < 2 * count  # a request that stays would be dozens; connections that are closing are some
        assert not running.model.engine._live
    return grown


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
def test_memory_stays(llm):
    check_memory(llm, 100, 200, allowed_mb=15)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own figures")
def test_memory_stays_over_5000_requests(llm, record_property):
    grown = check_memory(llm, 1000, 5000, allowed_mb=15)
    record_property("grown_mb", f"{grown:.1f}")
