# SPDX-License-Identifier: Apache-2.0
"""The default mixture of prompts, made from templates and fillers that were written for this package (``mixture.json``,
Apache-2.0).

It has ten kinds of requests, in equal parts as long as a kind has enough different ones: questions, code, letters,
stories, instructions, lists, work on a sentence, sums, sequences, records. It represents everyday use only roughly.
"""

import json
import random
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

_HELD_OUT_EVERY = 8  # of a kind's fillers, so that what is held out has topics of its own
_TRIES = 100  # numbers drawn for one prompt until it is a new one


def mixture(num_training: int, num_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """(training prompts, held-out prompts), all different; no filler is in both. Raises ValueError if there are too
    few."""
    content = json.loads(files("wedlm.accelerate").joinpath("mixture.json").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    return tuple(
        _take(content, held_out, count, rng) for held_out, count in ((False, num_training), (True, num_held_out))
    )  # type: ignore[return-value]


def _take(content: dict[str, Any], held_out: bool, count: int, rng: random.Random) -> list[str]:
    """Take one prompt of each kind in turn, until there are ``count``."""
    kinds = [_prompts(content, kind, held_out, rng) for kind, value in content.items() if isinstance(value, dict)]
    found: dict[str, None] = {}
    while kinds and len(found) < count:
        for kind in list(kinds):
            prompt = next((one for one in kind if one not in found), None)
            if prompt is None:
                kinds.remove(kind)
            elif len(found) < count:
                found[prompt] = None
    if len(found) < count:
        raise ValueError(
            f"{count} {'held-out ' if held_out else ''}prompts are asked for; expected at most {len(found)}, all that "
            "the default mixture has, or --prompts with your own"
        )
    return list(found)


def _prompts(content: dict[str, Any], kind: str, held_out: bool, rng: random.Random) -> Iterator[str]:
    """All prompts of a kind in a random order; those that contain numbers repeat with different numbers."""
    fillers = [f for i, f in enumerate(content[kind]["fillers"]) if (i % _HELD_OUT_EVERY == 7) == held_out]
    pairs = [template.replace("{x}", filler) for template in content[kind]["templates"] for filler in fillers]
    has_numbers = any("{" in pair for pair in pairs)
    for _ in range(_TRIES if has_numbers else 1):
        rng.shuffle(pairs)
        for pair in pairs:
            yield _with_numbers(pair, content, rng)


def _with_numbers(pattern: str, content: dict[str, Any], rng: random.Random) -> str:
    if "{a}" not in pattern and "{b}" not in pattern:
        return pattern
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    words = {"a": str(a), "b": str(b), "c": str(a * b + rng.choice((0, 0, rng.randint(1, a))) + 20)}
    words["name"], words["friend"] = rng.sample(content["names"], 2)
    words["city"], words["other"] = rng.sample(content["cities"], 2)
    for name, word in words.items():
        pattern = pattern.replace(f"{{{name}}}", word)
    return pattern
