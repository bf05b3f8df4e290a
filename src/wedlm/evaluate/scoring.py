# SPDX-License-Identifier: Apache-2.0
"""Right or wrong: answers to mathematical questions. Code is in ``wedlm.evaluate.code_tasks``."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PARSE_SECONDS = 5  # of one expression; unusual ones can keep the symbolic algebra busy for ever


def gsm8k_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's process_results of GSM8K."""
    expected = final_number(doc["answer"])
    return {"exact_match": float(expected is not None and final_number(results[0]) == expected)}


def final_number(text: str) -> Decimal | None:
    """The answer of a solution: the number after the first "####", in the last box, or else the last one of all.

    The first, because a base model may go on with questions of its own.
    """
    _, mark, after = text.partition("####")
    if mark and (found := _NUMBER.search(after)):
        return _decimal(found[0])
    box = last_box(text)
    found_all = (_NUMBER.findall(box) if box is not None else []) or _NUMBER.findall(text)
    return _decimal(found_all[-1]) if found_all else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace("$", "").replace(",", "")).normalize()


def math_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's process_results of MATH."""
    return {"exact_match": float(math_equal(results[0], doc["answer"]))}


def math_equal(text: str, answer: str) -> bool:
    """Whether a solution's final answer, in its last box if it has one, means the same as ``answer`` (LaTeX)."""
    from math_verify import parse, verify

    box = last_box(text)
    if box is not None and _bare(box) == _bare(answer):
        return True
    given = text if box is None else f"\\boxed{{{box}}}"
    expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=_PARSE_SECONDS)
    found = parse(given, parsing_timeout=_PARSE_SECONDS)
    return bool(expected and found and verify(expected, found, timeout_seconds=_PARSE_SECONDS))


def last_box(text: str) -> str | None:
    """What is inside the last \\boxed{...} whose braces close, or None."""
    for opening in reversed(list(_BOX.finditer(text))):
        depth = 1
        for index in range(opening.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0) if text[index - 1] != "\\" else 0
            if depth == 0:
                return text[opening.end() : index]
    return None


def _bare(latex: str) -> str:
    """Without spaces and without marks that change the looks only."""
    for mark in ("\\left", "\\right", "\\!", "\\,", "\\ ", "$", "\\%", "%", "^\\circ", "^{\\circ}"):
        latex = latex.replace(mark, "")
    latex = latex.replace("dfrac", "frac").replace("tfrac", "frac")
    latex = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", latex)
    return re.sub(r"\s+", "", latex).rstrip(".")
