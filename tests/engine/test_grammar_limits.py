# SPDX-License-Identifier: Apache-2.0
"""Compiling a grammar ends when it must: on its limits, when the caller leaves, when its process dies. And what was
compiled is found again."""

import asyncio
import gc
import json
import os
import signal
import sys
import time

import pytest

from tests.attack.schemas import multiples, nested_references
from tests.engine.tiny_llm import PROMPTS, VOCAB, check_empty, save_tiny, tiny_tokenizer
from tests.tiers import EACH_DECODING
from wedlm import LLM, SamplingParams
from wedlm.engine.constraints import grammar as home
from wedlm.engine.constraints.grammar import Grammars, GrammarsBusy, LibraryMatcher
from wedlm.engine.constraints.trial import Cancellation, TrialCancelled, Trials
from wedlm.engine.constraints.trial_worker import Limits

HOSTILE = SamplingParams(**multiples(9973, 9967, 9949, 9941))


def honest(number: int) -> SamplingParams:
    return SamplingParams(json_schema={"type": "object", "properties": {f"p{number}": {"type": "integer"}}})


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A machine with much else to do may need long for a second of processor time."""
    monkeypatch.setattr("wedlm.engine.constraints.trial._MAX_WALL_S", 300.0)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer(), VOCAB)


def test_what_takes_too_long_is_refused_and_remembered(grammars, monkeypatch):
    with pytest.raises(ValueError, match=r"^json_schema is not usable: it takes more than 1 s to compile"):
        grammars.compile(HOSTILE)
    grammars.compile(honest(0))
    monkeypatch.setattr(grammars._trials, "run", None)
    with pytest.raises(ValueError, match="it takes more than 1 s"):
        grammars.compile(HOSTILE)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_what_takes_too_much_memory_is_refused():
    trials = Trials(tiny_tokenizer().backend.to_str(), VOCAB, Limits(seconds=10, megabytes=32))
    many = {"oneOf": [{"const": [i, "x" * 8]} for i in range(1500)]}
    for schema, refusal in ((honest(0).json_schema, None), (json.dumps(many), None)):
        assert trials.run(schema, None, Cancellation())[0] == refusal
    refusal, _ = trials.run(HOSTILE.json_schema, None, Cancellation())
    assert refusal == "it takes more than 32 MB to compile; expected a simpler one"
    assert trials.run(honest(0).json_schema, None, Cancellation())[0] is None
    trials.close()


def test_references_within_references_are_decided_at_once(grammars):
    for count in (2, 4, 6, 12):
        with pytest.raises(ValueError, match=r"oneOf has alternatives that may both hold"):
            grammars.compile(SamplingParams(**nested_references(count)))


def test_the_trial_ends_when_the_caller_leaves(grammars):
    async def leave() -> float:
        task = asyncio.create_task(grammars.compile_ahead(SamplingParams(**multiples(9973, 9967))))
        await asyncio.sleep(0.3)
        assert not task.done()
        started = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not all(thread_is_free(grammars)):
            await asyncio.sleep(0.005)
        return time.monotonic() - started

    grammars.compile(honest(0))
    started = time.monotonic()
    with pytest.raises(ValueError, match="it takes more than 1 s"):
        grammars.compile(SamplingParams(**multiples(9949, 9941)))
    alone = time.monotonic() - started
    assert asyncio.run(leave()) < alone / 2
    assert isinstance(grammars.matcher(honest(1)), LibraryMatcher)


def thread_is_free(grammars: Grammars) -> list[bool]:
    """For each place whether it can be had."""
    had = [grammars._trials._places.acquire(blocking=False) for _ in range(home.NUM_WORKERS)]
    for _ in range(sum(had)):
        grammars._trials._places.release()
    return had


def test_leaving_before_it_has_begun(grammars):
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(TrialCancelled):
        grammars.compile(honest(2), cancellation)
    assert grammars.compile(honest(2)) is grammars.compile(honest(2), cancellation)


def test_leaving_while_the_process_starts(grammars, monkeypatch):
    """It is there for the next one."""
    started, cancellation = [], Cancellation()
    trials = Trials(tiny_tokenizer().backend.to_str(), VOCAB)
    take = trials._take

    def take_long() -> object:
        started.append(take())
        cancellation.cancel()
        return started[-1]

    with monkeypatch.context() as patch:
        patch.setattr(trials, "_take", take_long)
        with pytest.raises(TrialCancelled):
            trials.run(HOSTILE.json_schema, None, cancellation)
    assert trials.run(honest(0).json_schema, None, Cancellation())[0] is None
    assert [started[0]] == trials._idle
    assert started[0].alive
    trials.close()


def test_only_so_many_wait(grammars, monkeypatch):
    monkeypatch.setattr(home, "_MAX_WAITING", 3)

    async def crowd() -> list[object]:
        asked = [grammars.compile_ahead(honest(10 + i)) for i in range(5)]
        return await asyncio.gather(*asked, return_exceptions=True)

    results = asyncio.run(crowd())
    assert [isinstance(one, GrammarsBusy) for one in results] == [False] * 3 + [True] * 2
    assert asyncio.run(crowd())[0] is results[0]


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_process_is_replaced(grammars, busy):
    """Between two trials, or during one."""
    grammars.compile(honest(3))
    worker = grammars._trials._idle[-1]  # the next to be taken
    os.kill(worker.pid, signal.SIGSTOP if busy else signal.SIGKILL)

    async def ask() -> object:
        task = asyncio.create_task(grammars.compile_ahead(honest(4 + busy)))
        while busy and worker in grammars._trials._idle:
            await asyncio.sleep(0.005)
        os.kill(worker.pid, signal.SIGKILL)
        return await task

    if busy:
        assert asyncio.run(ask())
    else:
        worker._process.wait()
        assert grammars.compile(honest(4))


def test_what_somebody_holds_is_found_again(grammars, monkeypatch):
    monkeypatch.setattr(home, "_MAX_KEPT", 2)
    held = grammars.compile(honest(20))
    for i in range(21, 25):
        grammars.compile(honest(i))
    assert len(grammars._kept) == 2
    assert grammars.compile(honest(20)) is held
    matcher = LibraryMatcher(held, VOCAB)
    held = None
    monkeypatch.setattr(grammars._trials, "run", None)
    assert grammars.compile(honest(20)) is matcher._compiled
    del matcher
    gc.collect()
    with pytest.raises(TypeError):
        grammars.compile(honest(20))


def test_what_took_long_is_kept_in_smaller_numbers(grammars, monkeypatch):
    grammars._kept.clear()
    for i in range(30, 34):
        grammars.compile(honest(i)).seconds = 1.3
    assert [key[0] for key in grammars._kept] == [honest(i).json_schema for i in (31, 32, 33)]


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_a_text_whose_steps_cost_too_much_ends(tmp_path, monkeypatch, decoding):
    """In the middle; neighbours have the text that they have alone."""
    llm = LLM(save_tiny(tmp_path), device="cpu")
    free = SamplingParams(max_tokens=40, wedlm_window_size=6)
    (expected,) = llm.generate(PROMPTS[1], free, progress=False)
    bound = SamplingParams(grammar="start: /[a-z ]{90}/", max_tokens=80, decoding=decoding, wedlm_window_size=6)
    charge = LibraryMatcher._charge

    def slowly(self: LibraryMatcher, started: float) -> None:
        charge(self, started - 0.25 if len(self._tokens) > 7 else started)

    monkeypatch.setattr(LibraryMatcher, "_charge", slowly)
    text, neighbour = llm.generate([PROMPTS[0], PROMPTS[1]], [bound, free], progress=False)
    assert text.finish_reason == "length"
    assert 5 < len(text.token_ids) < 40
    assert all(c in "abcdefghijklmnopqrstuvwxyz " for c in text.text)
    assert neighbour.token_ids == expected.token_ids
    check_empty(llm)
