# SPDX-License-Identifier: Apache-2.0
"""Hostile schemas and grammars are refused or followed within limits of time and memory; honest ones are followed."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.attack import schemas
from tests.attack.schemas import Options
from tests.engine.tiny_llm import VOCAB, tiny_tokenizer
from wedlm.engine.constraints.grammar import Grammars
from wedlm.engine.sampling_params import SamplingParams

HOSTILE, HONEST = schemas.hostile(), schemas.honest()
# One of each kind of harm, for the tier that everybody runs.
QUICK = [
    "multiples of (9973, 9967, 9949, 9941)",
    "multiples of (999999937,)",
    "nested oneOf 12",
    "doubling allOf",
    "product anyOf",
    "many oneOf",
    "same objects oneOf",
    "same objects anyOf",
    "choices of constants",
    "long constant",
    "properties",
    "deep lists",
    "items 1000000000",
    "length 1000000000",
    "pattern window",
    "pattern any window",
    "pattern powers",
    "pattern parentheses",
    "conjunction of periods",
    "endless reference",
    "half a surrogate",
    "ambiguous",
    "parentheses",
    "doubling rules",
    "complement",
    "noise",
]
REFUSED = ["multiples of (9973, 9967, 9949, 9941)", "nested oneOf 12", "many oneOf", "choices of constants"]
MOST_SECONDS, MOST_BYTES, MOST_GROWTH_BYTES, MOST_STEP_SECONDS = 10, 2**30, 300 * 2**20, 1.0

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")


def memory(process: str, name: str) -> int:
    """Bytes, from /proc; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), 0)


@contextmanager
def peak_of_children() -> Iterator[list[int]]:
    """The most memory that a child of this process held so far, as the one item of a list."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            for listed in Path("/proc/self/task").glob("*/children"):
                try:
                    children = listed.read_text().split()
                except OSError:  # a thread that has ended
                    continue
                peak[0] = max([peak[0], *(memory(child, "VmRSS") for child in children)])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    one = Grammars(tiny_tokenizer(), VOCAB)
    one.compile(SamplingParams(json_schema={}))
    return one


def attack(grammars: Grammars, options: Options) -> dict[str, float | str]:
    """Compile, and follow the grammar along the first tokens that it admits; what that cost."""
    held, started, slowest, steps = memory("self", "VmRSS"), time.monotonic(), 0.0, 0
    with peak_of_children() as peak:
        try:
            matcher = grammars.matcher(SamplingParams(**options))
            refusal = ""
        except ValueError as error:
            refusal = str(error)
        seconds = time.monotonic() - started
    if not refusal:
        before = time.thread_time()
        while steps < 150 and (tokens := matcher.allowed().nonzero()[0]).size and not matcher.failed:
            matcher.advance(int(tokens[steps * 7919 % tokens.size]))
            now = time.thread_time()
            slowest, before, steps = max(slowest, now - before), now, steps + 1
    assert "\n" not in refusal
    assert len(refusal) < 400
    assert seconds < MOST_SECONDS
    assert peak[0] < MOST_BYTES
    assert slowest < MOST_STEP_SECONDS
    growth = memory("self", "VmRSS") - held
    assert growth < MOST_GROWTH_BYTES
    return {"s": seconds, "worker MB": peak[0] / 2**20, "MB": growth / 2**20, "step s": slowest, "refusal": refusal}


@pytest.mark.parametrize("name", QUICK)
def test_hostile(grammars, name):
    figures = attack(grammars, HOSTILE[name])
    assert figures["refusal"] or name not in REFUSED


@pytest.mark.parametrize("name", HONEST)
def test_honest(grammars, name):
    assert attack(grammars, HONEST[name])["refusal"] == ""


def test_constants_take_time_in_proportion(grammars):
    seconds = {}
    for count in (500, 1000, 2000, 3900):
        seconds[count] = attack(grammars, schemas.constants(count))["s"]
    assert seconds[3900] < 1, seconds


@pytest.mark.long
def test_all_of_them(grammars, record_property):
    figures = {name: attack(grammars, options) for name, options in HOSTILE.items()}
    for figure in ("s", "worker MB", "MB", "step s"):
        worst = max(figures, key=lambda name: figures[name][figure])
        record_property(f"worst {figure}", f"{figures[worst][figure]:.3g} ({worst})")
    refused = sum(bool(one["refusal"]) for one in figures.values())
    record_property("hostile", f"{len(figures)}, of which {refused} were refused")
    honest = SamplingParams(json_schema={"type": "object", "properties": {"afterwards": {"type": "integer"}}})
    assert grammars.matcher(honest).allowed().any()
