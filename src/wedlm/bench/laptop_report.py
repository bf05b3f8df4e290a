# SPDX-License-Identifier: Apache-2.0
"""A run beside llama.cpp as Markdown: the table of README.md, and the whole report."""

from collections.abc import Iterator, Sequence
from typing import Any

from wedlm.bench.laptop import AR, BUSY, OURS, best_peer
from wedlm.bench.settings import LLAMACPP_PARTS
from wedlm.bench.stats import TableRow

_NAMES = {"autoregressive": "AR", "auto": "`auto`", "verified": "verified", "streaming": "streaming"}
_MISSING = ""
# Runs behind each figure of a whole report, and of one that may be quoted; load a thread at most.
_RUNS, _FEWEST, _BUSY = 5, 3, 0.5
Line = tuple[str, float | None, float | None, str]  # what, llama.cpp's figure, ours, unit


def headline(values: dict[str, Any]) -> str:
    """The table for newcomers: our figures beside llama.cpp's best. Parts that were not measured are left out."""
    lines = ["| | llama.cpp | wedlm | |", "| --- | --- | --- | --- |"]
    for what, theirs, ours, unit in _lines(values["parts"], values["settings"]["workload"]["chats"]):
        if ours is not None:
            lines.append(f"| {what} | {_figure(theirs, unit)} | {_figure(ours, unit)} | {_gain(theirs, ours, unit)} |")
    return "\n".join([*lines, *_caveat(values)])


def _caveat(values: dict[str, Any]) -> list[str]:
    """Notes that make the figures provisional or say what was cut; they stand below the figures wherever these are
    shown."""
    load, threads = values["load_average"]["start"], values.get("hardware", {}).get("threads", 1)
    asked = values["settings"]["workload"]["runs"]
    fewest = min((row.get("runs", asked) for rows in values["parts"].values() for row in rows), default=asked)
    reasons = [f"a figure of {fewest} run(s) instead of {_RUNS}"] if fewest < _FEWEST else []
    if load > _BUSY * threads:
        reasons.append(
            f"a load average of {load:.0f} before the run began, on {threads} threads: other programs slow both "
            "engines, and one whose threads wait for each other in every product more than the other"
        )
    said = ["", f"**Provisional, not to be quoted:** {'; '.join(reasons)}."] if reasons else []
    if _FEWEST <= fewest < _RUNS:
        said += ["", f"At least one figure is the median of {fewest} runs instead of {_RUNS}."]
    missing = [part for part in values.get("skipped", ()) if ":" not in part]
    if missing:
        said += ["", f"Not in this run, whose time was up: {', '.join(missing)}."]
    return said


def _lines(parts: dict[str, Sequence[TableRow]], chats: int) -> Iterator[Line]:
    step, chat = parts.get("step", ()), [row for row in parts.get("chat", ()) if row["kind"] == "all"]
    peer = _peer(step, "step_ms")
    for count in sorted({row["rows"] for row in step}):
        ours = _of(step, "step_ms", {"engine": OURS, "rows": count})
        what = "a step of one row (AR), context 256" if count == 1 else f"a step of {count} rows; llama.cpp: one row"
        yield what, peer, ours, "ms"
    peer = _peer(chat, "tok_per_s")
    count = chats * len({row["kind"] for row in parts.get("chat", ())} - {"all"})
    for mode in (AR, "verified", "auto", "streaming"):
        yield (
            f"{count} chat prompts, one stream: {_NAMES[mode]}",
            peer,
            _of(chat, "tok_per_s", {"engine": OURS, "mode": mode}),
            "tok/s",
        )
    streams = parts.get("streams", ())
    for batch in sorted({row["batch"] for row in streams}):
        some = [row for row in streams if row["batch"] == batch]
        best = max((row["tok_per_s"] for row in some if row["engine"] == OURS), default=None)
        yield f"{batch} streams at once", _peer(some, "tok_per_s"), best, "tok/s"
    long = parts.get("prompt", ())
    for length in {row["prompt"] for row in long}:
        yield (
            f"a prompt of {length:,} tokens",
            _peer(long, "tok_per_s"),
            _of(long, "tok_per_s", {"engine": OURS}),
            "tok/s",
        )
    cold = parts.get("cold", ())
    yield "a step of one row, weights in no cache", _peer(cold, "step_ms"), _of(cold, "step_ms", {"engine": OURS}), "ms"
    busy = [row for row in parts.get("busy", ()) if row["load"] == BUSY]
    yield "a step of one row, one core busy", _peer(busy, "step_ms"), _of(busy, "step_ms", {"engine": OURS}), "ms"


