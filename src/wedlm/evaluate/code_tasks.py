# SPDX-License-Identifier: Apache-2.0
"""Right or wrong: generated code. Answers become whole programs for the sandbox; to end without error is right."""

import re
from collections.abc import Callable, Sequence
from typing import Any

Document = dict[str, Any]

# The opening fence may be the prompt's, the closing one may have been cut off.
_FENCE = re.compile(r"```[ \t]*(?:python|py|Python)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
# A base model writes on after its function; the first line in column 0 that begins something else ends it.
_NEXT_TOP_LEVEL = re.compile(r"\n(?=(?:class |def |if |print|#|@|assert |```|<))")

_WALL_PER_CPU_SECOND = 6  # limits programs that wait for something; a score must not depend on the machine's load

# Helpers inside the program: how results compare, and what JSON may have made of an input's tuples and complex numbers.
_HELPERS = """
import copy, itertools, re

def _same(got, want, atol):
    if isinstance(want, re.Match) or isinstance(got, re.Match):
        return bool(got) == bool(want)
    if isinstance(want, float) or isinstance(got, float) and isinstance(want, int):
        if got == want or got != got and want != want:
            return True
        return isinstance(got, (int, float)) and abs(got - want) <= max(atol, 1e-6) + 1e-7 * abs(want)
    if isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(got) == len(want) and all(_same(g, w, atol) for g, w in zip(got, want))
    if isinstance(want, dict) and isinstance(got, dict):
        return got.keys() == want.keys() and all(_same(got[k], want[k], atol) for k in want)
    return got == want

def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

def _forms(args):
    yield args
    ways = [lambda x: x, _tuples, lambda x: [*map(_tuples, x)] if isinstance(x, list) else x]
    for chosen in itertools.product(ways, repeat=len(args)):
        yield [way(arg) for way, arg in zip(chosen, args)]
    try:
        yield [complex(arg) for arg in args]
    except (TypeError, ValueError):
        pass

def _first_accepted(function, args):
    for form in _forms(args):
        try:
            return form, function(*copy.deepcopy(form))
        except Exception:
            pass
    return None, None
"""


def extract_code(text: str) -> str | None:
    """The first fenced block of an answer, or None if it has no fence."""
    found = _FENCE.search(text)
    return found[1] if found else None


def completed(prompt: str, text: str, entry_point: str) -> str:
    """The source of an answer to a prompt that is the beginning of a function."""
    block = extract_code(text)
    if block is not None and f"def {entry_point}" in block:
        head = prompt.partition(f"def {entry_point}")[0]  # imports and helpers that the answer may rely on
        return f"{head}\n{block}"
    body = block if block is not None else text
    cut = _NEXT_TOP_LEVEL.search(body)
    return prompt + (body[: cut.start()] if cut else body)


def humaneval_program(doc: Document, text: str) -> str:
    source = completed(doc["prompt"], text, doc["entry_point"])
    return f"{source}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"


def mbpp_program(doc: Document, text: str) -> str:
    block = extract_code(text)
    source = text if block is None else block
    return "\n".join([doc.get("test_setup_code") or "", source, *doc["test_list"], ""])


def plus_program(doc: Document, text: str) -> str:
    """The answer beside the reference solution, on all inputs.

    JSON has turned tuples into lists: the reference gets an input in the first form that it accepts, and the answer
    the same; inputs that it refuses in all forms are left out. HumanEval/32 asks for some root of a polynomial: any is
    right.
    """
    entry = doc["entry_point"]
    is_humaneval = doc["task_id"].startswith("HumanEval/")
    if is_humaneval:
        answer = completed(doc["prompt"], text, entry)
        reference = doc["prompt"] + doc["canonical_solution"]
    else:
        block = extract_code(text)
        answer, reference = text if block is None else block, doc["canonical_solution"]
    right = "_same(got, want, atol)"
    if doc["task_id"] == "HumanEval/32":
        right = "abs(sum(c * got**i for i, c in enumerate(args[0]))) <= 1e-4"
    return f"""{_HELPERS}
answer, reference = {{"__name__": "answer"}}, {{"__name__": "reference"}}
exec({answer!r}, answer)
exec({reference!r}, reference)
atol, ran = {doc["atol"]!r}, 0
inf, nan = float("inf"), float("nan")
for args in {[*doc["base_input"], *doc["plus_input"]]!r}:
    args, want = _first_accepted(reference[{entry!r}], args)
    if args is None:
        continue
    got = answer[{entry!r}](*copy.deepcopy(args))
    assert {right}, (args, got, want)
    ran += 1
assert ran
"""


def check_sandbox() -> None:
    """ValueError if generated code cannot be run here: better known before the model answers than after."""
    if not _passes("answer = 6 * 7\n", seconds=10):
        raise ValueError("generated code cannot be run here: a program of one assignment did not end in the sandbox")


def _passes(program: str, seconds: float) -> float:
    """1.0 or 0.0. ``seconds`` are of CPU time: on a busy machine they may take several times as long."""
    from wedlm.evaluate.sandbox import Limits, SandboxUnavailable, run_program

    try:
        outcome = run_program(program, Limits(seconds=_WALL_PER_CPU_SECOND * seconds, cpu_seconds=seconds))
    except SandboxUnavailable as error:
        raise ValueError(f"generated code cannot be run here: {error}") from error
    return float(outcome.status == "passed")


def _results(
    make_program: Callable[[Document, str], str], seconds: float
) -> Callable[[Document, Sequence[str]], dict[str, float]]:
    def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
        return {"pass@1": _passes(make_program(doc, results[0]), seconds)}

    return process_results


humaneval_results = _results(humaneval_program, 10)
mbpp_results = _results(mbpp_program, 10)
plus_results = _results(plus_program, 30)  # hundreds of inputs, twice
