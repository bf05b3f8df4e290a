# SPDX-License-Identifier: Apache-2.0
"""Cases that take turns, so that a machine's drift meets all of them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wedlm.bench.loop import Loop
from wedlm.bench.settings import Settings
from wedlm.bench.stats import Figures, Row, describe, make_row, rounded
from wedlm.bench.target import Subject


@dataclass
class Bench:
    """What a part gets. ``tell`` shows a finished row; ``baseline`` is vLLM's rows by part, where it was measured."""

    subject: Subject
    settings: Settings
    tell: Callable[[str, Row], None]
    deadline: float | None = None  # of time.perf_counter
    baseline: dict[str, list[Row]] = field(default_factory=dict)
    cut: list[str] = field(default_factory=list)  # what the budget left no time for

    def __post_init__(self) -> None:
        self.loop = Loop(self.subject)

    def late(self, what: str) -> bool:
        """Whether the budget is spent; ``what`` then counts as cut."""
        late = self.deadline is not None and time.perf_counter() > self.deadline
        if late:
            self.cut.append(what)
        return late

    def beside_vllm(self, part: str, row: Row, **case: Any) -> Row:
        """The row with ``vs_vllm``, tokens a second over those of vLLM's AR, if it has a row of that case."""
        rival = self.rival(part, **case)
        return row if rival is None else {**row, "vs_vllm": rounded(row["tok_per_s"] / rival["tok_per_s"])}

    def rival(self, part: str, **case: Any) -> Row | None:
        """vLLM's row of a case."""
        return next((row for row in self.baseline.get(part, []) if case.items() <= row.items()), None)


@dataclass(frozen=True)
class Case:
    """``label`` says what it is; ``measure(run)`` gives its figures, run being 0, 1, … and -1 for one nobody reads."""

    label: dict[str, Any]
    measure: Callable[[int], Figures]


def take_turns(bench: Bench, part: str, cases: Sequence[Case], warm: bool = True) -> list[Row]:
    """A row per case that ran at all; each run begins with another case. ``warm``: first a run nobody reads, in which
    steps are captured and kernels compiled."""
    found: list[list[Figures]] = [[] for _ in cases]
    for run in range(-1 if warm else 0, bench.settings.amounts.runs):
        for shift in range(len(cases)):
            index = (shift + max(0, run)) % len(cases)
            if not bench.late(f"{part}: {describe(cases[index].label)}, run {run + 1}"):
                figures = cases[index].measure(run)
                if run >= 0:
                    found[index].append(figures)
    return [make_row(case.label, runs) for case, runs in zip(cases, found, strict=True) if runs]


def beside_ar(rows: Sequence[Row], *same: str) -> list[Row]:
    """Each row with ``vs_ar``: tokens a second over those of AR in the row with the same values of ``same``."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in same)

    base = {key(row): row["tok_per_s"] for row in rows if row["mode"] == "autoregressive"}
    return [{**row, "vs_ar": rounded(row["tok_per_s"] / base[key(row)])} if key(row) in base else row for row in rows]
