# SPDX-License-Identifier: Apache-2.0
"""Small data files like the real ones, and where the real ones are, if the tester has them."""

import gzip
import json
import os
from pathlib import Path

import pytest

# The folder of the public data sets, for tests on the sets themselves.
REAL = os.environ.get("WEDLM_EVAL_DATA", "")
needs_data = pytest.mark.skipif(not REAL, reason="WEDLM_EVAL_DATA does not name the folder of data files")


def write_rows(directory: Path, name: str, rows: list[dict]) -> None:
    with gzip.open(directory / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def write_small_sets(directory: Path) -> Path:
    """GSM8K, ARC-E, WinoGrande, MMLU with two subjects and HumanEval, a few questions each."""
    directory.mkdir(exist_ok=True)
    sums = [{"question": f"{i} + 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(6)]
    write_rows(directory, "gsm8k_test", sums)
    letters = [{"question": f"q{i}", "A": "a", "B": f"b{i}", "C": "c c", "answer": "ABC"[i % 3]} for i in range(5)]
    write_rows(directory, "arc_e_test", letters)
    options = [{"context_options": [f"x{i}", f"y{i}"], "continuation": "z.", "gold": i % 2} for i in range(3)]
    write_rows(directory, "winogrande_val", options)
    for name in ("mmlu_test", "mmlu_dev"):
        rows = [
            {"subject": s, "question": f"{s} {name} {i}", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "D"}
            for s in ("high_art", "law")
            for i in range(2)
        ]
        write_rows(directory, name, rows)
    code = {
        "task_id": "HumanEval/0",
        "prompt": "import math\n\ndef half(x):\n",
        "entry_point": "half",
        "canonical_solution": "    return x / 2\n",
        "test": "def check(f):\n    assert f(4) == 2\n",
    }
    write_rows(directory, "humaneval", [code, {**code, "task_id": "HumanEval/1"}])
    return directory
