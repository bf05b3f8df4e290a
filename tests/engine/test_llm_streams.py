# SPDX-License-Identifier: Apache-2.0
"""Streams, threads and interrupts: whatever happens to a request, the others and the engine go on."""

import signal
import threading
import time
from collections.abc import Callable

import pytest

from tests.engine.tiny_llm import END, PROMPTS, alone, check_empty
from tests.tiers import EACH_DECODING
from wedlm.algorithm.params import DECODINGS
from wedlm.engine.llm import LLM
from wedlm.engine.request import Request
from wedlm.engine.sampling_params import SamplingParams

SHORT = SamplingParams(max_tokens=12)


@pytest.fixture
def llm(directory) -> LLM:
    """A new one for each test, since some break it on purpose."""
    return LLM(directory, device="cpu")


def in_threads(tasks: list[Callable[[], object]]) -> None:
    """Run all at the same time; the first error is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(tasks))

    def run(task: Callable[[], object]) -> None:
        barrier.wait()
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("decoding", EACH_DECODING)
@pytest.mark.parametrize("prompt", ["Hello", "é caf"])
def test_pieces_make_up_the_output(llm, decoding, prompt):
    params = SamplingParams(decoding=decoding, max_tokens=40, temperature=1.0, seed=2, stop=["~~~", "qqq"])
    expected = alone(llm, prompt, params)
    pieces = list(llm.generate_stream(prompt, params))
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
    if decoding != "auto":  # whose steps depend on the load
        assert [piece.step for piece in pieces for _ in piece.token_ids] == expected.token_steps
    assert [piece.output is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    output = pieces[-1].output
    assert (output.text, output.token_ids, output.finish_reason) == (
        expected.text,
        expected.token_ids,
        expected.finish_reason,
    )
    assert len(pieces) >= 3
    check_empty(llm)


def test_an_impossible_stream_fails_at_once(llm):
    for prompt in ("", [9999], 5, None, (1, 2)):
        with pytest.raises(ValueError, match="prompt"):
            llm.generate_stream(prompt)
    check_empty(llm)


@pytest.mark.parametrize("num_read", [0, 1, 3])
def test_closing_a_stream_frees_everything(llm, num_read):
    expected = alone(llm, "abc", SHORT).text
    stream = llm.generate_stream("Hello", SamplingParams(max_tokens=80, ignore_eos=True))
    for _ in range(num_read):
        next(stream)
    assert llm.engine.has_work
    stream.close()
    check_empty(llm)
    stream = llm.generate_stream("Hello", SamplingParams(max_tokens=80, ignore_eos=True))
    del stream  # nobody reads it
    check_empty(llm)
    for _ in llm.generate_stream("Hello", SamplingParams(max_tokens=80)):
        break
    check_empty(llm)
    assert alone(llm, "abc", SHORT).text == expected


def test_interleaved_streams(llm):
    """Each advances all; none loses or repeats text."""
    params = [SamplingParams(max_tokens=20 + 3 * i, decoding=DECODINGS[i % 4]) for i in range(len(PROMPTS))]
    expected = [alone(llm, prompt, one).text for prompt, one in zip(PROMPTS, params, strict=True)]
    streams = dict(enumerate(llm.generate_stream(p, one) for p, one in zip(PROMPTS, params, strict=True)))
    texts = [""] * len(PROMPTS)
    turn = 0
    while streams:
        turn += 1
        for i in [i for i in streams if turn % (i + 1) == 0]:
            piece = next(streams[i], None)
            if piece is None:
                del streams[i]
            else:
                texts[i] += piece.text
    assert texts == expected
    check_empty(llm)


def test_threads_share_one_engine(llm):
    """The original implementation's demo steps one engine from several threads without a lock."""
    params = [
        SamplingParams(max_tokens=25, decoding=DECODINGS[i % 4], temperature=i % 2, seed=i) for i in range(len(PROMPTS))
    ]
    expected = [alone(llm, prompt, one).token_ids for prompt, one in zip(PROMPTS, params, strict=True)]

    def generate(i: int) -> None:
        for _ in range(2):
            (output,) = llm.generate(PROMPTS[i], params[i])
            assert output.token_ids == expected[i]

    in_threads([lambda i=i: generate(i) for i in range(len(PROMPTS))])
    check_empty(llm)


def test_streams_in_threads_never_see_half_a_step(llm, monkeypatch):
    """A stream reads tokens, text and the reason of the end: no other thread's step may fall in between."""
    params = SamplingParams(max_tokens=10, decoding="autoregressive", stop=["zq"], ignore_eos=True)
    expected = [alone(llm, prompt, params) for prompt in PROMPTS]
    output_token_ids = Request.output_token_ids.fget

    def slow(request):
        ids = output_token_ids(request)
        time.sleep(4e-3)  # time enough for a step of another thread
        return ids

    monkeypatch.setattr(Request, "output_token_ids", property(slow))

    def read(i: int) -> None:
        pieces = list(llm.generate_stream(PROMPTS[i], params))
        assert "".join(piece.text for piece in pieces) == expected[i].text == pieces[-1].output.text
        assert [token for piece in pieces for token in piece.token_ids] == expected[i].token_ids

    for _ in range(3):
        in_threads([lambda i=i: read(i) for i in range(len(PROMPTS))])
    check_empty(llm)


