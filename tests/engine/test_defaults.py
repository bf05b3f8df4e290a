# SPDX-License-Identifier: Apache-2.0
"""Every place that has a default of a decoding parameter or of an engine option has the declared one."""

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields

import typer.main

from wedlm.algorithm.params import DecodeParams
from wedlm.cli import app
from wedlm.engine.options import EngineOptions
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.settings import Params
from wedlm.hf.generation import generate

DECODE = {one.name: one.default for one in fields(DecodeParams) if one.default is not MISSING}
# By the names that users see.
DECLARED = {
    **{f"wedlm_{name}": DECODE[name] for name in ("window_size", "entropy_threshold", "draft_entropy")},
    "wedlm_pos_penalty_factor": DECODE["pos_penalty"],
    **{name: DECODE[name] for name in ("temperature", "top_k", "top_p")},
}
OPTIONS = {one.name: one.default for one in fields(EngineOptions)}
OWN = {("Params", "decoding"), ("eval", "decoding")}  # an evaluation is of verified decoding unless it says otherwise
SHORT = {
    "window_size": "wedlm_window_size",
    "entropy_threshold": "wedlm_entropy_threshold",
    "draft_entropy": "wedlm_draft_entropy",
    "pos_penalty": "wedlm_pos_penalty_factor",
}


def command_defaults() -> Iterator[tuple[str, str, object]]:
    """(command, option, default) of the whole command line."""
    for name, command in typer.main.get_command(app).commands.items():
        if name in ("train", "bench"):  # whose options of these names are a trainer's, or a benchmark's own
            continue
        for parameter in command.params:
            yield name, str(parameter.name), parameter.default


def places() -> Iterator[tuple[str, str, object]]:
    """(place, name of a parameter, default)."""
    for owner in (SamplingParams, EngineOptions, Params):
        yield from ((owner.__name__, one.name, one.default) for one in fields(owner))
    for name, parameter in inspect.signature(generate).parameters.items():
        yield "hf generate", name, parameter.default
    yield from command_defaults()


def same(value: object, declared: object) -> bool:
    if value in (None, MISSING, inspect.Parameter.empty):
        return True  # filled in later, from what is declared
    return str(value) == str(declared) or value == declared


def test_defaults_are_the_declared_ones():
    declared = {**OPTIONS, **DECLARED}
    others = [
        f"{place} has {name}={value!r}; expected {declared[full]!r}"
        for place, name, value in places()
        if (full := SHORT.get(name, name)) in declared and (place, name) not in OWN and not same(value, declared[full])
    ]
    assert not others


def test_the_comparison_sees_something():
    seen = {(place, SHORT.get(name, name)) for place, name, value in places() if value is not None}
    assert {("hf generate", "wedlm_draft_entropy"), ("SamplingParams", "wedlm_draft_entropy")} <= seen
    assert {("generate", "wedlm_draft_entropy"), ("serve", "max_num_seqs")} <= seen
    assert not same(1.5, DECLARED["wedlm_draft_entropy"])
