# SPDX-License-Identifier: Apache-2.0
"""Processes that answer questions: of any size, in time or not, until they are killed. This file is their module."""

import os
import signal
import sys
import threading
import time

import pytest

from wedlm.engine.helper_process import HelperProcess, answer_questions


def answer(question: bytes) -> bytes:
    if question == b"die":
        sys.exit(3)
    if question == b"sleep":
        time.sleep(60)
    if question == b"half":
        os.write(1, (10).to_bytes(8, "little") + b"12345")
        os._exit(0)
    if question == b"priority":
        return str(os.getpriority(os.PRIO_PROCESS, 0)).encode()
    return question[::-1]


@pytest.fixture
def helper():
    one = HelperProcess(__name__)
    yield one
    one.close()
    assert not one.alive


def test_answers_of_any_size(helper):
    for size in (0, 1, 7, 65_527, 65_536, 65_537, 3_000_000):
        question = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        assert helper.ask(question, 30) == question[::-1]
    assert int(helper.ask(b"priority", 30)) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)


@pytest.mark.parametrize("question", [b"die", b"half"])
def test_a_process_that_ends(helper, question):
    assert helper.ask(b"ab", 30) == b"ba"
    assert helper.ask(question, 30) is None
    assert (helper.alive, helper.late, helper.killed) == (False, False, False)
    assert helper.ask(b"ab", 30) is None


@pytest.mark.parametrize("question", [b"sleep", b"a" * 3_000_000], ids=["busy", "stopped"])
def test_a_process_that_is_late(helper, question):
    """Also one that does not even read."""
    assert helper.ask(b"ab", 30) == b"ba"
    if question != b"sleep":
        os.kill(helper.pid, signal.SIGSTOP)
    assert helper.ask(question, 0.2) is None
    assert (helper.alive, helper.late) == (False, True)


def test_a_process_that_another_thread_kills(helper):
    assert helper.ask(b"ab", 30) == b"ba"
    threading.Timer(0.2, helper.kill).start()
    assert helper.ask(b"sleep", 30) is None
    assert (helper.late, helper.killed) == (False, True)


if __name__ == "__main__":
    answer_questions(answer)
