# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gsm8k_pairs.py: two runs text by text, and the figures of docs/benchmarks.md."""

import json
from pathlib import Path

from benchmarks.gsm8k_pairs import Texts, pair
from wedlm.evaluate.result_folder import Sample


def texts(name: str, ids: list[list[int]], right: str) -> Texts:
    samples = [
        Sample(number, "q", "1", mark == "1", str(one))
        for number, (one, mark) in enumerate(zip(ids, right, strict=True))
    ]
    return Texts(name, ids, samples, {})


def test_pair():
    a = texts("a", [[1, 2], [3, 4, 5], [6]], "110")
    b = texts("b", [[1, 2], [3, 9, 5], [6, 7]], "100")
    found = pair(a, b)
    assert (found["same"], found["parted"]) == (1, 2)
    assert found["tokens_per_parting"] == (2 + 2 + 2) / 2  # the first that differs, or is missing, included
    assert (found["points"], found["only_a_right"], found["only_b_right"]) == (-33.33, 1, 0)


def test_the_page_has_the_figures_of_fp8():
    root = Path(__file__).parents[2]
    report = json.loads((root / "benchmarks/results/fp8/gsm8k_h200.json").read_text())
    page = (root / "docs/benchmarks.md").read_text()
    right = {one["name"]: one["right"] for one in report["runs"]}
    for title, pair_ in zip(("bfloat16", "FP8"), report["pairs"], strict=False):
        middle, half = pair_["points"], pair_["half_width"]
        row = f"| {title} | {pair_['same']} of 1,319 | {pair_['tokens_per_parting']:.0f} tokens "
        row += f"| {right[pair_['a']]} | {right[pair_['b']]} "
        row += f"| {middle:+.1f} ({middle - half:+.1f} to {middle + half:+.1f}) |"
        assert row in page
