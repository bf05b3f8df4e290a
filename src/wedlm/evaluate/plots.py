# SPDX-License-Identifier: Apache-2.0
"""Figures of a report, as SVG: accuracy against speed, sweeps, streaming against block."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wedlm.evaluate.report import Section, TableRow, build_sections
from wedlm.evaluate.result_folder import describe, read_runs
from wedlm.plotting import Plot, finish_plot, group_by, need_matplotlib, new_figure, place_legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Where a sweep of the threshold puts "none": with 0 the rule fills one position a forward, too.
_NO_THRESHOLD = 0.0
_Speeds = Sequence[tuple[str, str]]  # name in a result, label
_SPEEDS: _Speeds = (("tokens_per_forward", "tokens / forward"), ("tokens_per_second", "tokens / second"))


def draw_plots(section: Section, seconds: bool = True) -> list[Plot]:
    """Draw the figures for which a section has runs; none for likelihood tasks, which do not depend on the decoding
    mode.

    ``seconds``: also draw tokens a second, besides tokens per forward. Raises ValueError if matplotlib is missing.
    """
    if section.kind != "generate":
        return []
    need_matplotlib()
    speeds = _SPEEDS if seconds else _SPEEDS[:1]
    drawn = [
        _pareto(section, speeds),
        _sweep(section, speeds, "entropy_threshold", "threshold τ (nats; none at 0)", "Threshold sweep"),
        _sweep(section, speeds, "pos_penalty", "position penalty λ (nats per position)", "Penalty sweep"),
        _streaming_against_block(section, speeds),
    ]
    return [plot for plot in drawn if plot is not None]


def draw_folder(folder: Path) -> list[Plot]:
    """``draw_plots`` of every section of a folder of results, each plot named after its section."""
    sections = build_sections(read_runs([folder]), None, 0, lambda _: None)
    return [
        replace(plot, title=f"{section.title} {plot.title}") for section in sections for plot in draw_plots(section)
    ]


def _pareto(section: Section, speeds: _Speeds) -> Plot | None:
    if len(section.rows) < 2:
        return None
    figure, panels = new_figure(len(speeds))
    several = len({row.run.model_label for row in section.rows}) > 1

    def by_mode(row: TableRow) -> str:
        return f"{row.run.model_label} {row.run.decoding}" if several else row.run.decoding

    for axes, (speed, label) in zip(panels, speeds, strict=True):
        for index, (name, rows) in enumerate(group_by(section.rows, by_mode).items()):
            _errors(axes, [row.result.speed[speed] for row in rows], rows, name, index, line="")
        axes.set_xlabel(label)
        axes.set_ylabel(f"{section.metric} (%)")
    place_legend(figure, panels[0])
    return finish_plot(figure, "Accuracy against speed", f"{section.title}: one dot per run, upper right is better")


def _sweep(section: Section, speeds: _Speeds, parameter: str, label: str, title: str) -> Plot | None:
    """Accuracy and speed over one parameter, with a line for each set of all others."""
    lines = _lines(section.rows, parameter)
    if not lines:
        return None
    figure, panels = new_figure(1 + len(speeds))
    for index, (name, rows) in enumerate(lines.items()):
        places = [_place(row, parameter) for row in rows]
        _errors(panels[0], places, rows, name, index)
        for axes, (speed, _) in zip(panels[1:], speeds, strict=True):
            axes.plot(places, [row.result.speed[speed] for row in rows], ".-", color=f"C{index % 10}")
    for axes, what in zip(panels, (f"{section.metric} (%)", *(name for _, name in speeds)), strict=True):
        axes.set_xlabel(label)
        axes.set_ylabel(what)
    place_legend(figure, panels[0])
    return finish_plot(figure, title, f"{section.title}: accuracy and speed over {label}")


def _streaming_against_block(section: Section, speeds: _Speeds) -> Plot | None:
    """The two modes where all else is equal: accuracy, and how many times faster streaming is, over the threshold."""
    pairs = []
    for rows in group_by(section.rows, lambda row: _others(row, "decoding")).values():
        modes = {row.run.decoding: row for row in rows}
        if {"streaming", "block"} <= modes.keys():
            pairs.append((modes["streaming"], modes["block"]))
    if not pairs:
        return None
    figure, panels = new_figure(2)
    families = group_by(pairs, lambda pair: _others(pair[0], "entropy_threshold", "decoding"))
    shared = [_others(family[0][0], "entropy_threshold", "decoding") for family in families.values()]
    for colour, (names, family) in enumerate(zip(_distinct(shared), families.values(), strict=True)):
        family.sort(key=lambda pair: _place(pair[0], "entropy_threshold"))
        places = [_place(streaming, "entropy_threshold") for streaming, _ in family]
        suffix = f" {names}" if names else ""
        for side, style in ((0, "-"), (1, "--")):
            rows = [pair[side] for pair in family]
            _errors(panels[0], places, rows, rows[0].run.decoding + suffix, colour, line=style)
        for (speed, name), style in zip(speeds, ("-", ":"), strict=False):
            ratios = [a.result.speed[speed] / (b.result.speed[speed] or float("nan")) for a, b in family]
            panels[1].plot(places, ratios, style, marker=".", color=f"C{colour % 10}", label=_plain(name + suffix))
    panels[1].axhline(1.0, color="grey", linewidth=0.8)
    for axes, what in zip(panels, (f"{section.metric} (%)", "streaming ÷ block"), strict=True):
        axes.set_xlabel("threshold τ (nats; none at 0)")
        axes.set_ylabel(what)
    place_legend(figure, *panels)
    return finish_plot(
        figure, "Streaming against block", f"{section.title}: accuracy of both, and their ratio in speed, over τ"
    )


def _lines(rows: Sequence[TableRow], parameter: str) -> dict[str, list[TableRow]]:
    """Rows that differ only in one parameter, with at least two values, in its order, under a name that distinguishes
    them."""
    using = [row for row in rows if row.run.decoding in ("streaming", "block")]
    groups = group_by(using, lambda row: _others(row, parameter))
    kept = {others: group for others, group in groups.items() if len({_place(row, parameter) for row in group}) > 1}
    names = _distinct(list(kept))
    return {
        name: sorted(group, key=lambda row: _place(row, parameter))
        for name, group in zip(names, kept.values(), strict=True)
    }


def _place(row: TableRow, parameter: str) -> float:
    value = row.run.params.get(parameter)
    return _NO_THRESHOLD if value is None else float(value)


_Facts = tuple[tuple[str, Any], ...]


def _others(row: TableRow, *left_out: str) -> _Facts:
    """Everything that a row depends on, except some parameters."""
    run = row.run
    facts = {
        "model": run.model_label,
        "decoding": run.decoding,
        "chat template": run.chat_template,
        "few-shot": row.result.num_fewshot,
        "questions": row.result.num_samples,
        **run.params,
    }
    return tuple((name, value) for name, value in facts.items() if name not in left_out)


def _distinct(groups: Sequence[_Facts]) -> list[str]:
    """Names of groups by the facts in which they differ; the mode is always part of the name."""
    named = [dict(group) for group in groups]
    telling = [
        name
        for name in dict.fromkeys(key for group in named for key in group)
        if name == "decoding" or len({repr(group.get(name)) for group in named}) > 1
    ]
    plain = ("model", "decoding")
    return [
        " ".join(
            str(group[name]) if name in plain else describe(name, group[name]) for name in telling if name in group
        )
        for group in named
    ]


def _errors(
    axes: "Axes", places: Sequence[float], rows: Sequence[TableRow], name: str, index: int, line: str = "-"
) -> None:
    """Accuracies in percent with their standard errors."""
    values = [100 * row.result.value for row in rows]
    bars = [100 * (row.result.stderr or 0.0) for row in rows]
    style: dict[str, Any] = {"fmt": f"o{line}", "markersize": 4, "elinewidth": 0.8, "capsize": 2, "alpha": 0.85}
    axes.errorbar(places, values, yerr=bars, color=f"C{index % 10}", label=_plain(name), **style)


def _plain(text: str) -> str:
    """Escape dollars, which would begin a formula, and a leading underscore, which hides a label."""
    return " " * text.startswith("_") + text.replace("$", r"\$")
