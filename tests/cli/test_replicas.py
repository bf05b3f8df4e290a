# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve --data-parallel-size``: several servers on one address, and the process that watches them."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from tests.engine.tiny_llm import save_tiny
from tests.processes import children, is_running, stopped
from tests.server.processes import process_of
from tests.server.running import wait_until
from wedlm.cli import replicas

_LOADED_S = 120  # the machine may be busy


def one_that_ends(code: int) -> replicas._Running:
    return replicas._Running(0, [sys.executable, "-S", "-c", f"raise SystemExit({code})"], ())


def test_one_that_ends_again_and_again_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(replicas, "_PAUSE_S", 0.0)
    monkeypatch.setattr(replicas, "_MAX_RESTARTS", 2)
    one = one_that_ends(3)
    assert replicas._watch([one], []) == 1
    assert one.failures == 3
    told = capsys.readouterr().err.splitlines()
    assert told == ["replica 0 ended with code 3 and is started again"] * 2 + ["replica 0 ended 3 times in a row"]


def test_what_the_user_has_to_mend_ends_all():
    assert replicas._watch([one_that_ends(2)], []) == 2


def test_none_is_started_after_a_signal(monkeypatch):
    stopping: list[int] = []
    monkeypatch.setattr(replicas.time, "sleep", lambda s: stopping.append(signal.SIGTERM) if s > 0.5 else None)
    one = one_that_ends(3)
    first = one.process
    assert replicas._watch([one], stopping) == 3
    assert one.process is first


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("served") / "tiny")


def text(url: str) -> str:
    """By a connection of its own."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.mark.long
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_two_replicas_of_one_address(served, how, record_property):
    """All requests are answered, by either; one that is killed is started again; they end with the first process."""
    with process_of(served, "--data-parallel-size", "2") as (process, url, lines):

        def wait_for(count: int) -> None:
            wait_until(lambda: sum(line.startswith("serving ") for line in lines) == count, seconds=_LOADED_S)

        wait_for(2)
        first = children(process.pid)
        assert len(first) == 2
        expected = text(url)
        for pid in first:
            with stopped(pid):
                assert text(url) == expected  # by the other alone
        with ThreadPoolExecutor(8) as threads:
            assert [*threads.map(text, [url] * 64)] == [expected] * 64
        os.kill(first[0], signal.SIGKILL)
        assert [text(url) for _ in range(8)] == [expected] * 8  # by the other, meanwhile
        wait_for(3)
        second = children(process.pid)
        assert first[0] not in second
        assert first[1] in second
        with stopped(first[1]):
            assert text(url) == expected  # by the new one
        process.send_signal(getattr(signal, how))
        code = process.wait(30)
        wait_until(lambda: not any(map(is_running, second)))
    assert code == (0 if how == "SIGTERM" else -signal.SIGKILL)
    assert "raceback" not in "".join(lines)
    for name, value in {"requests answered": 76, "replicas started again": 1, "processes left": 0}.items():
        record_property(name, value)
