# SPDX-License-Identifier: Apache-2.0
"""Auto against AR in interleaved pairs: what looking for drafts costs where there are none, and what it brings
otherwise."""

from collections.abc import Sequence
from typing import Any

from wedlm.bench.end_to_end import capacity
from wedlm.bench.forced_acceptance import injected
from wedlm.bench.measure import Bench
from wedlm.bench.prompts import Arrival
from wedlm.bench.stats import TableRow, describe, ratio_row

NUM_BATCHES = 3  # smallest ones
_LOAD = 1.2  # arrivals faster than they can be served, so that speed decides when the last one ends


def pairs(bench: Bench) -> list[TableRow]:
    """Ratios of tokens a second. The sides of a pair take turns in going first."""
    workload, prompts, found = bench.settings.workload, bench.target.prompts, []
    for batch in workload.batches[:NUM_BATCHES]:
        arrivals = prompts.batch(batch, workload.prompt, workload.answer)
        own = "random weights" if prompts.tokenizer is None else "everyday questions"
        found += _pairs(bench, {"kind": own, "batch": batch}, arrivals)
        with injected(bench.target.engine):
            refused: dict[str, Any] = {"ignore_eos": True, "wedlm_draft_entropy": 1e9, "wedlm_lookup_drafts": 0}
            found += _pairs(bench, {"kind": "all rows drafted, all refused", "batch": batch}, arrivals, **refused)
        if prompts.tokenizer is not None:
            counting = [Arrival(0.0, prompts.counting(number), workload.answer) for number in range(batch)]
            found += _pairs(bench, {"kind": "counting", "batch": batch}, counting)
    if not bench.past_deadline("pairs: mixed arrivals"):
        count = max(1, workload.requests // 3)
        arrivals = prompts.arrivals(count, workload.answer, _LOAD * capacity(bench, count))
        found += _pairs(bench, {"kind": "mixed arrivals", "requests": count}, arrivals, "tok_per_s")
    return found


def _pairs(
    bench: Bench,
    label: dict[str, Any],
    arrivals: Sequence[Arrival],
    figure: str = "stream_tok_per_s",
    **options: Any,
) -> list[TableRow]:
    params = [
        bench.settings.params(mode, bench.settings.workload.answer, **options) for mode in ("autoregressive", "auto")
    ]
    found = []
    for number in range(-1, bench.settings.workload.pairs):
        if bench.past_deadline(f"pairs: {describe(label)}, pair {number + 1}"):
            break
        order = (0, 1) if number % 2 else (1, 0)
        sides = {side: bench.loop.serve(arrivals, params[side]) for side in order}
        if number >= 0:  # the first captures, compiles, and lets auto find out
            found.append((sides[0], sides[1]))
    if not found:
        return []
    row = ratio_row(label, found, figure)
    bench.report("pairs", row)
    return [row]
