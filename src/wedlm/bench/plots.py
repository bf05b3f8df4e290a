# SPDX-License-Identifier: Apache-2.0
"""A run's rows as SVG files: step time against rows, rows processed against tokens kept, tok/s against batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wedlm.bench.stats import TableRow
from wedlm.plotting import Plot, finish_plot, group_by, new_figure, place_legend

_Parts = dict[str, list[TableRow]]


def draw_bench(values: dict[str, Any]) -> list[Plot]:
    """Draw the figures for which a record has rows. Raises ValueError if matplotlib is missing."""
    parts: _Parts = values["parts"]
    drawn = [_step_time(parts, values.get("step_costs_ms", {})), _rows_kept(parts), _speed(parts)]
    return [plot for plot in drawn if plot is not None]


def write_plots(plots: Sequence[Plot], directory: Path) -> list[Path]:
    """One file each, named after its title."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in plots:
        words = "".join(c if c.isalnum() else " " for c in plot.title.lower()).split()
        paths.append(directory / f"{'_'.join(words)}.svg")
        paths[-1].write_text(plot.svg, encoding="utf-8")
    return paths


def _step_time(parts: _Parts, costs: dict[int, float]) -> Plot | None:
    rows = parts.get("steps", [])
    if not rows and not costs:
        return None
    figure, (axes,) = new_figure(1)
    if costs:
        axes.plot([int(n) for n in costs], list(costs.values()), "-", color="grey", label="forward alone, no context")
    for index, (mode, group) in enumerate(group_by(rows, lambda row: row["mode"]).items()):
        places = [row["batch"] * row["rows_per_step"] for row in group]
        values = [row["step_ms"] for row in group]
        axes.errorbar(places, values, yerr=_bars(group, "step_ms"), fmt="o", color=f"C{index}", label=mode, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows of a step, all sequences")
    axes.set_ylabel("ms a step")
    place_legend(figure, axes)
    return finish_plot(figure, "Step time against rows", "median of each case; bars: least and most of the runs")


def _rows_kept(parts: _Parts) -> Plot | None:
    """What a row buys; on the diagonal every row is kept."""
    points: list[tuple[str, float, float]] = []
    for part in ("steps", "accept"):
        points += [(part, row["rows_per_step"], row["tokens_per_step"]) for row in parts.get(part, [])]
    for part in ("scenarios", "latency", "throughput", "serving"):
        for row in parts.get(part, []):
            points.append(
                (f"{part} {row['mode']}", row["tokens_per_forward"] / row["p_cache"], row["tokens_per_forward"])
            )
    if not points:
        return None
    figure, (axes,) = new_figure(1)
    for index, (name, group) in enumerate(group_by(points, lambda point: point[0]).items()):
        marker = "osD^v<>"[index // 10 % 7]
        axes.plot([p[1] for p in group], [p[2] for p in group], marker, color=f"C{index % 10}", label=name)
    most = max(point[2] for point in points)
    axes.plot([1, most], [1, most], "-", color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows processed, a sequence and step")
    axes.set_ylabel("tokens kept")
    place_legend(figure, axes)
    return finish_plot(figure, "Rows processed against tokens kept", "the line: every row becomes a token")


def _speed(parts: _Parts) -> Plot | None:
    rows = parts.get("throughput", [])
    if len({row["batch"] for row in rows}) < 2:
        return None
    figure, (axes,) = new_figure(1)
    for index, (mode, group) in enumerate(group_by(rows, lambda row: row["mode"]).items()):
        places, values = [row["batch"] for row in group], [row["tok_per_s"] for row in group]
        axes.errorbar(
            places, values, yerr=_bars(group, "tok_per_s"), fmt="o-", color=f"C{index}", label=mode, capsize=2
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("batch")
    axes.set_ylabel("tokens / second")
    place_legend(figure, axes)
    return finish_plot(figure, "Throughput against batch", "complete answers; bars: least and most of the runs")


def _bars(rows: Sequence[TableRow], name: str) -> list[list[float]]:
    return [
        [row[name] - row["spread"][name][0] for row in rows],
        [row["spread"][name][1] - row[name] for row in rows],
    ]
