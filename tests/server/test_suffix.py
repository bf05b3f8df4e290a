# SPDX-License-Identifier: Apache-2.0
"""``suffix`` of a completion: text that stands after the answer, which fills the gap before it."""

import pytest

from tests.server.asking import check_error
from tests.server.running import events
from wedlm import SamplingParams

TEXT = "/v1/completions"
BODY = {"prompt": "The quick brown", "suffix": " jumps over", "temperature": 0, "max_tokens": 9, "ignore_eos": True}
GAP = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def filled(reference):
    return reference.infill(BODY["prompt"], BODY["suffix"], GAP)[0]


def test_the_gap_is_filled(running, client, filled):
    answer = running.post(TEXT, BODY).json()
    assert answer["choices"][0]["text"] == filled.text
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(BODY["prompt"] + BODY["suffix"])
    own = {name: value for name, value in BODY.items() if name != "ignore_eos"}
    again = client.completions.create(model="tiny", **own, extra_body={"ignore_eos": True})
    assert again.choices[0].text == filled.text
    assert running.text(**{**BODY, "suffix": None}) == running.text(**{**BODY, "suffix": ""}) != filled.text


def test_it_streams(running, filled):
    chunks = events(running.post(TEXT, {**BODY, "stream": True, "wedlm_trace": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == filled.text
    windows = [chunk["wedlm"]["window"] for chunk in chunks if "window" in chunk["wedlm"]]
    starts = [window["start"] for window in windows]
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert {window["start"] + len(window["token_ids"]) for window in windows} == {9}, "the window ends with the gap"


def test_several_prompts_and_choices(running, reference):
    body = {**BODY, "prompt": ["a", "The quick brown"], "n": 2, "seed": 5, "temperature": 1, "logprobs": 1}
    choices = running.post(TEXT, body).json()["choices"]
    for index, choice in enumerate(choices):
        params = SamplingParams(max_tokens=9, temperature=1.0, seed=5 + index % 2, ignore_eos=True)
        expected = reference.infill(body["prompt"][index // 2], BODY["suffix"], params)[0]
        assert choice["text"] == expected.text
        assert len(choice["logprobs"]["tokens"]) == 9
    assert len(choices) == 4


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"decoding": "verified"}, "decoding", "which sees no suffix; expected streaming or block"),
        ({"decoding": "auto"}, "decoding", "which sees no suffix; expected streaming or block"),
        ({"echo": True}, "echo", "echo is set with suffix; expected one of them"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "prompt_logprobs is set with suffix; expected one of them"),
        ({"max_tokens": 200}, "max_tokens", "the length of a gap between 15 and 11 tokens; expected at most 102"),
        ({"suffix": "x" * 200}, "prompt", "the prompt and its suffix have 215 tokens; expected at most 127"),
        ({"suffix": ["x"]}, "suffix", "suffix"),
    ],
    ids=str,
)
def test_refusals(running, fields, param, said):
    error = check_error(running.post(TEXT, {**BODY, **fields}))
    assert error["param"] == param
    assert said in error["message"]
