# SPDX-License-Identifier: Apache-2.0
"""Our scorers beside math-verify and the harness's own filters, on the written cases of the tests.

    python -m benchmarks.scorer_agreement CASES_DIR    # tests/evaluate/cases

Prints Markdown: how often each scorer gives the verdict that a person gives, by shape. The
rules of the harness's filters are quoted from its task files (gsm8k.yaml, and humaneval_instruct's and mbpp_instruct's
utils.py of lm_eval 0.4.13), since those run only inside a whole evaluation.
"""

import argparse
import contextlib
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify

from wedlm.evaluate.final_number import final_readings, same_number
from wedlm.evaluate.function_source import function_source

_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")  # gsm8k.yaml: regexes_to_ignore, on both sides


def strict_match(text: str, gold: str) -> bool:
    """gsm8k.yaml's filter strict-match: the first number right behind "####"."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found is not None and _exact(found[1], gold)


def flexible_extract(text: str, gold: str) -> bool:
    """gsm8k.yaml's filter flexible-extract: the last that looks like a number."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return bool(found) and _exact(next(part for part in found[-1] if part), gold)


def _exact(found: str, gold: str) -> bool:
    for pattern in _IGNORED:
        found, gold = re.sub(pattern, "", found), re.sub(pattern, "", gold)
    return found.strip().lower() == gold.strip().lower()


def by_math_verify(text: str, gold: str) -> bool:
    expected, found = parse(gold, parsing_timeout=5), parse(text, parsing_timeout=5)
    return bool(expected and found and verify(expected, found, timeout_seconds=5))


def harness_code(text: str, prompt: str) -> str:
    """humaneval_instruct's and mbpp_instruct's filters: up to the first fence, or between the first two.

    Their prompts open a block, which these answers do not know of."""
    if prompt:
        end = text.find("```")
        return prompt + (text if end == -1 else text[:end])
    found = re.findall(r"```(?:\w+)?\n?(.*?)\n?```", text, re.DOTALL)
    return found[0] if found else text


def passes(source: str, tests: list[str]) -> bool:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            exec(compile("\n".join([source, *tests]), "program", "exec"), {"__name__": "program"})
    except (Exception, SystemExit):
        return False
    return True


def table(title: str, cases: list[dict], scorers: dict[str, Callable[[dict], bool]], wanted: list[bool]) -> None:
    verdicts = {name: [scorer(case) for case in cases] for name, scorer in scorers.items()}
    print(f"\n### {title}: {len(cases)} cases, {sum(wanted)} right\n")
    print(
        "| scorer | a person's verdict | right, but marked wrong | wrong, but marked right |\n| --- | --- | --- | --- |"
    )
    for name, found in verdicts.items():
        missed = sum(w and not f for w, f in zip(wanted, found, strict=True))
        passed = sum(f and not w for w, f in zip(wanted, found, strict=True))
        print(f"| {name} | {len(cases) - missed - passed} | {missed} | {passed} |")
    print("\n| differs from a person, by shape | " + " | ".join(verdicts) + " |")
    print("| --- |" + " --- |" * len(verdicts))
    for shape in dict.fromkeys(case["shape"] for case in cases):
        counts = {
            name: Counter(c["shape"] for c, w, f in zip(cases, wanted, found, strict=True) if w != f)[shape]
            for name, found in verdicts.items()
        }
        print(
            f"| {shape} ({sum(c['shape'] == shape for c in cases)}) | " + " | ".join(map(str, counts.values())) + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=Path)
    folder = parser.parse_args().cases
    numbers, code = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("numbers.jsonl", "code.jsonl")
    )
    person = [case["person"] is not None and _equal(case["person"], case["gold"]) for case in numbers]
    scorers: dict[str, Callable[[dict], bool]] = {
        "wedlm": lambda case: same_number(case["output"], f"#### {case['gold']}"),
        "math-verify": lambda case: by_math_verify(case["output"], case["gold"].replace(",", "")),
        "harness, strict-match": lambda case: strict_match(case["output"], case["gold"]),
        "harness, flexible-extract": lambda case: flexible_extract(case["output"], case["gold"]),
    }
    table("Numbers", numbers, scorers, person)
    table(
        "Functions",
        code,
        {
            "wedlm": lambda case: passes(function_source(case["output"], case["name"], case["prompt"]), case["tests"]),
            "harness": lambda case: passes(harness_code(case["output"], case["prompt"]), case["tests"]),
        },
        [case["right"] for case in code],
    )


def _equal(person: str, gold: str) -> bool:
    return final_readings(person)[0] == final_readings(gold)[0]


if __name__ == "__main__":
    main()
