# SPDX-License-Identifier: Apache-2.0
"""Functions in answers: written cases with whether what a person would copy out passes the tests."""

import json
from pathlib import Path

import pytest

from tests.evaluate.programs import runs
from wedlm.evaluate.function_source import Block, called_name, fenced_blocks, function_source

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "cases" / "code.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_there_are_enough_cases():
    assert len(CASES) >= 200
    assert len({case["shape"] for case in CASES}) >= 10


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["shape"])
def test_a_function_is_what_a_person_copies(case):
    source = function_source(case["output"], case["name"], case["prompt"])
    assert runs("\n".join([source, *case["tests"]])) is case["right"], source


def test_blocks():
    text = "a\n```Python3\r\nx = 1\n```\nb\n~~~~\n~~~\n~~~~\n```java\nint x;\n"
    assert list(fenced_blocks(text.replace("\r", ""))) == [
        Block("python", "x = 1\n"),
        Block("", "~~~\n"),
        Block("java", "int x;\n\n"),
    ]


def test_the_function_that_assertions_are_about():
    assert called_name(["assert set(f((1, 2))) == set((2, 1))"]) == "f"
    assert called_name(["x =", "assert not g(1)"]) == "g"
    assert called_name(["assert True"]) is None
    assert function_source("```python\nx = 1\n```", None) == "x = 1\n"


@pytest.mark.parametrize(
    "piece", ["```\n", "~~~\n```\n", "def f(a): return 1\n", "    x\n", "(", ">>> a\n", "'''\n", "f "]
)
@pytest.mark.parametrize("prompt", ["", "def f(a):\n"])
def test_a_long_answer_takes_time_by_its_length(piece, prompt):
    function_source(piece * (50_000 // len(piece)), "f", prompt)  # minutes if it took the square
