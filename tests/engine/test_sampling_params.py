# SPDX-License-Identifier: Apache-2.0
"""Every value that cannot be meant is refused where it is written, in one sentence that names field and value."""

import dataclasses
import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from wedlm.engine.sampling_params import SamplingParams

NAN, INF, HUGE = math.nan, math.inf, 10**400
NUMBERS = ("temperature", "top_p", "wedlm_entropy_threshold", "wedlm_pos_penalty_factor", "wedlm_draft_entropy")
INTEGERS = ("top_k", "max_tokens", "min_tokens", "seed", "logprobs", "wedlm_window_size", "wedlm_lookup_drafts")
INVALID: list[tuple[str, Any]] = [
    *((name, value) for name in NUMBERS for value in (NAN, -0.1, -1, -INF, True, "0.5", "nan", [0.5], (), 1j, HUGE)),
    *((name, value) for name in INTEGERS for value in (0.5, 1.0, NAN, True, False, "1", [1], 2**63)),
    *((name, None) for name in ("temperature", "top_p", "top_k", "max_tokens", "min_tokens", "ignore_eos")),
    *((name, None) for name in ("wedlm_pos_penalty_factor", "wedlm_draft_entropy")),
    ("temperature", INF),
    ("temperature", 1e39),  # infinite in float32: dividing -inf logits by it gives nan
    ("wedlm_pos_penalty_factor", INF),  # times a distance of 0 it is nan: no position would ever be filled
    ("wedlm_pos_penalty_factor", 1e300),
    ("top_p", 0),
    ("top_p", 0.0),
    ("top_p", 1.0001),
    ("top_k", -2),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("logprobs", -1),
    ("logprobs", 21),
    ("seed", -(2**63) - 1),
    ("wedlm_window_size", 0),
    ("wedlm_window_size", -4),
    ("decoding", "greedy"),
    ("decoding", "Streaming"),
    ("decoding", ""),
    ("decoding", 1),
    ("decoding", ["streaming"]),
    ("wedlm_next_token", "Causal"),
    ("wedlm_next_token", 1),
    *(("remasking_strategy", value) for value in ("random", "", 1, ["entropy"])),
    *(("confidence_threshold", value) for value in (-0.1, 1.1, NAN, None, "1", True)),
    *(("denoising_steps", value) for value in (0, -1, 1.5, "2", True)),
    *(
        (name, value)
        for name in ("presence_penalty", "frequency_penalty")
        for value in (2.1, -2.1, NAN, None, "1", True)
    ),
    *(("repetition_penalty", value) for value in (0, -1, 101, NAN, None, "1", True)),
    *(("min_p", value) for value in (-0.1, 1.1, NAN, None, True)),
    ("cache_salt", 5),
    ("priority", 0.5),
    ("priority", 2**31),
    ("include_stop_str_in_output", 1),
    ("logit_bias", [1]),
    ("logit_bias", 5),
    ("json_schema", "no JSON"),
    ("json_schema", "[]"),
    ("json_schema", 3),
    ("json_schema", True),
    ("json_schema", {"a": {1, 2}}),
    ("json_schema", {"a": NAN}),
    ("grammar", ""),
    ("grammar", 5),
    ("ignore_eos", "no"),
    ("ignore_eos", 1),
]
# What the message shows is the offending entry.
INVALID_ENTRIES: list[tuple[str, Any, Any]] = [
    ("stop", "", ""),
    ("stop", ["ok", ""], ""),
    ("stop", ["ok", 3], 3),
    ("stop", [None], None),
    ("stop", 3, 3),
    ("stop", 0, 0),
    ("stop", True, True),
    ("stop", b"end", b"end"),
    ("stop", {"end": 1}, {"end": 1}),
    ("stop_token_ids", [-1], -1),
    ("logit_bias", {-1: 5}, -1),
    ("logit_bias", {"a": 5}, "a"),
    ("stop_token_ids", [1, True], True),
    ("stop_token_ids", [1, "2"], "2"),
    ("stop_token_ids", [1.0], 1.0),
    ("stop_token_ids", 7, 7),
    ("suffix_token_ids", [3, -1], -1),
    ("suffix_token_ids", "end", "end"),
    ("stop_token_ids", "7", "7"),
    ("stop_token_ids", False, False),
]


def check_sentence(error: Exception, name: str, value: Any) -> None:
    """``name is value; expected …``: one line, one sentence."""
    message = str(error)
    assert re.match(rf"{name} (is|contains) {re.escape(repr(value))}; expected ", message), message
    assert "\n" not in message
    assert not re.search(r"\.\s", message), message
    assert len(message) < 150 + len(repr(value))


