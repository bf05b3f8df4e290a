# SPDX-License-Identifier: Apache-2.0
"""Numbers that answers end in: written cases with what a person reads, bounds of time, and boxes."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from wedlm.evaluate.final_number import final_readings, last_box, same_number

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "cases" / "numbers.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_there_are_enough_cases():
    assert len(CASES) >= 200
    assert len({case["shape"] for case in CASES}) >= 10


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["shape"])
def test_a_number_is_what_a_person_reads(case):
    found = final_readings(case["output"])
    person = None if case["person"] is None else Fraction(case["person"])
    assert person in found if person is not None else found == ()
    assert same_number(case["output"], f"So it is.\n#### {case['gold']}") is (person == final_readings(case["gold"])[0])


@pytest.mark.parametrize(
    "piece", ["\\boxed{", "answer is ", "#### ", "1,", "$", "{", "1/", "**1 ", "\\frac{1}", "1 ", "(", "9"]
)
def test_a_long_answer_takes_time_by_its_length(piece):
    final_readings(piece * (100_000 // len(piece)))  # hours if it took the square


def test_last_box_has_closing_braces():
    assert last_box("\\boxed{a{b}c} and \\boxed{d") == "a{b}c"
    assert last_box("\\boxed{a \\{ b}") == "a \\{ b"
    assert last_box("\\boxed{\\boxed{1}}") == "1"
    assert last_box("none") is None
