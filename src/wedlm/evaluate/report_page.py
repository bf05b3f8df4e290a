# SPDX-License-Identifier: Apache-2.0
"""Write a report: one self-contained HTML page, and tables in Markdown."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from wedlm.evaluate.compare import Comparison
from wedlm.evaluate.report import Section, TableRow
from wedlm.evaluate.result_folder import Run
from wedlm.plotting import Plot

_SCORE = ("mode", "questions", "score (%)", "Δ AR (points)", "Δ baseline (points)")
COLUMNS = {
    "generate": (*_SCORE, "same text as AR", "tokens / forward", "p_cache", "tokens / second", "cut at max_tokens"),
    "likelihood": (*_SCORE, "samples / second"),
}
_NOTHING, _BASELINE = "–", "Δ baseline (points)"


def columns(kind: str, baseline: bool) -> list[str]:
    """Headings of a table; ``baseline``: whether there is one to compare with."""
    return [name for name in COLUMNS[kind] if baseline or name != _BASELINE]


def cells(row: TableRow, baseline: bool = True) -> list[str]:
    """A row's cells, in the order of ``columns``."""
    result, speed = row.result, row.result.speed
    error = "" if result.stderr is None else f" ± {100 * result.stderr:.1f}"
    score = [
        row.run.label,
        str(result.num_samples),
        f"{100 * result.value:.1f}{error}",
        _difference(row.against_ar),
        *([_difference(row.against_baseline)] if baseline else []),
    ]
    if result.kind == "likelihood":
        return [*score, _figure(speed, "samples_per_second", ".2f")]
    same = _NOTHING if row.against_ar is None else f"{100 * row.against_ar.same_text:.1f} %"
    return [
        *score,
        same,
        _figure(speed, "tokens_per_forward", ".2f"),
        _figure(speed, "p_cache", ".3f"),
        _figure(speed, "tokens_per_second", ".1f"),
        _figure(speed, "num_cut", ".0f"),
    ]


def _figure(speed: Mapping[str, float], name: str, shape: str) -> str:
    return format(speed[name], shape) if name in speed else _NOTHING


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return _NOTHING
    return f"{100 * comparison.difference:+.1f} (p = {_p(comparison.p_value)})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def html_page(
    sections: Sequence[Section], plots: Sequence[Sequence[Plot]], title: str, baseline: Run | None = None
) -> str:
    """The page; ``plots`` has one list per section. Everything that a model or a file said is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    return environment.get_template("report.html.j2").render(
        title=title,
        sections=sections,
        plots=plots,
        baseline=baseline,
        columns=columns,
        cells=cells,
        num_runs=len({row.run.key for section in sections for row in section.rows}),
        environments=environments(sections),
    )


def environments(sections: Sequence[Section]) -> list[str]:
    """What the runs ran on, each kind once."""
    known = [row.run.environment for section in sections for row in section.rows]
    return list(dict.fromkeys(", ".join(f"{name} {value}" for name, value in e.items()) for e in known if e))


def markdown_page(sections: Sequence[Section], title: str, baseline: Run | None = None) -> str:
    """The tables, for inclusion in a document."""
    lines = [f"# {_markdown(title)}", ""]
    if baseline is not None:
        lines += [f"Baseline: {_markdown(baseline.model_label)}, {_markdown(baseline.label)} (`{baseline.key}`).", ""]
    for section in sections:
        names = ["model", *columns(section.kind, baseline is not None)]
        lines += [f"## {_markdown(section.title)}, {_markdown(section.metric)}", "", _line(names)]
        lines.append(_line(["---"] * len(names)))
        lines += [_line([row.run.model_label, *cells(row, baseline is not None)]) for row in section.rows]
        lines.append("")
    lines.append("Δ: on the questions that both answered; p: McNemar's exact test.")
    lines += [f"Run with {_markdown(text)}." for text in environments(sections)]
    return "\n".join(lines) + "\n"


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(map(_markdown, values)) + " |"


def _markdown(text: str) -> str:
    """Text in one line that Markdown shows unchanged."""
    for mark in "\\`*_[]<|":
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return " ".join(text.split())