def test_threads_abort_beside_others(llm):
    expected = alone(llm, "Hello", SamplingParams(max_tokens=40)).text

    def abort_many() -> None:
        for i in range(6):
            stream = llm.generate_stream(PROMPTS[i % 6], SamplingParams(max_tokens=50, seed=i, temperature=1.0))
            for _ in range(i % 4):
                next(stream, None)
            stream.close()

    def generate() -> None:
        for _ in range(2):
            assert llm.generate("Hello", SamplingParams(max_tokens=40))[0].text == expected

    in_threads([abort_many, generate, abort_many, generate])
    check_empty(llm)


@pytest.mark.parametrize("error", [KeyboardInterrupt, pytest.param(RuntimeError, marks=pytest.mark.long)])
@pytest.mark.parametrize("place", ["engine.step", "engine.runner.run", "engine._deliver", "engine.scheduler.schedule"])
def test_an_interrupt_leaves_the_engine_usable_and_empty(llm, monkeypatch, place, error):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = [output.text for output in llm.generate(PROMPTS, params)]
    *path, name = place.split(".")
    owner = llm
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error("now")
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(error, match="now"):
        llm.generate(PROMPTS, params)
    check_empty(llm)
    calls = 0
    with pytest.raises(error, match="now"):
        list(llm.generate_stream(PROMPTS[2], params))
    check_empty(llm)
    assert [output.text for output in llm.generate(PROMPTS, params)] == expected
    check_empty(llm)


def test_an_interrupt_does_not_harm_a_neighbours_text(llm, monkeypatch):
    """A thread's request goes on when the main thread, whose turn it was to step, is interrupted."""
    params = SamplingParams(max_tokens=30, ignore_eos=True, decoding="autoregressive")
    expected = alone(llm, "Hello", params)
    stream = llm.generate_stream("Hello", params)
    pieces = [next(stream) for _ in range(3)]
    deliver = llm.engine._deliver

    def interrupted(*args):
        monkeypatch.setattr(llm.engine, "_deliver", deliver)
        signal.raise_signal(signal.SIGINT)
        deliver(*args)

    monkeypatch.setattr(llm.engine, "_deliver", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("abc", params)
    pieces += stream
    assert "".join(piece.text for piece in pieces) == expected.text


def test_an_interrupt_while_a_request_is_admitted(llm, monkeypatch):
    """Its first pages are those that an earlier request left in the prefix cache."""
    prompt = "The quick brown fox jumps over the lazy dog."
    alone(llm, prompt, SHORT)
    reserve = llm.engine.pool.reserve

    def interrupted(*args):
        monkeypatch.setattr(llm.engine.pool, "reserve", reserve)
        signal.raise_signal(signal.SIGINT)
        return reserve(*args)

    monkeypatch.setattr(llm.engine.pool, "reserve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompt, SHORT)
    check_empty(llm)


def test_a_busy_neighbour_does_not_starve_a_stream(llm):
    """While one thread steps on and on, another's pieces must arrive as they are made."""
    busy = SamplingParams(max_tokens=100, ignore_eos=True, decoding="autoregressive")
    arrivals: list[float] = []
    ended: list[float] = []

    def generate() -> None:
        llm.generate(["Hello"] * 8, busy)
        ended.append(time.perf_counter())

    def read() -> None:
        params = SamplingParams(max_tokens=20, ignore_eos=True, decoding="autoregressive")
        arrivals.extend(time.perf_counter() for _ in llm.generate_stream("abc", params))

    in_threads([generate, read])
    assert len(arrivals) >= 5  # not all at once, after the neighbour
    assert arrivals[-1] < ended[0]


def test_end_token_in_a_stream(llm):
    """The end token is in the ids and not in the text, and a text that ends with it is not held back."""
    free = alone(llm, "Hello", SamplingParams(max_tokens=30, ignore_eos=True, decoding="autoregressive"))
    params = SamplingParams(
        stop_token_ids=[free.token_ids[4]], stop=[free.text[:2] + "never"], decoding="autoregressive"
    )
    pieces = list(llm.generate_stream("Hello", params))
    output = pieces[-1].output
    assert output.finish_reason == "stop"
    assert "".join(piece.text for piece in pieces) == output.text == llm.tokenizer.decode(output.token_ids[:-1])
    assert END not in output.token_ids


def test_a_stream_closed_by_the_garbage_collector_inside_a_step(llm, monkeypatch):
    """A generator that is collected while its own thread holds the engine's lock must not wait for that lock."""
    stream = llm.generate_stream("abc")
    step = llm.engine.step
    holder = [stream]
    del stream

    def collecting():
        holder.clear()  # what a collection of cyclic garbage does, at any allocation
        return step()

    monkeypatch.setattr(llm.engine, "step", collecting)
    in_threads([lambda: llm.generate("Hello", SamplingParams(max_tokens=3))])
    check_empty(llm)


def test_abort_ends_every_stream(llm):
    streams = [llm.generate_stream(prompt, SamplingParams(max_tokens=60, ignore_eos=True)) for prompt in PROMPTS]
    for stream in streams:
        next(stream)
    llm.abort()
    for stream in streams:
        assert list(stream)[-1].output.finish_reason == "abort"
    check_empty(llm)
