# SPDX-License-Identifier: Apache-2.0
"""A run: vLLM first, if requested, then the parts one after the other. Finished parts are on disk."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from wedlm.bench import end_to_end, laptop, pairs, steps
from wedlm.bench.duration import expected_seconds, in_words, measure_step_costs
from wedlm.bench.llamacpp import base_files, check_llamacpp
from wedlm.bench.measure import Bench
from wedlm.bench.record import Record
from wedlm.bench.settings import Settings
from wedlm.bench.stats import TableRow
from wedlm.bench.target import load_target
from wedlm.bench.vllm import check_vllm, measure_vllm, rows_of

_BASELINE_SHARE = 0.45  # of the budget
PARTS: dict[str, Callable[[Bench], list[TableRow]]] = {
    "latency": end_to_end.latency,
    "throughput": end_to_end.throughput,
    "serving": end_to_end.serving,
    "prefill": end_to_end.prefill,
    "scenarios": end_to_end.scenarios,
    "steps": steps.steps,
    "accept": steps.accept,
    "host": steps.host,
    "contexts": steps.contexts,
    "pairs": pairs.pairs,
}
Log = Callable[[str, TableRow | None], None]


def run_bench(
    settings: Settings,
    command: list[str],
    directory: Path | None,
    log: Log,
    stopped: Callable[[], bool] = lambda: False,
) -> Record:
    """Measure all parts. ``log`` gets (part, None) when one begins and (part, row) for each row. Once ``stopped()``,
    nothing new begins and finished rows are kept. Raises ValueError for anything that cannot be measured."""
    started = time.perf_counter()
    record, parts = Record(settings, command), dict(PARTS)
    found = _beside(settings, record, parts, directory, log)
    log("engine", None)
    target = load_target(settings)
    record.describe(target)
    bench = Bench(
        target=target,
        settings=settings,
        report=log,
        deadline=None if settings.budget_s is None else started + settings.budget_s,
        baseline_rows=found,
        stopped=stopped,
    )
    expected = expected_seconds(settings, target, measure_step_costs(target))
    if bench.deadline is not None:
        expected = min(expected, max(0.0, bench.deadline - time.perf_counter()))
    log(f"{', '.join(settings.parts)}: {in_words(expected)}; Ctrl-C ends early and keeps what is done", None)
    for part in settings.parts:
        # Beside llama.cpp a part begins with starting servers, which is not worth it when nothing is measured.
        if (settings.against == "llamacpp" or stopped()) and bench.past_deadline(part):
            continue
        log(part, None)
        record.values["parts"][part] = parts[part](bench)
        record.values["load_average"][part] = os.getloadavg()[0]
        record.finish(target, time.perf_counter() - started, bench.skipped)
        record.write(directory)
    record.finish(target, time.perf_counter() - started, bench.skipped)
    record.write(directory)
    return record


def _beside(
    settings: Settings,
    record: Record,
    parts: dict[str, Callable[[Bench], list[TableRow]]],
    directory: Path | None,
    log: Log,
) -> dict[str, list[TableRow]]:
    """Rows of vLLM by part, measured now. llama.cpp takes turns with us instead, so its ``parts`` are added."""
    if settings.against == "vllm":
        check_vllm()
        log("vLLM", None)
        found = measure_vllm(settings, settings.budget_s and settings.budget_s * _BASELINE_SHARE)
        record.values["vllm"] = found
        record.write(directory)
        rows = {part: list(rows) for part, rows in rows_of(found).items()}
        for part, row in ((part, row) for part, some in rows.items() for row in some):
            log(f"vLLM {part}", row)
        return rows
    if settings.against == "llamacpp":
        check_llamacpp(settings.llama_server)
        log("llama.cpp", None)
        files = {Path(name).stem: Path(name) for name in settings.gguf} or base_files()
        peer, about = laptop.find_peer(files, torch.get_num_threads(), settings.llama_server or "")
        record.values["llamacpp"] = {**about, "files": {kind: path.name for kind, path in files.items()}}
        parts |= {name: functools.partial(part, peer) for name, part in laptop.PARTS.items()}
    return {}
