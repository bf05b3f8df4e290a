# SPDX-License-Identifier: Apache-2.0
"""Parts with a fixed batch: step time by rows, by context and by stage; auto with drafts accepted at given rates."""

from typing import Any, NamedTuple

from wedlm.bench.forced_acceptance import injected
from wedlm.bench.host_profile import host_work
from wedlm.bench.measure import Bench, Case, take_turns
from wedlm.bench.settings import Settings
from wedlm.bench.stats import Figures, TableRow, make_row
from wedlm.engine.adaptive.draft_budget import Budget, DraftBudget, expected_step
from wedlm.engine.adaptive.fixed_rows import FixedRows
from wedlm.engine.sampling_params import SamplingParams

# However unsure: every row that the budget has, all of masked rows; every mask filled in each step, which runs 2W rows.
_ALL_ROWS: dict[str, Any] = {"wedlm_draft_entropy": 1e9, "wedlm_lookup_drafts": 0}
_ALL_MASKS: dict[str, Any] = {"wedlm_entropy_threshold": 1e9}
_TOKENS_A_STEP = (2.0, 3.0)  # at 16 rows; what auto is measured at besides the curves given
AUTO_WARM_STEPS = 60  # until it knows how drafts fare
_UNLIMITED = 3000


def _params(bench: Bench, mode: str, **options: Any) -> SamplingParams:
    """Parameters for requests that outlast every measurement."""
    most = min(_UNLIMITED, bench.target.engine.config.max_model_len)
    return bench.settings.params(mode, most, ignore_eos=True, **options)


def _prompts(bench: Bench, count: int, length: int | None = None) -> list[list[int]]:
    length = length or bench.settings.workload.prompt
    return [bench.target.prompts.of(number, length) for number in range(count)]


def _fixed(bench: Bench, batch: int, mode: str, length: int | None = None, **options: Any) -> Case:
    """A fixed batch for a fixed number of steps; the label has the rows that each sequence may run."""
    params = _params(bench, mode, **options)
    config = bench.target.engine.config
    window = params.wedlm_window_size or config.window_size(params.decoding_of(config.decoding))
    rows = 1 if mode == "autoregressive" else window if mode in ("verified", "auto") else 2 * window
    label: dict[str, Any] = {"mode": mode, "batch": batch, "rows": rows}
    if length is not None:
        label["context"] = length
    workload = bench.settings.workload
    prompts = _prompts(bench, batch, length)
    return Case(label, lambda _: bench.loop.batch(prompts, params, workload.warm_steps, workload.steps))


class FixedBatch(NamedTuple):
    """A batch whose sequences all have ``rows`` rows in each step."""

    mode: str
    batch: int
    rows: int


def fixed_batches(settings: Settings) -> list[FixedBatch]:
    """What ``steps`` measures."""
    batches, modes = settings.workload.batches, settings.modes
    found = [FixedBatch("autoregressive", batch, 1) for batch in batches]
    small = [batch for batch in batches if batch <= 32]
    found += [FixedBatch(mode, batch, 16) for mode in ("verified", "streaming") if mode in modes for batch in small]
    if "verified" in modes:
        wide = ((8, max(small, default=0)), (4, batches[-1]))
        found += [FixedBatch("verified", batch, rows) for rows, batch in wide if batch > 1]
    return found


