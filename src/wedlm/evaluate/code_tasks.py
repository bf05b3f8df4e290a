# SPDX-License-Identifier: Apache-2.0
"""Mark generated code as right or wrong. Answers become whole programs for the sandbox; a program that ends without an
error is right."""

import ast
from collections.abc import Callable, Sequence
from typing import Any

from wedlm.evaluate.function_source import called_name, function_source

Document = dict[str, Any]

_KINDS: dict[type, str] = {ast.List: "list", ast.Tuple: "tuple", ast.Set: "set"}
_WALL_PER_CPU_SECOND = 6  # limits programs that wait for something; a score must not depend on the machine's load

# Helpers inside the program: how results compare, and how inputs get back the types that JSON does not have.
_HELPERS = """
import copy, itertools, re

def _same(got, want, atol):
    if isinstance(want, re.Match) or isinstance(got, re.Match):
        return bool(got) == bool(want)
    if isinstance(want, float) or atol and isinstance(got, float) and isinstance(want, int):
        if got == want or got != got and want != want:
            return True
        return isinstance(got, (int, float)) and abs(got - want) <= max(atol, 1e-6) + 1e-7 * abs(want)
    for kind in (list, tuple):
        if isinstance(want, kind):
            return isinstance(got, kind) and len(got) == len(want) and all(_same(g, w, atol) for g, w in zip(got, want))
    if isinstance(want, dict) and isinstance(got, dict):
        return got.keys() == want.keys() and all(_same(got[k], want[k], atol) for k in want)
    return got == want

def _typed(value, kinds, path, depth=0):
    kind = kinds.get((path, depth))
    if isinstance(value, list):
        return (kind or list)([_typed(one, kinds, path, depth + 1) for one in value])
    if isinstance(value, dict):
        return {key: _typed(one, kinds, path, depth + 1) for key, one in value.items()}
    return complex(value) if kind is complex else value

def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

def _forms(args, kinds):
    try:
        yield [_typed(arg, kinds, place) for place, arg in enumerate(args)]
    except (TypeError, ValueError):
        pass
    yield args
    ways = [lambda x: x, _tuples, lambda x: [*map(_tuples, x)] if isinstance(x, list) else x]
    for chosen in itertools.product(ways, repeat=len(args)):
        yield [way(arg) for way, arg in zip(chosen, args)]
    try:
        yield [complex(arg) for arg in args]
    except (TypeError, ValueError):
        pass

def _first_accepted(function, args, kinds):
    for form in _forms(args, kinds):
        try:
            return form, function(*copy.deepcopy(form))
        except Exception:
            pass
    return None, None
"""


def humaneval_program(doc: Document, text: str) -> str:
    source = function_source(text, doc["entry_point"], doc["prompt"])
    return f"{source}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"


def mbpp_program(doc: Document, text: str) -> str:
    source = function_source(text, called_name(doc["test_list"]))
    return "\n".join([doc.get("test_setup_code") or "", source, *doc["test_list"], ""])


def mbpp_paper_program(doc: Document, text: str) -> str:
    """The program of an answer in the paper's form, whose examples have their code in quotes before [DONE]."""
    code = text.partition("[DONE]")[0].strip()
    return mbpp_program(doc, code[1:-1] if len(code) > 1 and code[0] == code[-1] == "'" else code)


def plus_program(doc: Document, text: str) -> str:
    """A program that compares the answer with the reference solution on all inputs.

    Results compare by Python's ==; a nearby number is right only where a float is expected. JSON has turned tuples into
    lists, so inputs get the types with which the set's own assertions call the function, or else the first form that
    the reference accepts; inputs that it refuses in all forms are left out. Where the question compares sets, order
    does not count. HumanEval/32 asks for some root of a polynomial, so any root is right.
    """
    entry = doc["entry_point"]
    if doc["task_id"].startswith("HumanEval/"):
        answer = function_source(text, entry, doc["prompt"])
        reference = doc["prompt"] + doc["canonical_solution"]
    else:
        answer, reference = function_source(text, entry), doc["canonical_solution"]
    right = "_same(got, want, atol)"
    if doc["task_id"] == "HumanEval/32":
        right = "abs(sum(c * got**i for i, c in enumerate(args[0]))) <= 1e-4"
    elif f"set({entry}(" in doc.get("prompt", ""):
        right = "set(got) == set(want)"
    return f"""{_HELPERS}
answer, reference = {{"__name__": "answer"}}, {{"__name__": "reference"}}
exec({answer!r}, answer)
exec({reference!r}, reference)
atol, ran = {doc["atol"]!r}, 0
kinds = {_input_kinds(doc)}
inf, nan = float("inf"), float("nan")
for args in {[*doc["base_input"], *doc["plus_input"]]!r}:
    args, want = _first_accepted(reference[{entry!r}], args, kinds)
    if args is None:
        continue
    got = answer[{entry!r}](*copy.deepcopy(args))
    assert {right}, (args, got, want)
    ran += 1
assert ran
"""


def _input_kinds(doc: Document) -> str:
    """Source of {(argument, depth): type} for everything that is not a list, as the set's own assertions write it."""
    found: dict[tuple[int, int], set[str]] = {}

    def look(node: ast.expr, place: int, depth: int) -> None:
        kind = _KINDS.get(type(node))
        if kind is not None:
            found.setdefault((place, depth), set()).add(kind)
        elif any(isinstance(getattr(part, "value", None), complex) for part in ast.walk(node)):
            found.setdefault((place, depth), set()).add("complex")
        for inner in node.values if isinstance(node, ast.Dict) else getattr(node, "elts", []):
            look(inner, place, depth + 1)

    for call in ast.walk(ast.parse(doc.get("assertion", ""))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == doc["entry_point"]:
            for place, argument in enumerate(call.args):
                look(argument, place, 0)
    sure = {where: kinds.pop() for where, kinds in found.items() if len(kinds) == 1 and "list" not in kinds}
    return "{" + ", ".join(f"{where}: {kind}" for where, kind in sure.items()) + "}"


def check_sandbox() -> None:
    """Raises ValueError if generated code cannot run here, which is better known before the model answers
    than after."""
    if not _passes("answer = 6 * 7\n", seconds=10):
        raise ValueError("generated code cannot be run here: a program of one assignment did not end in the sandbox")


def _passes(program: str, seconds: float) -> float:
    """1.0 or 0.0. ``seconds`` are of CPU time, and may take several times as long on a busy machine."""
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
mbpp_paper_results = _results(mbpp_paper_program, 10)
plus_results = _results(plus_program, 30)  # hundreds of inputs, twice
