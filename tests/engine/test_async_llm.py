# SPDX-License-Identifier: Apache-2.0
"""The engine's thread: same texts as without it, aborts before the next step, and what follows a fault."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.engine.faulty_runner import FaultyRunner
from tests.engine.tiny_llm import PROMPTS, check_empty
from tests.tiers import EACH_DECODING
from wedlm import LLM, SamplingParams
from wedlm.engine import async_llm as async_engine
from wedlm.engine.async_llm import AsyncEngine
from wedlm.engine.engine import Engine
from wedlm.engine.outputs import StreamPiece
from wedlm.engine.request_stream import EngineFault, EngineStopped, RequestStream


@asynccontextmanager
async def started(llm: LLM, **options: Any) -> AsyncIterator[AsyncEngine]:
    """An engine in its thread; afterwards the LLM has the engine that it ended with."""
    engine = AsyncEngine(llm.engine, llm.blueprint.rebuild, **options)
    try:
        yield engine
    finally:
        await engine.stop()
        assert not engine._thread.is_alive()
        assert engine.num_open == 0
        llm.engine = engine.engine


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def pieces_of(ticket: RequestStream) -> list[list[StreamPiece]]:
    """All pieces, by sequence."""
    pieces: list[list[StreamPiece]] = [[] for _ in ticket.request_ids]
    async for news in ticket:
        for index, piece in news:
            pieces[index].append(piece)
    return pieces


def encoded(llm: LLM, prompt: str, **options: Any) -> tuple[list[int], SamplingParams]:
    return llm.tokenizer.encode(prompt), SamplingParams(**options)


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_pieces_make_up_the_text(llm, decoding):
    options = [{"max_tokens": 20 + i, "decoding": decoding} for i in range(len(PROMPTS))]
    expected = llm.generate(PROMPTS, [SamplingParams(**one) for one in options])

    async def main() -> list[list[StreamPiece]]:
        async with started(llm) as engine:
            ticket = engine.submit([encoded(llm, p, **one) for p, one in zip(PROMPTS, options, strict=True)])
            await ticket.accepted()
            return await pieces_of(ticket)

    for pieces, output in zip(run(main()), expected, strict=True):
        assert "".join(piece.text for piece in pieces) == output.text
        assert "".join(text for piece in pieces for text in piece.token_texts) == output.text
        assert [token for piece in pieces for token in piece.token_ids] == output.token_ids
        assert [piece.step for piece in pieces for _ in piece.token_ids] == output.token_steps
        assert all(len(piece.token_texts) == len(piece.token_ids) for piece in pieces)
        assert [piece.output is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
        last = pieces[-1].output
        assert (last.text, last.finish_reason) == (output.text, output.finish_reason)
    check_empty(llm)


def test_stop_strings_are_never_streamed(llm):
    """Token texts may run ahead of the text, but they begin with it."""
    full = llm.generate("abc", SamplingParams(max_tokens=60))[0].text
    stop = full[10:13]
    expected = llm.generate("abc", SamplingParams(max_tokens=60, stop=stop))[0]

    async def main() -> list[StreamPiece]:
        async with started(llm) as engine:
            return (await pieces_of(engine.submit([encoded(llm, "abc", max_tokens=60, stop=stop)])))[0]

    pieces = run(main())
    assert "".join(piece.text for piece in pieces) == expected.text
    assert pieces[-1].output.finish_reason == "stop"
    assert "".join(text for piece in pieces for text in piece.token_texts).startswith(expected.text)


def test_watching_changes_nothing(llm):
    async def main() -> list[list[StreamPiece]]:
        async with started(llm) as engine:
            tickets = [engine.submit([encoded(llm, "abc", max_tokens=30)], watch=watch) for watch in (True, False)]
            return [(await pieces_of(ticket))[0] for ticket in tickets]

    watched, plain = run(main())
    assert watched[-1].output.token_ids == plain[-1].output.token_ids
    assert len(watched) == watched[-1].output.stats.num_forwards
    assert all(piece.window is not None for piece in watched[:-1])
    assert all(piece.window is None for piece in plain)
    assert len(plain) <= len(watched)


def test_a_submission_is_taken_whole_or_not_at_all(llm):
    async def main() -> None:
        async with started(llm) as engine:
            good = engine.submit([encoded(llm, "abc", max_tokens=10)])
            bad = engine.submit([encoded(llm, "abc"), ([], SamplingParams()), encoded(llm, "x")])
            with pytest.raises(ValueError, match="0 tokens"):
                await bad.accepted()
            with pytest.raises(ValueError, match="0 tokens"):
                await pieces_of(bad)
            assert len((await pieces_of(good))[0][-1].output.token_ids) == 10

    run(main())
    check_empty(llm)


def test_abort_takes_effect_before_the_next_step(llm, monkeypatch):
    """The step in progress is the last that has the request."""
    entered, go_on, batches = threading.Semaphore(0), threading.Semaphore(0), []
    original = llm.engine.runner.run

    def run_slowly(plan: Any) -> Any:
        batches.append({work.request.request_id for work in plan.scheduled})
        entered.release()
        assert go_on.acquire(timeout=30)
        return original(plan)

    monkeypatch.setattr(llm.engine.runner, "run", run_slowly)

    async def main() -> None:
        async with started(llm) as engine:
            gone, kept = (engine.submit([encoded(llm, "abc", max_tokens=40, ignore_eos=True)]) for _ in range(2))
            reader = asyncio.ensure_future(pieces_of(kept))
            for _ in range(3):
                go_on.release()
                await asyncio.to_thread(entered.acquire, timeout=30)
            before = len(batches)  # this step runs now
            gone.abort()
            for _ in range(500):
                go_on.release()
            assert len((await reader)[0][-1].output.token_ids) == 40
            assert gone.request_ids[0] in batches[before - 1]
            assert all(gone.request_ids[0] not in batch for batch in batches[before:])
            assert [piece async for piece in gone if piece[0][1].output is not None] == []

    run(main())
    monkeypatch.undo()
    check_empty(llm)


def test_a_fault_fails_what_ran_and_serves_what_waited(llm, caplog):
    caplog.set_level(logging.CRITICAL, logger="wedlm")
    hold = threading.Event()
    broken = llm.engine
    broken.runner = FaultyRunner(broken, at=2, hold=hold)

    async def main() -> list[StreamPiece]:
        async with started(llm) as engine:
            victims = [engine.submit([encoded(llm, p, max_tokens=40), encoded(llm, "x")]) for p in ("abc", "def")]
            hold.set()
            for victim in victims:
                with pytest.raises(EngineFault):
                    await pieces_of(victim)
            later = engine.submit([encoded(llm, "abc", max_tokens=30)])
            pieces = (await pieces_of(later))[0]
            assert (engine.state, engine.num_faults, engine.num_restarts) == ("running", 1, 1)
            assert engine.engine is not broken
            return pieces

    text = run(main())[-1].output.text
    assert llm.engine is not broken
    assert text == llm.generate("abc", SamplingParams(max_tokens=30))[0].text
    check_empty(llm)


def test_what_was_queued_during_a_fault_is_served_by_the_new_engine(llm):
    hold = threading.Event()
    llm.engine.runner = FaultyRunner(llm.engine, at=0, hold=hold)

    async def main() -> None:
        async with started(llm) as engine:
            victim = engine.submit([encoded(llm, "abc")])
            while not engine._live:
                await asyncio.sleep(0.01)  # the step has begun, and waits
            queued = engine.submit([encoded(llm, "xyz", max_tokens=12)])
            hold.set()
            with pytest.raises(EngineFault):
                await pieces_of(victim)
            assert len((await pieces_of(queued))[0][-1].output.token_ids) == 12

    run(main())
    check_empty(llm)


def test_a_fault_while_adding(llm, monkeypatch):
    """An exception other than a refusal leaves the engine in an unknown state, too."""
    monkeypatch.setattr(llm.engine.scheduler, "add", lambda request: 1 / 0)

    async def main() -> None:
        async with started(llm) as engine:
            with pytest.raises(EngineFault):
                await engine.submit([encoded(llm, "abc")]).accepted()
            assert (await pieces_of(engine.submit([encoded(llm, "abc", max_tokens=3)])))[0][-1].output is not None
            assert engine.num_restarts == 1

    run(main())


def test_an_engine_beyond_repair(llm, monkeypatch):
    """Neither what ran nor what waits is lost silently, and nothing new is taken."""
    monkeypatch.setattr(async_engine, "MAX_RESTARTS", 3)
    working, attempts = llm.engine, []

    def broken_again(broken: Engine) -> Engine:
        attempts.append(broken)
        engine = llm.blueprint.rebuild(working)
        engine.runner = FaultyRunner(engine, at=0)
        return engine

    async def main() -> None:
        hold = threading.Event()
        broken = llm.blueprint.rebuild(working)
        broken.runner = FaultyRunner(broken, at=0, hold=hold)
        engine = AsyncEngine(broken, broken_again, first_retry_s=0.01)
        victim = engine.submit([encoded(llm, "abc")])
        while not engine._live:
            await asyncio.sleep(0.01)
        queued = engine.submit([encoded(llm, "abc")])
        hold.set()
        with pytest.raises(EngineFault):
            await pieces_of(victim)
        with pytest.raises(EngineStopped):
            await pieces_of(queued)
        with pytest.raises(EngineStopped):
            engine.submit([encoded(llm, "abc")])
        assert (engine.state, engine.num_open, len(attempts)) == ("dead", 0, 3)
        await engine.stop()

    run(main())


def test_stop_fails_what_is_open(llm):
    async def main() -> None:
        async with started(llm) as engine:
            ticket = engine.submit([encoded(llm, "abc", max_tokens=100, ignore_eos=True)])
            await ticket.accepted()
            await engine.stop()
            with pytest.raises(EngineStopped):
                await pieces_of(ticket)
            with pytest.raises(EngineStopped):
                engine.submit([encoded(llm, "abc")])
            assert engine.state == "stopped"
            ticket.abort()  # harmless

    run(main())
    check_empty(llm)


def test_the_engine_must_be_its_own(llm):
    async def main() -> None:
        with pytest.raises(ValueError, match="1 requests"):
            AsyncEngine(llm.engine, llm.blueprint.rebuild)

    llm.engine.add("other", [1], SamplingParams())
    try:
        run(main())
    finally:
        llm.abort()
