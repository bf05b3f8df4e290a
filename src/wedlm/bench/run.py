# SPDX-License-Identifier: Apache-2.0
"""A run: vLLM first, if asked for, then the parts one after the other; what is done is on disk."""

import time
from collections.abc import Callable
from pathlib import Path

from wedlm.bench import end_to_end, pairs, steps
from wedlm.bench.measure import Bench
from wedlm.bench.record import Record
from wedlm.bench.settings import Settings
from wedlm.bench.stats import TableRow
from wedlm.bench.target import load_target
from wedlm.bench.vllm import check_against, measure_vllm, rows_of

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


def run_bench(
    settings: Settings, command: list[str], directory: Path | None, log: Callable[[str, TableRow | None], None]
) -> Record:
    """Measure all parts; ``log`` gets (part, None) when one begins and (part, row) for each row. ValueError for what
    cannot be measured."""
    check_against(settings.against)
    started = time.perf_counter()
    record = Record(settings, command)
    found = {}
    if settings.against is not None:
        log("vLLM", None)
        found = measure_vllm(settings, settings.budget_s and settings.budget_s * _BASELINE_SHARE)
        record.values["vllm"] = found
        record.write(directory)
        for part, rows in rows_of(found).items():
            for row in rows:
                log(f"vLLM {part}", row)
    log("engine", None)
    target = load_target(settings)
    record.describe(target)
    bench = Bench(
        target=target,
        settings=settings,
        report=log,
        deadline=None if settings.budget_s is None else started + settings.budget_s,
        baseline_rows={part: list(rows) for part, rows in rows_of(found).items()},
    )
    for part in settings.parts:
        log(part, None)
        record.values["parts"][part] = PARTS[part](bench)
        record.finish(target, time.perf_counter() - started, bench.skipped)
        record.write(directory)
    return record