@pytest.mark.parametrize(("name", "value"), INVALID, ids=lambda v: str(v)[:12])
def test_invalid_value(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    check_sentence(caught.value, name, value)


@pytest.mark.parametrize(("name", "value", "shown"), INVALID_ENTRIES, ids=str)
def test_invalid_entry(name, value, shown):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    check_sentence(caught.value, name, shown)


def test_every_field_has_a_test():
    assert {name for name, *_ in [*INVALID, *INVALID_ENTRIES]} == {f.name for f in dataclasses.fields(SamplingParams)}


def test_more_tokens_required_than_allowed():
    with pytest.raises(ValueError, match=r"^min_tokens is 6; expected at most max_tokens, 5$"):
        SamplingParams(min_tokens=6, max_tokens=5)
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5


def test_unknown_option_is_an_error():
    """The original implementation drops unknown options without a word."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperatur'"):
        SamplingParams(temperatur=0.5)
    with pytest.raises(TypeError):
        SamplingParams(*[None] * 9)  # the eight of the original by position, all others by name only


def test_frozen():
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.max_tokens = 3


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.int32(-1)},
        {"temperature": Fraction(1, 2)},
        {"temperature": 1e-300},
        {"top_k": -1},
        {"top_k": 0},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"logprobs": 0},
        {"logprobs": 20},
        {"stop": None},
        {"stop": ()},
        {"stop_token_ids": ()},
        {"wedlm_entropy_threshold": None},
        {"wedlm_entropy_threshold": 0},
        {"wedlm_entropy_threshold": INF},
        {"wedlm_draft_entropy": INF},
        {"wedlm_lookup_drafts": 0},
        {"wedlm_lookup_drafts": None},
        {"logit_bias": {}},
        {"logit_bias": {3: -100.0, 5: 100.0}},
        {"presence_penalty": -2, "frequency_penalty": 2.0},
        {"repetition_penalty": 0.5, "min_p": 1, "cache_salt": "x", "include_stop_str_in_output": True},
        {"json_schema": '{"type": "object"}'},
        {"grammar": "start: /a/"},
        {"max_tokens": 2**31 - 1},
        *({"decoding": name} for name in (None, "streaming", "verified", "block", "autoregressive")),
    ],
    ids=str,
)
def test_valid_values(values):
    params = SamplingParams(**values)
    for name, value in values.items():
        assert getattr(params, name) == (() if name == "stop" else value)


def test_numbers_are_stored_as_python_numbers():
    """A NumPy or Fraction value that passes the check must not fail later, in the tensors of a running batch."""
    params = SamplingParams(
        temperature=Fraction(1, 2), top_p=np.float32(0.5), top_k=np.int64(3), stop_token_ids=[np.int8(3)]
    )
    assert type(params.temperature) is float
    assert type(params.top_p) is float
    assert type(params.top_k) is int
    assert [type(token) for token in params.stop_token_ids] == [int]


def test_constraints_have_bounds():
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"items": deep}
    long = {"enum": ["x" * 70_000]}
    endless: dict[str, Any] = {}
    endless["items"] = endless
    for values, sentence in (
        ({"json_schema": deep}, "json_schema is nested more than 64 deep; expected at most that"),
        ({"json_schema": long}, "json_schema has 70014 characters; expected at most 65536"),
        ({"grammar": "x" * 70_000}, "grammar has 70000 characters; expected at most 65536"),
        ({"json_schema": endless}, "json_schema is nested more than 64 deep"),
        ({"json_schema": "[" * 100_000}, "json_schema is '[[["),
        ({"json_schema": {}, "grammar": "start: /a/"}, "grammar is set and so is json_schema; expected one of them"),
        ({"logit_bias": {1: 101}}, "logit_bias[1] is 101; expected a number >= -100 and <= 100"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 entries; expected at most 1024"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            SamplingParams(**values)


def test_a_schema_is_kept_as_text_in_its_own_order():
    assert SamplingParams(json_schema={"b": 1, "a": "é"}).json_schema == '{"b": 1, "a": "é"}'


def test_lists_are_copied():
    stop, ids = ["a"], [1]
    params = SamplingParams(stop=stop, stop_token_ids=ids)
    stop.append("b")
    ids.append(2)
    assert params.stop == ("a",)
    assert params.stop_token_ids == (1,)
    assert SamplingParams(stop="end").stop == ("end",)
