# SPDX-License-Identifier: Apache-2.0
"""Right answers count as right, wrong ones as wrong; on the sets themselves, their own solutions."""

import importlib.util

import pytest

from tests.evaluate.eval_data import REAL, needs_data
from tests.evaluate.programs import runs
from wedlm.evaluate import code_tasks as code
from wedlm.evaluate.data import load
from wedlm.evaluate.scoring import gsm8k_results, math_equal

needs_sandbox = pytest.mark.skipif(
    importlib.util.find_spec("wedlm.evaluate.sandbox") is None, reason="wedlm.evaluate.sandbox is missing"
)


def test_gsm8k_counts_equal_numbers_only():
    assert gsm8k_results({"answer": "#### 18"}, ["so $18.00"]) == {"exact_match": 1.0}
    assert gsm8k_results({"answer": "#### 18"}, ["so 19"]) == {"exact_match": 0.0}
    assert gsm8k_results({"answer": "#### 18"}, [""]) == {"exact_match": 0.0}


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so \\boxed{\\frac12}", "\\frac{1}{2}", True),
        ("so \\boxed{0.5}", "\\frac{1}{2}", True),
        ("\\boxed{x+1}", "1 + x", True),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", True),
        ("\\boxed{3} no, \\boxed{4}", "4", True),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3, \\pi/2)", True),
        ("\\boxed{(3, \\pi)}", "(3, \\pi/2)", False),
        ("\\boxed{4} no, \\boxed{3}", "4", False),
        ("\\boxed{\\text{Evelyn}}", "\\text{Briana}", False),
        ("", "4", False),
    ],
)
def test_math_equal(text, answer, right):
    assert math_equal(text, answer) is right


def test_programs_take_what_belongs_to_the_answer():
    doc = {
        "prompt": "import math\n\ndef half(x):\n",
        "entry_point": "half",
        "test": "def check(f):\n    assert f(4) == 2",
    }
    answers = {
        "    return x / 2\n\ndef other():\n    1 / 0\nother()": True,
        "Here:\n```python\ndef half(x):\n    return math.floor(x / 2)\n```\nIt halves.": True,
        "```python\n    return x / 2": True,
        "    return x": False,
        "I cannot.": False,
    }
    for text, right in answers.items():
        assert runs(code.humaneval_program(doc, text)) is right, text
    mbpp = {"test_setup_code": "", "test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
    assert runs(code.mbpp_program(mbpp, "\n```python\ndef f(x):\n    return x + 1\n"))
    assert not runs(code.mbpp_program(mbpp, "def f(x):\n    return 2\n"))


def test_plus_compares_with_the_reference_in_a_form_it_accepts():
    doc = {
        "task_id": "Mbpp/1",
        "entry_point": "f",
        "canonical_solution": "def f(x, t):\n    return t + (sum(x) / 3,)",
        "base_input": [[[1, 2], [3]]],
        "plus_input": [[[1], [2, 3]], ["refused", 0]],
        "atol": 0,
    }
    assert runs(code.plus_program(doc, "def f(x, t):\n    return (*t, sum(x) * (1 / 3))"))
    assert not runs(code.plus_program(doc, "def f(x, t):\n    return (3, 1.0)"))
    assert not runs(code.plus_program({**doc, "base_input": [], "plus_input": [["x", 0]]}, doc["canonical_solution"]))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("[x + 1 for x in xs]", True),
        ("[x + 1.0 for x in xs]", True),  # Python's own ==, and EvalPlus's
        ("[x + 1 + 1e-9 for x in xs]", False),
        ("tuple(x + 1 for x in xs)", False),
    ],
)
def test_plus_takes_no_nearby_number_for_an_integer_and_no_tuple_for_a_list(answer, right):
    doc = {
        "task_id": "HumanEval/1000",
        "prompt": "def f(xs):\n",
        "entry_point": "f",
        "canonical_solution": "    return [x + 1 for x in xs]",
        "base_input": [[[1, 2]]],
        "plus_input": [[[]], [[5]]],
        "atol": 0,
    }
    assert runs(code.plus_program(doc, f"    return {answer}\n")) is right


def test_plus_gives_an_input_the_types_that_the_sets_assertions_write():
    doc = {
        "task_id": "Mbpp/1",
        "entry_point": "f",
        "canonical_solution": "def f(t, xs):\n    return t[:1] + tuple(xs)",
        "assertion": "assert f((1, 2), [3]) == (1, 3)",
        "base_input": [[[1, 2], [3]]],
        "plus_input": [[[5], [6, 7]]],
        "atol": 0,
    }
    assert runs(code.plus_program(doc, "def f(t, xs):\n    return tuple([t[0], *xs])"))
    assert not runs(code.plus_program(doc, "def f(t, xs):\n    return [t[0], *xs]"))
    assert not runs(code.plus_program(doc, "def f(t, xs):\n    return (list(t)[:1] + xs)"))


def test_plus_compares_sets_where_the_question_does():
    doc = {
        "task_id": "Mbpp/2",
        "prompt": "assert set(f((1, 2))) == set((2, 1))",
        "entry_point": "f",
        "canonical_solution": "def f(xs):\n    return xs",
        "base_input": [[[1, 2]]],
        "plus_input": [],
        "atol": 0,
    }
    assert runs(code.plus_program(doc, "def f(xs):\n    return xs[::-1]"))
    assert not runs(code.plus_program(doc, "def f(xs):\n    return xs[1:]"))


@needs_data
@pytest.mark.long
def test_all_gsm8k_solutions_are_right(record_property):
    docs = load(data_dir=REAL, test="gsm8k_test", form="gsm8k")["test"]
    assert len(docs) == 1319
    for doc in docs:
        number = doc["answer"].rsplit("#### ", 1)[1]
        assert gsm8k_results(doc, [doc["answer"]])["exact_match"] == 1
        assert gsm8k_results(doc, [f"So the answer is {number}."])["exact_match"] == 1
        assert gsm8k_results(doc, [f"#### {number}1"])["exact_match"] == 0
    record_property("right", f"{len(docs)}/1319")


@needs_data
@pytest.mark.long
def test_all_math500_solutions_are_right(record_property):
    docs = load(data_dir=REAL, test="math500")["test"]
    assert len(docs) == 500
    assert [doc["answer"] for doc in docs if not math_equal(doc["solution"], doc["answer"])] == []
    symbolic = [doc for doc in docs if not math_equal(f"\\boxed{{{doc['answer']} + 0}}", doc["answer"])]
    record_property("right", f"{len(docs)}/500")
    record_property("compared as text only", len(symbolic))
    assert len(symbolic) < 60  # text, sets and intervals have no sum; everything else goes through the algebra


@needs_data
@needs_sandbox
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "form", "solution", "results", "num_right", "num_all"),
    [
        ("humaneval", "plain", "canonical_solution", code.humaneval_results, 164, 164),
        ("mbpp_test", "mbpp", "code", code.mbpp_results, 499, 500),
        ("humaneval_plus", "plain", "canonical_solution", code.plus_results, 164, 164),
        ("mbpp_plus", "plain", "canonical_solution", code.plus_results, 376, 378),
    ],
)
def test_own_solutions_pass_in_the_sandbox(name, form, solution, results, num_right, num_all, record_property):
    docs = load(data_dir=REAL, test=name, form=form)["test"]
    assert len(docs) == num_all
    right = sum(results(doc, [doc[solution]])["pass@1"] for doc in docs)
    record_property("right", f"{right:.0f}/{num_all}")
    assert right >= num_right
    assert sum(results(doc, ["    return None"])["pass@1"] for doc in docs[:10]) == 0