def steps(bench: Bench) -> list[TableRow]:
    """Measure every batch with one row; with 16 rows up to batch 32, verified and streaming; with fewer rows for larger
    batches."""
    cases = []
    for mode, batch, rows in fixed_batches(bench.settings):
        options: dict[str, Any] = {}
        if mode == "verified":
            options = {"wedlm_window_size": rows, **_ALL_ROWS}
        elif mode == "streaming":
            options = {"wedlm_window_size": rows // 2, **_ALL_MASKS}
        cases.append(_fixed(bench, batch, mode, **options))
    return [_reported(bench, "steps", row) for row in take_turns(bench, "steps", cases)]


def _reported(bench: Bench, part: str, row: TableRow) -> TableRow:
    """The row beside vLLM's AR steps at the same batch, if those were measured."""
    row = bench.beside_vllm("steps", row, batch=row["batch"])
    bench.report(part, row)
    return row


def contexts(bench: Bench) -> list[TableRow]:
    """Measure one stream as its context grows."""
    longest = bench.target.engine.config.max_model_len - bench.settings.workload.steps * 8
    lengths = [length for length in bench.settings.workload.contexts if length <= longest]
    cases = [
        _fixed(bench, 1, mode, length, **options)
        for length in lengths
        for mode, options in (("autoregressive", {}), ("verified", _ALL_ROWS))
    ]
    rows = take_turns(bench, "contexts", cases)
    for row in rows:
        bench.report("contexts", row)
    return rows


def accept(bench: Bench) -> list[TableRow]:
    """Measure auto from a fresh start at each batch; every draft is certain enough, and drafts are accepted at the
    rates of each curve."""
    curves = {", ".join(f"{rate:g}" for rate in curve): curve for curve in bench.settings.curves}
    for tokens in _TOKENS_A_STEP:
        curves[f"{tokens:g} tokens at 16 rows"] = (_rate_for(tokens),)
    curves[f"all ({_tokens(1.0):.2g} tokens at 16 rows)"] = (1.0,)
    workload = bench.settings.workload
    params = _params(bench, "auto", **_ALL_ROWS)
    rows = []
    with injected(bench.target.engine) as chances:
        for batch in workload.batches:
            _try_all_budgets(bench, _prompts(bench, batch), params)
        for name, rates in curves.items():
            for batch in workload.batches:
                label = {"accepted": name, "rates": list(rates), "mode": "auto", "batch": batch}
                if not bench.past_deadline(f"accept: {name}, batch {batch}"):
                    chances.set(rates)
                    row = _accepted(bench, label, _prompts(bench, batch), params)
                    rows.append(_reported(bench, "accept", row))
    return rows


def _try_all_budgets(bench: Bench, prompts: list[list[int]], params: SamplingParams) -> None:
    """Run every step that auto may choose for this batch once, so that captures and compilations do not count later."""
    engine = bench.target.engine
    requests = bench.loop.start(prompts, params)
    assert engine.controller.draft_budget is not None
    for budget in engine.controller.draft_budget.can_pay(len(prompts), requests[0].decode.row_budget):
        engine.controller.draft_budget = FixedRows(engine.controller.costs, budget)
        bench.loop.steps(requests, 3)
    bench.loop.end(requests)


def _accepted(bench: Bench, label: dict[str, Any], prompts: list[list[int]], params: SamplingParams) -> TableRow:
    """Let auto learn with one batch, then measure others, whose contexts are as short as those of ``steps``."""
    engine, workload = bench.target.engine, bench.settings.workload
    assert engine.controller.draft_budget is not None
    engine.controller.draft_budget = DraftBudget(engine.controller.costs)
    bench.loop.batch(prompts, params, AUTO_WARM_STEPS, 1)
    runs = [bench.loop.batch(prompts, params, workload.warm_steps, workload.steps) for _ in range(workload.runs)]
    return make_row(label, runs, row_budget=engine.controller.draft_budget.budget.rows)


def _tokens(rate: float) -> float:
    return expected_step(Budget.of(16), (rate,) * 8, (1.0,) * 8)[0]


def _rate_for(tokens: float) -> float:
    """The rate, equal for all depths, that gives this many tokens per step at 16 rows."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if _tokens(middle) < tokens else (low, middle)
    return round(high, 3)


def host(bench: Bench) -> list[TableRow]:
    """Measure Python's time in a step apart from waiting for the device, at the smallest and the largest batch."""
    workload = bench.settings.workload

    def case(batch: int, mode: str) -> Case:
        params = _params(bench, mode, **({} if mode == "autoregressive" else _ALL_ROWS))

        def measure(_: int) -> Figures:
            requests = bench.loop.start(_prompts(bench, batch), params)
            try:
                bench.loop.steps(requests, workload.warm_steps)
                return host_work(bench.target.engine, workload.steps)
            finally:
                bench.loop.end(requests)

        return Case({"mode": mode, "batch": batch}, measure)

    batches = dict.fromkeys((workload.batches[0], workload.batches[-1]))
    cases = [case(batch, mode) for batch in batches for mode in ("autoregressive", "verified", "auto")]
    rows = take_turns(bench, "host", cases)
    for row in rows:
        bench.report("host", row)
    return rows
