# SPDX-License-Identifier: Apache-2.0
"""The default mixture: different prompts, the same for the same seed, held-out topics of their own."""

import json
from importlib.resources import files

import pytest

from wedlm.accelerate.mixture import mixture

CONTENT = json.loads(files("wedlm.accelerate").joinpath("mixture.json").read_text(encoding="utf-8"))


def test_prompts_are_different_and_repeatable():
    training, held_out = mixture(2000, 64, seed=0)
    assert (len(set(training)), len(set(held_out))) == (2000, 64)
    assert not set(training) & set(held_out)
    assert mixture(2000, 64, seed=0) == (training, held_out)
    assert mixture(2000, 64, seed=1)[0] != training
    assert not [prompt for prompt in training + held_out if "{" in prompt]


def test_held_out_topics_are_not_trained_on():
    training, held_out = mixture(2000, 64, seed=0)
    topics = [topic for kind in ("questions", "code", "letters", "stories") for topic in CONTENT[kind]["fillers"][7::8]]
    assert sum(any(topic in prompt for topic in topics) for prompt in held_out) >= 20
    named = [topic for topic in topics if f" {topic}" not in " ".join(set(CONTENT["questions"]["fillers"]) - {topic})]
    for prompt in training:
        assert not any(f"{topic}." in prompt or f"{topic}?" in prompt for topic in named if len(topic) > 12), prompt


def test_each_kind_has_its_share():
    training, _ = mixture(1000, 8, seed=0)
    code = [prompt for prompt in training if any(filler in prompt for filler in CONTENT["code"]["fillers"])]
    assert 95 <= len(code) <= 130


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match="200000 prompts are asked for; expected at most"):
        mixture(200_000, 8, seed=0)
