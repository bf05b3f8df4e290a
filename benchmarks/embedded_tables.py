# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/embedded_checkpoint.md, from summaries of benchmarks/embedded_eval.py.

    python -m benchmarks.embedded_tables benchmarks/results/embedded/eval_h200.json \
        benchmarks/results/embedded/eval_h200_rest.json benchmarks/results/embedded/eval_h200_0.26.json \
        benchmarks/results/embedded/eval_cpu_0.26.json docs/embedded_checkpoint.md

Of a stage that several summaries have, the last one's counts. Each table stands between two marks in the page,
``<!-- name -->`` and ``<!-- end -->``.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wedlm.algorithm.params import DecodeParams
from wedlm.model.demo import DEMO_ENTROPY_THRESHOLD, DEMO_NEXT_TOKEN

Summary = dict[str, Any]
Values = dict[str, Any]

SETS = {
    "gsm8k": "GSM8K",
    "math500": "MATH-500",
    "humaneval": "HumanEval",
    "humaneval_plus": "HumanEval+",
    "mbpp": "MBPP",
    "mbpp_plus": "MBPP+",
    "arc_c": "ARC-Challenge",
    "arc_e": "ARC-Easy",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
}
SIZES = {"gsm8k": 1319, "math500": 500, "humaneval": 164, "humaneval_plus": 164, "mbpp": 500, "mbpp_plus": 378}
SIZES |= {"arc_c": 1172, "arc_e": 2376, "hellaswag": 10042, "mmlu": 14042}
DEFAULT = {
    "next_token": DEMO_NEXT_TOKEN,
    "window_size": DecodeParams.window_size,
    "entropy_threshold": DEMO_ENTROPY_THRESHOLD,
    "pos_penalty": DecodeParams.pos_penalty,
}


class Points:
    """What a summary knows, by set, protocol and decoding."""

    def __init__(self, summary: Summary) -> None:
        self.points: list[Values] = [one for one in summary["points"] if one["dtype"] == "float32"]
        self._less = {one["stage"]: one for one in summary["streaming_against_ar"]}
        self._same = {one["task"]: one for one in summary["verified_against_ar"] if one["dtype"] == "float32"}

    def of(self, task: str, **params: Any) -> Values | None:
        """The point with these parameters that has the most questions."""
        found = [
            one
            for one in self.points
            if one["task"] == task and all(one.get("params", {}).get(name) == value for name, value in params.items())
        ]
        return max(found, key=lambda one: one["num_samples"], default=None)

    def less(self, point: Values | None) -> Values | None:
        """A streaming point's paired difference from AR."""
        return self._less.get(point["stage"]) if point else None

    def same(self, task: str) -> Values | None:
        return self._same.get(task)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (head, ["---"] * len(head), *rows))


def percent(point: Values, error: bool = True) -> str:
    value = f"{100 * point['value']:.1f}"
    return f"{value} ± {100 * point['stderr']:.1f} %" if error and point["stderr"] is not None else f"{value} %"


def signed(points: float) -> str:
    return f"{points:+.1f}" if round(points, 1) else "0.0"


def difference(less: Values | None) -> str:
    """The difference from AR in points, with its 95 % interval."""
    if less is None:
        return ""
    middle, half = less["points"], less["half_width"]
    return f"{signed(middle)} ({signed(middle - half)} to {signed(middle + half)})"


def speed(point: Values) -> str:
    return f"{point['speed']['tokens_per_forward']:.2f} ({point['speed']['p_cache']:.3f})"


def part(point: Values, task: str) -> str:
    """Which questions, unless all."""
    return "" if point["num_samples"] == SIZES[task] else f"the first {point['num_samples']:,}: "


def cell(point: Values | None, task: str, with_speed: bool = True) -> str:
    if point is None:
        return "not answered"
    more = ""
    if with_speed and "params" in point and point["params"]["decoding"] != "autoregressive":
        more = f" ({point['speed']['tokens_per_forward']:.2f}, {point['speed']['p_cache']:.3f})"
    return f"{part(point, task)}{percent(point)}{more}"


def ways(points: Points, task: str) -> list[Values]:
    """The settings of streaming that were swept on a set: causal ones first, by threshold, penalty and window."""
    found = [
        one for one in points.points if one["task"] == task and one.get("params", {}).get("decoding") == "streaming"
    ]
    order = ("next_token", "entropy_threshold", "pos_penalty", "window_size")
    return sorted(found, key=lambda one: [one["params"][name] for name in order])


def named(params: Values) -> str:
    more = "" if params["pos_penalty"] == DEFAULT["pos_penalty"] else f", λ = {params['pos_penalty']:g}"
    rule = "" if params["next_token"] == "causal" else "the paper's rule, "
    text = f"{rule}W = {params['window_size']}, τ = {params['entropy_threshold']:g}{more}"
    return f"**{text}**" if all(params[name] == value for name, value in DEFAULT.items()) else text


def sweep(points: Points) -> str:
    rows = []
    for one in ways(points, "gsm8k"):
        less = points.less(one)
        assert less is not None, one["stage"]
        split = f"{less['only_ar_right']} / {less['only_streaming_right']}"
        rows.append([named(one["params"]), cell(one, "gsm8k", False), difference(less), split, speed(one)])
    head = ["", "GSM8K", "less AR, points (95 %)", "AR alone right / streaming alone", "tokens per forward (p_cache)"]
    return table(head, rows)


