# SPDX-License-Identifier: Apache-2.0
"""Cases that take turns, so that a machine's drift affects all of them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wedlm.bench.loop import Loop
from wedlm.bench.settings import Settings
from wedlm.bench.stats import Figures, TableRow, describe, make_row, rounded
from wedlm.bench.target import Target


@dataclass
class Bench:
    """What a part gets. ``report`` shows a finished row; ``baseline_rows`` are vLLM's by part, if measured."""

    target: Target
    settings: Settings
    report: Callable[[str, TableRow], None]
    deadline: float | None = None  # of time.perf_counter
    baseline_rows: dict[str, list[TableRow]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # what the budget left no time for
    stopped: Callable[[], bool] = lambda: False  # whether the user wants the end: what is done is kept

    def __post_init__(self) -> None:
        self.loop = Loop(self.target)

    def past_deadline(self, what: str) -> bool:
        """Whether the budget is spent, or the user has stopped the run; ``what`` then counts as skipped."""
        past = self.stopped() or (self.deadline is not None and time.perf_counter() > self.deadline)
        if past:
            self.skipped.append(what)
        return past

    def beside_vllm(self, part: str, row: TableRow, **case: Any) -> TableRow:
        """Add ``vs_vllm`` to the row: tokens a second over those of vLLM's AR, if it has a row for that case."""
        baseline = self.baseline(part, **case)
        return row if baseline is None else {**row, "vs_vllm": rounded(row["tok_per_s"] / baseline["tok_per_s"])}

    def baseline(self, part: str, **case: Any) -> TableRow | None:
        """vLLM's row of a case."""
        return next((row for row in self.baseline_rows.get(part, []) if case.items() <= row.items()), None)


@dataclass(frozen=True)
class Case:
    """``label`` describes it; ``measure(run)`` gives its figures, run being 0, 1, … and -1 for a discarded warm-up."""

    label: dict[str, Any]
    measure: Callable[[int], Figures]


def take_turns(bench: Bench, part: str, cases: Sequence[Case], warm: bool = True) -> list[TableRow]:
    """One row for each case that ran at all; each run begins with a different case. ``warm`` starts with a discarded
    run, in which steps are captured and kernels compiled."""
    found: list[list[Figures]] = [[] for _ in cases]
    for run in range(-1 if warm else 0, bench.settings.workload.runs):
        for shift in range(len(cases)):
            index = (shift + max(0, run)) % len(cases)
            if not bench.past_deadline(f"{part}: {describe(cases[index].label)}, run {run + 1}"):
                figures = cases[index].measure(run)
                if run >= 0:
                    found[index].append(figures)
    return [make_row(case.label, runs) for case, runs in zip(cases, found, strict=True) if runs]


def beside_ar(rows: Sequence[TableRow], *same: str) -> list[TableRow]:
    """Add ``vs_ar`` to each row: tokens a second over those of AR in the row with the same values of ``same``."""

    def key(row: TableRow) -> tuple[Any, ...]:
        return tuple(row[name] for name in same)

    base = {key(row): row["tok_per_s"] for row in rows if row["mode"] == "autoregressive"}
    return [{**row, "vs_ar": rounded(row["tok_per_s"] / base[key(row)])} if key(row) in base else row for row in rows]
