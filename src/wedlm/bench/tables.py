# SPDX-License-Identifier: Apache-2.0
"""A run's rows as tables."""

from collections.abc import Sequence
from typing import Any

from wedlm.bench.record import LABELS
from wedlm.bench.settings import LLAMACPP_PARTS, PARTS
from wedlm.bench.stats import TableRow
from wedlm.tables import show_table

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


def show_tables(parts: dict[str, Sequence[TableRow]]) -> None:
    """Print one table for each part that has rows."""
    for part, rows in parts.items():
        if rows:
            labels = [name for name in LABELS if any(name in row for row in rows)]
            figures = [name for name in _SHOWN if any(name in row for row in rows) and name not in labels]
            texts = [
                [_text(row.get(name)) for name in labels] + [_figure(row, name) for name in figures] for row in rows
            ]
            title = f"{part}: {({**PARTS, **LLAMACPP_PARTS})[part]}"
            show_table(title, labels, [_SHOWN[name] for name in figures], texts)


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
