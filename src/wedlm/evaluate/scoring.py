# SPDX-License-Identifier: Apache-2.0
"""Mark answers as right or wrong: answers to mathematical questions, and letters of choices. For code see
``wedlm.evaluate.code_tasks``."""

import re
from collections.abc import Sequence
from typing import Any

from wedlm.evaluate.final_number import last_box, same_number

# Where a generated answer names its letter, the likeliest place first.
_LETTER_PLACES = (
    re.compile(r"\W*([A-J])(?![A-Za-z])"),
    re.compile(r"(?:answer|option|choice)\W*(?:is)?\W*([A-J])\b", re.IGNORECASE),
    re.compile(r"\b([A-J])\b"),
)
_PARSE_SECONDS = 5  # of one expression; unusual ones can keep the symbolic algebra busy for ever


def gsm8k_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's process_results for GSM8K."""
    return {"exact_match": float(same_number(results[0], doc["answer"]))}


def math_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's process_results for MATH."""
    return {"exact_match": float(math_equal(results[0], doc["answer"]))}


def letter_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The harness's process_results for choices that the answer names by letter."""
    return {"exact_match": float(chosen_letter(results[0], doc["letters"]) == doc["letters"][doc["gold"]])}


def marked_letter_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The same for a letter after the last ####; an answer without the mark is wrong."""
    _, mark, marked = results[0].rpartition("####")
    chosen = chosen_letter(marked, doc["letters"]) if mark else None
    return {"exact_match": float(chosen == doc["letters"][doc["gold"]])}


def chosen_letter(text: str, letters: Sequence[str]) -> str | None:
    """The letter that a text begins with, calls its answer, or has standing alone somewhere; None if there is none of
    these."""
    for place in _LETTER_PLACES:
        match = place.match(text) if place is _LETTER_PLACES[0] else place.search(text)
        if match is not None and match[1].upper() in letters:
            return match[1].upper()
    return None


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


def _bare(latex: str) -> str:
    """The text without spaces and without marks that only change its looks."""
    for mark in ("\\left", "\\right", "\\!", "\\,", "\\ ", "$", "\\%", "%", "^\\circ", "^{\\circ}"):
        latex = latex.replace(mark, "")
    latex = latex.replace("dfrac", "frac").replace("tfrac", "frac")
    latex = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", latex)
    return re.sub(r"\s+", "", latex).rstrip(".")
