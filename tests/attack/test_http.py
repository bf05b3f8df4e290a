# SPDX-License-Identifier: Apache-2.0
"""Hostile requests against a server that is a process of its own: it answers others meanwhile, stays within its memory,
forgets who has left, and ends when it is told to."""

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.attack.cases import KINDS, Case, all_cases
from tests.attack.victim import END_S, Victim, serving_process
from tests.engine.tiny_llm import save_tiny
from tests.server.running import wait_until

CASE_S = 60.0  # of which most is generation that was asked for
TEXT_S = 2.0
HEALTH_S = 0.05
MEMORY_BYTES = 10**9
FORGOTTEN_S = 1.0
_REST_S, _SHORT_REST_S = 0.3, 0.1  # after each case, in which what it left behind still shows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Long enough for long answers."""
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)


@pytest.fixture(scope="module")
def victim(model) -> Iterator[Victim]:
    with serving_process(model, "--request-timeout", "120", "--header-timeout", "2") as victim:
        time.sleep(1)
        yield victim
        victim.end()
        victim.check_log()


def attack(victim: Victim, cases: list[Case], rest: float = _REST_S) -> list[tuple[str, float, float, int, float]]:
    """Name, seconds, seconds until nothing of it was left, most memory beyond that before, and the time of /health at
    99 %, of each."""
    rows = []
    for case in cases:
        before, start = victim.memory, time.monotonic()
        case.act(victim)
        seconds = time.monotonic() - start
        wait_until(victim.idle, seconds=20)
        forgotten = time.monotonic() - start - seconds
        time.sleep(rest)
        seen = victim.seen(start, time.monotonic())
        rows.append((case.name, seconds, forgotten, max(seen.memory, default=before) - before, seen.percentile(0.99)))
        assert victim.process.poll() is None, case.name
    return rows


def describe(record: Callable[[str, object], None], victim: Victim, kind: str, rows: list, start: float) -> None:
    """The figures of a kind, and how they compare with what was promised."""
    seen = victim.seen(start, time.monotonic())
    slowest, heaviest, stayed = (max(rows, key=lambda row, i=i: row[i]) for i in (1, 3, 2))
    record("cases", len(rows))
    record("slowest", f"{slowest[1]:.1f} s ({slowest[0]})")
    record("most memory", f"+{heaviest[3] / 1e6:.0f} MB ({heaviest[0]})")
    record("longest after its end", f"{stayed[2]:.2f} s ({stayed[0]})")
    shares = ", ".join(f"{seen.percentile(share) * 1e3:.1f}" for share in (0.5, 0.9, 0.99))
    record("/health at 50, 90, 99 %", f"{shares} ms of {len(seen.health)}, most {max(seen.health) * 1e3:.0f} ms")
    worst = ", ".join(f"{row[4] * 1e3:.0f} ms ({row[0]})" for row in sorted(rows, key=lambda row: -row[4])[:3])
    record("worst cases of /health at 99 %", worst)
    record("cases beyond 50 ms", sum(row[4] > HEALTH_S for row in rows))
    texts = [seconds for seconds, _ in seen.texts]
    record("texts", f"{len(texts)}, median {statistics.median(texts):.2f} s, slowest {max(texts):.2f} s")
    assert not seen.troubles, seen.troubles[:5]


def check(victim: Victim, rows: list, start: float) -> None:
    """All but the time of /health, which a busy machine decides, too."""
    seen = victim.seen(start, time.monotonic())
    assert max(row[3] for row in rows) < MEMORY_BYTES
    assert max(row[1] for row in rows) < CASE_S
    assert len({text for _, text in seen.texts}) == 1, {text for _, text in seen.texts}


def test_a_few_of_each_kind(model, victim, record_property):
    """The part of the suite that every run of the tests has."""
    time.sleep(0.5)
    start = time.monotonic()
    cases = [case for case in all_cases(victim.model) if case.quick and case.kind != "schemas"]
    rows = attack(victim, cases, _SHORT_REST_S)
    describe(record_property, victim, "quick", rows, start)
    check(victim, rows, start)
    assert victim.seen(start, time.monotonic()).percentile(0.9) < 0.5  # a machine of two cores may be very busy


@pytest.mark.long
def test_the_machine_alone(victim, record_property):
    """What /health takes while nothing is sent: what the other figures are to be compared with."""
    start = time.monotonic()
    time.sleep(30)
    describe(record_property, victim, "idle", [("nothing", 0.0, 0.0, 0, 0.0)], start)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_kind(victim, record_property, kind):
    start = time.monotonic()
    rows = attack(victim, [case for case in all_cases(victim.model) if case.kind == kind])
    describe(record_property, victim, kind, rows, start)
    check(victim, rows, start)
    if kind == "leavers":
        assert max(row[2] for row in rows) < FORGOTTEN_S
    seen = victim.seen(start, time.monotonic())
    assert seen.slowest_text < TEXT_S
    assert seen.percentile(0.99) < HEALTH_S


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_in_the_middle(model, record_property, kind):
    """SIGTERM while cases of a kind are at work: the process ends within its grace, and says nothing but JSON."""
    with serving_process(model, "--header-timeout", "2", probed=False) as victim:
        cases = [case for case in all_cases(victim.model) if case.kind == kind][:: 3 if kind != "answers" else 1]

        def run(case: Case) -> None:
            with contextlib.suppress(Exception):  # the server is gone
                case.act(victim)

        threads = [threading.Thread(target=run, args=(case,), daemon=True) for case in cases[:24]]
        for thread in threads:
            thread.start()
        time.sleep(1.5)
        took = victim.end()
        record_property("seconds from SIGTERM to the end", f"{took:.1f}")
        victim.check_log()
        assert took < END_S
        for thread in threads:
            thread.join(90)
