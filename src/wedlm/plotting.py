# SPDX-License-Identifier: Apache-2.0
"""What the figures of evaluations, benchmarks and training share: panels, a legend below them, SVG."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from wedlm.extras import install_extras

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL_INCHES = (4.6, 3.4)
_LEGEND_LINE_INCHES = 0.18


@dataclass(frozen=True)
class Plot:
    """``svg`` is a whole SVG document; ``text`` describes it for those who cannot see it."""

    title: str
    text: str
    svg: str


def need_matplotlib() -> None:
    """Raises ValueError if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        command = install_extras("train")
        raise ValueError(f"plots need the package matplotlib, which is not installed: {command}, or --no-plots")


def group_by(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group items with the same key; keys come in the order of their first item."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def new_figure(count: int, columns: int | None = None) -> tuple["Figure", list["Axes"]]:
    """A figure of ``count`` panels, at most ``columns`` side by side (None: all of them)."""
    from matplotlib.figure import Figure  # without pyplot there is no window, and nothing stays behind

    width, height = _PANEL_INCHES
    columns = min(count, columns or count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, number) for number in range(1, count + 1)]
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=7)  # more numbers would touch each other
    return figure, panels


def place_legend(figure: "Figure", *panels: "Axes") -> None:
    """Put the legend below the panels, because names are long, and make the figure taller by it."""
    entries = [entry for axes in panels for entry in zip(*axes.get_legend_handles_labels(), strict=True)]
    columns = 1 if max(len(label) for _, label in entries) > 60 else 2
    height = _PANEL_INCHES[1] + _LEGEND_LINE_INCHES * (1 + math.ceil(len(entries) / columns))
    figure.set_size_inches(figure.get_figwidth(), height)
    figure.legend(*zip(*entries, strict=True), loc="outside lower left", fontsize="small", ncols=columns)


def finish_plot(figure: "Figure", title: str, text: str) -> Plot:
    """The figure as SVG."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # the same figure is the same file
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return Plot(title, text, file.getvalue())
