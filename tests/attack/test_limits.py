# SPDX-License-Identifier: Apache-2.0
"""Bounds that need a server started in a way of its own: time for a head, descriptors, a log that nobody reads."""

import signal
import socket
import time

import pytest

from tests.attack.cases import TEXT
from tests.attack.victim import END_S, GRACE_S, serving_process
from tests.engine.tiny_llm import save_tiny
from tests.server.running import wait_until

HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: "
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def closed(connection: socket.socket) -> bool:
    """Whether the server has ended it, with or without a word."""
    connection.setblocking(False)
    try:
        while connection.recv(1000):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def test_heads_and_the_number_of_connections(model):
    """Neither silence nor a drop now and then keeps a connection, and there is a most of them."""
    with serving_process(model, "--header-timeout", "1", "--max-connections", "20", probed=False) as victim:
        silent, half, dripping, served = (victim.connect() for _ in range(4))
        half.sendall(HALF)
        dripping.sendall(HALF)
        served.sendall(WHOLE)
        assert served.recv(1000).startswith(b"HTTP/1.1 200")
        served.sendall(HALF)  # the next one on a connection that has been served
        start = time.monotonic()
        for _ in range(8):
            time.sleep(0.1)
            dripping.sendall(b"a")
        wait_until(lambda: all(map(closed, (silent, half, dripping, served))), seconds=3)
        assert 0.8 < time.monotonic() - start < 3
        many = [victim.connect() for _ in range(30)]
        wait_until(lambda: sum(map(closed, many[20:])) == 10, seconds=0.8)
        assert not any(map(closed, many[:15]))
        for connection in (silent, half, dripping, served, *many):
            connection.close()
        assert victim.post(TEXT, b"{}")[0] == 400
        assert sum("--max-connections" in line for line in victim.lines) == 1
        victim.end()
        victim.check_log()


@pytest.mark.long
def test_descriptors_run_out(model):
    """As many connections as there are descriptors for; at their end a line, and service once they are back."""
    with serving_process(model, "--header-timeout", "2", probed=False, descriptors=100) as victim:
        assert any("100 descriptors leave room for 36 connections" in line for line in victim.lines)
        many = [victim.connect() for _ in range(150)]
        wait_until(lambda: sum(map(closed, many)) > 100, seconds=5)
        assert victim.num_descriptors < 100
        wait_until(lambda: all(map(closed, many)), seconds=5)
        for connection in many:
            connection.close()
        assert victim.post(TEXT, b"{}")[0] == 400
        assert len(victim.lines) < 20
        victim.end()
        victim.check_log()


@pytest.mark.long
def test_a_log_that_nobody_reads(model):
    """Lines are dropped and counted; nothing waits for them, not even the end."""
    with serving_process(model, probed=False, read_log=False) as victim:
        for _ in range(4000):
            assert victim.get("/health") == 200
        assert victim.end() < END_S


@pytest.mark.long
def test_an_end_by_force(model):
    """The loop hangs: the process ends all the same, five seconds after its grace, and says so."""
    with serving_process(model, probed=False, entry="tests.attack.faulty") as victim:
        assert victim.get("/health") == 200
        victim.process.send_signal(signal.SIGRTMAX)
        time.sleep(0.2)
        start = time.monotonic()
        victim.process.send_signal(signal.SIGTERM)
        assert victim.process.wait(30) == 1
        assert GRACE_S + 5 <= time.monotonic() - start < GRACE_S + 10
        wait_until(lambda: any("did not end in time" in line for line in victim.lines))
        victim.check_log()
