# SPDX-License-Identifier: Apache-2.0
"""A run's rows as tables."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from wedlm.bench.record import LABELS
from wedlm.bench.settings import LLAMACPP_PARTS, PARTS
from wedlm.bench.stats import TableRow

_SHOWN = {
    "tok_per_s": "tok/s",
    "stream_tok_per_s": "tok/s of a stream",
    "step_ms": "ms a step",
    "step_p95_ms": "p95",
    "tokens_per_step": "tokens/step",
    "rows_per_step": "rows/step",
    "row_budget": "chosen rows",
    "first_token_ms": "first token ms",
    "between_ms": "between ms",
    "between_p99_ms": "p99",
    "p99_over_median": "p99/median",
    "tokens_per_forward": "tokens/forward",
    "p_cache": "p_cache",
    "host_ms": "host ms",
    "schedule_ms": "schedule",
    "rows_ms": "rows",
    "launch_ms": "launch",
    "replay_ms": "replay",
    "fetch_ms": "fetch",
    "read_ms": "read",
    "deliver_ms": "deliver",
    "other_ms": "other",
    "wait_ms": "wait",
    "median_ratio": "auto ÷ AR",
    "ratio_of_means": "of means",
    "vs_ar": "x AR",
    "vs_vllm": "x vLLM AR",
    "vs_one_row": "x one row",
    "vs_quiet": "x quiet",
    "vs_llamacpp": "x llama.cpp",
    "runs": "runs",
}
# Figures whose spread stands beside them: half of it, in percent.
_SPREAD = ("tok_per_s", "step_ms", "host_ms")
_PIPE_WIDTH = 150


def show_tables(parts: dict[str, Sequence[TableRow]]) -> None:
    """One for each part that has rows, to standard output."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    for part, rows in parts.items():
        if rows:
            console.print(_table(f"{part}: {({**PARTS, **LLAMACPP_PARTS})[part]}", rows))
            console.print()


def _table(title: str, rows: Sequence[TableRow]) -> Table:
    labels = [name for name in LABELS if any(name in row for row in rows)]
    figures = [name for name in _SHOWN if any(name in row for row in rows) and name not in labels]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in labels:
        table.add_column(name)
    for name in figures:
        table.add_column(_SHOWN[name], justify="right")
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in labels), *(_figure(row, name) for name in figures))
    return table


def _figure(row: TableRow, name: str) -> str:
    text = _text(row.get(name))
    if name == "median_ratio":
        return "{} ({}-{})".format(text, *map(_text, row["spread"]["ratio"]))
    if name not in _SPREAD or not row.get(name):
        return text
    low, high = row["spread"][name]
    return f"{text} ±{50 * (high - low) / row[name]:.0f}%"


def _text(value: Any) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