def code_sweep(points: Points) -> str:
    tasks = ("humaneval", "mbpp")
    head = [""]
    for task in tasks:
        ar = points.of(task, decoding="autoregressive")
        assert ar is not None
        head += [f"{SETS[task]}, {SIZES[task]} (AR {percent(ar)})", "less AR", "tokens per forward"]
    rows = []
    for one in ways(points, "humaneval"):
        row = [named(one["params"])]
        for task in tasks:
            point = points.of(task, **one["params"])
            row += [cell(point, task, False), difference(points.less(point)), speed(point) if point else ""]
        rows.append(row)
    return table(head, rows)


def streamed(points: Points, task: str, threshold: float) -> tuple[Values | None, str]:
    """The default streaming with this threshold, or with the nearest that was measured, which the text then names."""
    measured = {one["params"]["entropy_threshold"] for one in ways(points, task)}
    for one in sorted(measured, key=lambda other: abs(other - threshold)):
        point = points.of(task, decoding="streaming", **{**DEFAULT, "entropy_threshold": one})
        if point is not None:
            return point, "" if one == threshold else f", τ = {one:g}"
    return None, ""


def all_sets(points: Points) -> str:
    head = ["zero-shot", "AR", "verified, at most 16 rows", "the same tokens as AR"]
    head += [f"streaming, its defaults (τ = {DEMO_ENTROPY_THRESHOLD:g})", "less AR, points (95 %)"]
    head += ["streaming, τ = 0.4", "less AR, points (95 %)"]
    rows = []
    for task in SIZES:
        ar = points.of(task, decoding="autoregressive")
        if ar is None or "params" not in ar:
            continue
        same, verified = points.same(task), points.of(task, decoding="verified")
        row = [f"{SETS[task]}, {SIZES[task]:,}", cell(ar, task), cell(verified, task)]
        row.append(f"{same['same']:,} of {same['answers']:,}" if same else "")
        for threshold in (DEMO_ENTROPY_THRESHOLD, 0.4):
            point, apart = streamed(points, task, threshold)
            row += [cell(point, task) + apart, difference(points.less(point))]
        rows.append(row)
    return table(head, rows)


def likelihoods(points: Points) -> str:
    rows = []
    for task in SETS:
        point = next((one for one in points.points if one["task"] == task and "params" not in one), None)
        if point is not None:
            kind = "per character" if point["metric"] == "acc_norm" else "of the letter"
            rows.append([SETS[task], f"{point['num_samples']:,}", str(point["num_fewshot"]), kind, percent(point)])
    return table(["", "questions", "examples", "likelihood", "right"], rows)


def protocols(points: Points) -> str:
    head = [
        "",
        "ours: AR",
        "ours: streaming",
        "the paper's protocol: AR",
        "the paper's: streaming (tokens per forward)",
    ]
    head.append("streaming less AR there, points (95 %)")
    rows = []
    for task in SETS:
        theirs = {mode: points.of(f"{task}_paper", decoding=mode) for mode in ("autoregressive", "streaming")}
        if not any(theirs.values()):
            continue
        likely = next((one for one in points.points if one["task"] == task and "params" not in one), None)
        ar = likely or points.of(task, decoding="autoregressive")
        streaming, apart = streamed(points, task, DEMO_ENTROPY_THRESHOLD)
        ours = "the same" if likely else cell(streaming, task, False) + apart
        row = [SETS[task], cell(ar, task), ours, cell(theirs["autoregressive"], task)]
        point = theirs["streaming"]
        row.append(
            f"{cell(point, task, False)} ({point['speed']['tokens_per_forward']:.2f})" if point else "not answered"
        )
        rows.append([*row, difference(points.less(point))])
    return table(head, rows)


TABLES: dict[str, Callable[[Points], str]] = {
    "streaming-sweep": sweep,
    "code-sweep": code_sweep,
    "all-sets": all_sets,
    "likelihoods": likelihoods,
    "protocols": protocols,
}


def joined(summaries: Sequence[Summary]) -> Summary:
    """One summary of several."""

    def last(name: str, *keys: str) -> list[Values]:
        return list({tuple(one[key] for key in keys): one for summary in summaries for one in summary[name]}.values())

    return {
        "points": last("points", "stage"),
        "streaming_against_ar": last("streaming_against_ar", "stage"),
        "verified_against_ar": last("verified_against_ar", "task", "dtype"),
    }


def filled(page: str, summary: Summary) -> str:
    """The page with its tables made from the summary. Raises ValueError if a mark is missing."""
    points = Points(summary)
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text = make(points)
        page, count = pattern.subn(lambda found, text=text: found[1] + text + found[2], page)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"the page has the mark {name!r} {count} times; expected once")
    return page


def main() -> None:
    *sources, target = map(Path, sys.argv[1:])
    summary = joined([json.loads(source.read_text(encoding="utf-8")) for source in sources])
    target.write_text(filled(target.read_text(encoding="utf-8"), summary), encoding="utf-8")


if __name__ == "__main__":
    main()
