# SPDX-License-Identifier: Apache-2.0
"""``wedlm train --plot``: draws the curves of one run, or of several in one picture, from their ``metrics.jsonl``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wedlm.plotting import new_figure
from wedlm.train.metrics import METRICS_FILE, read_metrics
from wedlm.train.optional_deps import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_FILE = "curves.png"
_COLUMNS = 3


@dataclass(frozen=True)
class _Run:
    name: str
    records: list[dict[str, Any]]

    def of(self, kind: str, figure: str) -> list[dict[str, Any]]:
        """The records of a kind that have a figure."""
        return [record for record in self.records if record["kind"] == kind and figure in record]


@dataclass(frozen=True)
class _Curve:
    """A figure over steps. If there are several kinds, the first is drawn solid, the second dashed."""

    title: str
    figure: str
    kinds: tuple[str, ...]

    def is_in(self, runs: Sequence[_Run]) -> bool:
        return any(run.of(kind, self.figure) for run in runs for kind in self.kinds)

    def draw(self, axes: "Axes", run: _Run, colour: str) -> None:
        for kind, style in zip(self.kinds, ("-", "--"), strict=False):
            records = run.of(kind, self.figure)
            if not records:
                continue
            steps, values = [record["step"] for record in records], [record[self.figure] for record in records]
            label = run.name if kind == self.kinds[0] else "_"  # matplotlib lists no label that begins so
            # A single value does not make a line.
            axes.plot(steps, values, style, color=colour, label=label, marker="." if len(steps) < 2 else "")
        axes.set_xlabel("step")


@dataclass(frozen=True)
class _Profile:
    """A figure with one value per group of rows, from the last record of its kind; None leaves a gap."""

    title: str
    figure: str
    kind: str
    x_label: str
    first: float
    step: float

    def is_in(self, runs: Sequence[_Run]) -> bool:
        return any(run.of(self.kind, self.figure) for run in runs)

    def draw(self, axes: "Axes", run: _Run, colour: str) -> None:
        for record in run.of(self.kind, self.figure)[-1:]:
            values = [math.nan if value is None else value for value in record[self.figure]]
            places = [self.first + self.step * index for index in range(len(values))]
            axes.plot(places, values, ".-", color=colour, label=f"{run.name}, step {record['step']}")
        axes.set_xlabel(self.x_label)


_Panel = _Curve | _Profile


def draw_curves(directories: Sequence[Path]) -> Path:
    """Draw the runs with these ``output_dir``s to ``curves.png`` in the first one, and return that path.

    Panels for which no run has figures are left out. Raises ValueError if there is nothing to draw or matplotlib is
    missing.
    """
    require("matplotlib", "drawing curves")
    if not directories:
        raise ValueError("--plot has no directory; expected the output_dir of a run, or of several")
    runs = _read_runs(directories)
    panels = [panel for panel in _panels(runs) if panel.is_in(runs)]
    if not panels:
        raise ValueError(f"{directories[0] / METRICS_FILE} has no losses yet; expected a run that has logged some")
    figure, places = new_figure(len(panels), _COLUMNS)
    for axes, panel in zip(places, panels, strict=True):
        for index, run in enumerate(runs):
            panel.draw(axes, run, f"C{index % 10}")
        axes.set_title(panel.title, fontsize="medium")
        if len(runs) > 1 or isinstance(panel, _Profile):
            axes.legend(fontsize="small")
    target = directories[0] / CURVES_FILE
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror}") from error
    return target


def _panels(runs: Sequence[_Run]) -> list[_Panel]:
    # Training losses of runs with other noise do not compare; those of validation, under the same noise, do.
    measured = all(run.of("eval", "loss_by_depth") for run in runs)
    kind, where = ("eval", "validation, random noise") if measured else ("train", "training")
    train, both = ("train",), ("eval", "eval_suffix")
    return [
        _Curve("loss that is trained", "loss", train),
        _Curve("masked loss (nats)", "masked_loss", train),
        _Curve("AR loss (nats)", "ar_loss", train),
        _Curve("right guesses of masked rows", "masked_accuracy", train),
        _Curve("validation: masked loss (nats)\nsolid random, dashed suffix noise", "masked_loss", both),
        _Curve("validation: AR loss (nats)", "ar_loss", ("eval",)),
        _Curve("validation: right guesses of masked rows\nsolid random, dashed suffix noise", "masked_accuracy", both),
        _Profile(f"masked loss by depth\n{where}", "loss_by_depth", kind, "masked rows before it in its block", 0, 1),
        _Profile(f"masked loss by ratio\n{where}", "loss_by_ratio", kind, "γ of the block", 0.05, 0.1),
    ]


def _read_runs(directories: Sequence[Path]) -> list[_Run]:
    """Runs under the names of their directories, or under the whole paths if names alone do not distinguish them."""
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    return [_Run(name, _read(directory)) for name, directory in zip(names, directories, strict=True)]


def _read(directory: Path) -> list[dict[str, Any]]:
    path = directory / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{directory} has no {METRICS_FILE}; expected the output_dir of a run")
    records = read_metrics(path)
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
            raise ValueError(f"{path} line {number} is not a record of a run; expected an object with kind and step")
    return records
