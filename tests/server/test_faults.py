# SPDX-License-Identifier: Apache-2.0
"""A step that raises: clear errors, a red /health, and a server that serves again."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.faulty_runner import FaultyRunner
from tests.server.asking import LONG, TEXT, check_error
from tests.server.running import events, serving, wait_until
from wedlm import LLM, SamplingParams
from wedlm.engine import async_llm as async_engine
from wedlm.engine.factory import Blueprint


@pytest.fixture
def llm(directory) -> LLM:
    return LLM(directory, device="cpu", max_num_seqs=16)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="wedlm")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt])
def test_requests_get_errors_and_the_engine_restarts(llm, reference, monkeypatch, error):
    """Whatever is raised: what ends a thread in silence must not leave requests waiting behind a green /health."""
    repaired = threading.Event()
    llm.engine.runner = FaultyRunner(llm.engine, at=20, error=error)
    expected = reference.generate("abc", SamplingParams(max_tokens=20))[0].text
    with serving(llm) as running:
        original = running.model.engine._rebuild

        def renew_late(broken):
            assert repaired.wait(30)
            return original(broken)

        monkeypatch.setattr(running.model.engine, "_rebuild", renew_late)
        with ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(running.post, TEXT, {**LONG, "stream": True}) for _ in range(4)]
            whole = [pool.submit(running.post, TEXT, LONG) for _ in range(4)]
        for one in streams:
            assert events(one.result())[-1]["error"]["code"] == "engine_fault"
        for one in whole:
            assert check_error(one.result(), 500)["code"] == "engine_fault"
        red = running.http.get("/health")
        assert (red.status_code, red.json()) == (503, {"status": "restarting"})
        assert check_error(running.post(TEXT, {"prompt": "x"}), 503)["code"] == "restarting"
        assert 'wedlm_engine_up{model_name="tiny"} 0.0' in running.http.get("/metrics").text
        repaired.set()
        wait_until(lambda: running.http.get("/health").status_code == 200)
        assert running.text("abc", max_tokens=20) == expected
        assert 'wedlm_engine_faults{model_name="tiny"} 1.0' in running.http.get("/metrics").text
        running.settled()


@pytest.mark.long
def test_faults_again_and_again(llm, reference, monkeypatch):
    """Every request either has its text or an error; the server outlives every fault."""

    rebuild = Blueprint.rebuild

    def faulty(blueprint, broken):
        engine = rebuild(blueprint, broken)
        engine.runner = FaultyRunner(engine, at=25)
        return engine

    monkeypatch.setattr(Blueprint, "rebuild", faulty)
    llm.engine = faulty(llm.blueprint, llm.engine)
    expected = {p: reference.generate(p, SamplingParams(max_tokens=12))[0].text for p in ("a", "bc", "def", "ghij")}
    with serving(llm) as running:

        def ask(prompt: str) -> bool:
            answer = running.post(TEXT, {"prompt": prompt, "temperature": 0, "max_tokens": 12})
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == expected[prompt]
                return True
            assert answer.json()["error"]["code"] in ("engine_fault", "restarting")
            return False

        served: list[bool] = []
        with ThreadPoolExecutor(4) as pool:
            for _ in range(50):  # how many requests meet a fault, and how many its repair, is a matter of luck
                served += pool.map(ask, [*expected] * 4)
                wait_until(lambda: running.service.status == "ok")
                if running.model.engine.num_faults >= 3:
                    break
        assert any(served)
        assert not all(served)
        assert running.model.engine.num_faults >= 3


def test_beyond_repair_the_server_ends(llm, monkeypatch):
    """Its supervisor can then start a new process."""
    monkeypatch.setattr(async_engine, "MAX_RESTARTS", 1)
    llm.engine.runner = FaultyRunner(llm.engine, at=3)
    with serving(llm) as running:
        monkeypatch.setattr(running.model.engine, "_rebuild", lambda broken: 1 / 0)
        check_error(running.post(TEXT, LONG), 500)
        running.thread.join(10)
        assert not running.thread.is_alive()
        assert running.server.failed


def test_a_fault_in_the_repair_ends_the_server(llm, monkeypatch):
    """The thread itself dies: requests get an error, and /health does not stay green."""
    llm.engine.runner = FaultyRunner(llm.engine, at=3)
    with serving(llm) as running:
        monkeypatch.setattr(running.model.engine, "_recover", lambda error: 1 / 0)
        assert check_error(running.post(TEXT, LONG), 503)["code"] == "shutting_down"
        running.thread.join(10)
        assert not running.thread.is_alive()
        assert running.server.failed
        assert running.service.status == "dead"