def _peer(rows: Sequence[TableRow], figure: str) -> float | None:
    best = best_peer(rows, figure)
    return None if best is None else best[figure]


def _of(rows: Sequence[TableRow], figure: str, label: dict[str, Any]) -> float | None:
    return next((row[figure] for row in rows if label.items() <= row.items()), None)


def _figure(value: float | None, unit: str) -> str:
    return _MISSING if value is None else f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _gain(theirs: float | None, ours: float, unit: str) -> str:
    """How many times as fast we are."""
    if theirs is None:
        return _MISSING
    gain = theirs / ours if unit == "ms" else ours / theirs
    return f"**{gain:.2f}x**" if gain >= 1 else f"{gain:.2f}x"


def report(values: dict[str, Any]) -> str:
    """The headline, how it was measured, and every row."""
    peer, hardware, settings = values["llamacpp"], values.get("hardware", {}), values["settings"]
    loads = ", ".join(f"{part} {load:.2f}" for part, load in values["load_average"].items())
    command = f"`wedlm {' '.join(values['command'])}`"
    text = [
        "# Beside llama.cpp",
        headline(values),
        f"{command}, {values['date']}. {hardware.get('cpu', 'CPU')}, {hardware.get('threads')} threads for each "
        f"engine. Load average at the start and after each part, the run's own included: {loads}. Medians of "
        f"{settings['workload']['runs']} runs, engines taking turns within each. {len(values.get('skipped', ()))} "
        "measurements were cut.",
        f"llama.cpp: {peer['version']}, {peer['system']}; OpenMP's way of waiting: {peer['waiting']}, the faster one. "
        f"It runs {', '.join(peer['files'].values())}, and the best of these is compared with; the prompt is not "
        "cached; everything else is as llama.cpp sets it (flash attention where it chooses it, 512 tokens a batch of a "
        "prompt, one slot for each stream). Its times of one stream are by its own clock, which leaves out the way to "
        "the server and back.",
        f"wedlm: {values.get('target', {}).get('name')}, {settings['engine'].get('quantization')}. Its times contain "
        "everything from the request to its last token. Answers of at most "
        f"{settings['workload']['answer']} tokens; a ratio of steps is ours over llama.cpp's, so that less is better.",
    ]
    for part, rows in values["parts"].items():
        if rows:
            text += [f"## {part}: {LLAMACPP_PARTS[part]}", _table(rows)]
    return "\n\n".join(text) + "\n"


_COLUMNS = {
    "kind": "kind",
    "batch": "streams",
    "engine": "engine",
    "mode": "mode",
    "rows": "rows",
    "prompt": "prompt",
    "load": "load",
    "copies": "copies",
    "step_ms": "ms a step",
    "tok_per_s": "tok/s",
    "tokens_per_forward": "tokens/forward",
    "vs_one_row": "x one row",
    "vs_ar": "x our AR",
    "vs_quiet": "x quiet",
    "vs_llamacpp": "x llama.cpp",
    "runs": "runs",
}


def _table(rows: Sequence[TableRow]) -> str:
    names = [name for name in _COLUMNS if any(name in row for row in rows)]
    lines = [[_COLUMNS[name] for name in names], ["---"] * len(names)]
    lines += [[_cell(row, name) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: TableRow, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, float):
        return _MISSING if value is None else str(value)
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    spread = row["spread"].get(name) if name in ("step_ms", "tok_per_s") else None
    return text if spread is None else f"{text} ({spread[0]:.3g}-{spread[1]:.3g})"
