# SPDX-License-Identifier: Apache-2.0
"""A file of a stranger loads or is refused in one sentence, in bounded time and memory; so do texts of strangers."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import pytest

from tests.attack.files import FOUND, MEMORY_BYTES, SECONDS, Outcome
from tests.model.trained_tokenizers import CHATML, train
from tests.train.chat_data import THINKING
from wedlm.model import Tokenizer

PIECES = [
    "a", " hello", "\n", "<", ">", "|", "<|", "|>", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<s>", "<unk>",
    "<tool>", "system", "assistant\n", "</think>", "<think>", "é", "🙂", "\U000f0000", "{{", "{%", "%}", "\x1b[2J",
    "\0", "你好" * 20, " " * 200, "x" * 500, "<|" * 50, "<|im_end|>" * 30, "e\u0301", "\u202e",
]  # fmt: skip

# Templates that are stopped by the time they take; two more of them are in the fast tier.
UNTIL_THE_CLOCK = tuple(
    f"template: {name}"
    for name in (
        "a recursive loop",
        "long filters",
        "a chain of attributes",
        "a chain of tests",
        "a path of attributes",
    )
)


def run(count: int | str, workers: int) -> list[Outcome]:
    command = [sys.executable, "-m", "tests.attack.files", str(count), str(workers)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]


def harm(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.kind not in ("loaded", "refused")]


@pytest.fixture(scope="module")
def quick() -> list[Outcome]:
    """What an attack found, and some changed files: most of the time is the start of the process."""
    return run(
        ",".join([*(f"found {name}" for name in FOUND if name not in UNTIL_THE_CLOCK), "30"]), 2
    )  # 30: one round of all kinds


@pytest.fixture(scope="module")
def found(quick: list[Outcome]) -> dict[str, Outcome]:
    return {outcome.case.removeprefix("found "): outcome for outcome in quick if outcome.case.startswith("found ")}


@pytest.fixture(scope="module")
def found_late() -> dict[str, Outcome]:
    outcomes = run(",".join(f"found {name}" for name in UNTIL_THE_CLOCK), 2)
    return {outcome.case.removeprefix("found "): outcome for outcome in outcomes}


@pytest.mark.parametrize("name", [name for name in FOUND if name not in UNTIL_THE_CLOCK])
def test_what_an_attack_found(name: str, found: dict[str, Outcome]) -> None:
    check_found(name, found)


@pytest.mark.long
@pytest.mark.parametrize("name", UNTIL_THE_CLOCK)
def test_what_ran_until_the_clock(name: str, found_late: dict[str, Outcome]) -> None:
    check_found(name, found_late)


def check_found(name: str, found: dict[str, Outcome]) -> None:
    outcome, message = found[name], FOUND[name][1]
    assert outcome.kind == ("refused" if message else "loaded"), outcome
    assert re.search(message, outcome.detail), outcome
    assert outcome.bytes < 2e8, outcome


def test_some_changed_files(quick: list[Outcome]) -> None:
    outcomes = [outcome for outcome in quick if not outcome.case.startswith("found ")]
    assert len(outcomes) == 30
    assert not harm(outcomes)
    kinds = Counter(outcome.kind for outcome in outcomes)
    assert min(kinds["loaded"], kinds["refused"]) > 5  # neither a loader that takes all, nor files that all are refused


@pytest.mark.long
def test_5000_changed_files(record_property: Any) -> None:
    outcomes = run(5000, 2)
    kinds = Counter(outcome.kind for outcome in outcomes)
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.bytes)
    record_property("outcomes", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    record_property("slowest", f"{slowest.seconds:.2f} s ({slowest.case})")
    record_property("most memory", f"{largest.bytes / 1e6:.0f} MB ({largest.case})")
    assert len(outcomes) == 5000
    assert not harm(outcomes)
    assert slowest.seconds < SECONDS
    assert largest.bytes < MEMORY_BYTES


def strings(count: int) -> tuple[float, int]:
    """``count`` random texts as messages; the longest time in seconds, and how many spelled a control token."""
    rng = random.Random(0)
    tokenizers = [
        Tokenizer(train(kind), {"default": template}) for kind in ("smollm", "qwen2") for template in (CHATML, THINKING)
    ]
    slowest, spelled = 0.0, 0
    for number in range(count):
        one = tokenizers[number % len(tokenizers)]
        contents = ["".join(rng.choices(PIECES, k=rng.randrange(1, 12))) for _ in range(rng.choice([1, 3]))]
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
        start = time.thread_time()
        ids = one.encode_chat(messages)
        slowest = max(slowest, time.thread_time() - start)
        controls = [one.decode([token], skip_special_tokens=False) for token in ids if token in one.special_ids]
        assert controls == ["<|im_start|>", "<|im_end|>"] * len(messages) + ["<|im_start|>"], messages
        text = one.apply_chat_template(messages)
        normalised = text if one.backend.normalizer is None else one.backend.normalizer.normalize_str(text)
        assert one.decode(ids, skip_special_tokens=False) == normalised
        plain = one.encode(text, add_special_tokens=False)
        if len([token for token in plain if token in one.special_ids]) == len(controls):
            assert ids == plain
        else:
            spelled += 1
    return slowest, spelled


def test_strings_of_strangers() -> None:
    slowest, spelled = strings(1000)
    assert slowest < 1
    assert 300 < spelled < 1000


@pytest.mark.long
def test_20000_strings_of_strangers(record_property: Any) -> None:
    slowest, spelled = strings(20_000)
    record_property("slowest", f"{slowest * 1000:.0f} ms")
    record_property("texts that spelled a control token", f"{spelled} of 20000")
    assert slowest < SECONDS
