# SPDX-License-Identifier: Apache-2.0
"""Parts that run requests to their ends: one stream, batches, arrivals, a long prompt, the paper's scenarios."""

from collections.abc import Sequence
from typing import Any

from wedlm.bench.measure import Bench, Case, beside_ar, take_turns
from wedlm.bench.prompts import SCENARIOS, Arrival
from wedlm.bench.stats import Figures, TableRow, rounded

LOAD = 0.7  # of what the baseline can serve


def latency(bench: Bench) -> list[TableRow]:
    """Run one request after the other; figures are medians over as many prompts as there are runs."""
    workload = bench.settings.workload

    def case(mode: str) -> Case:
        def measure(run: int) -> Figures:
            prompt = bench.target.prompts.of(max(0, run), workload.prompt)
            return bench.loop.serve(
                [Arrival(0.0, prompt, workload.answer)], bench.settings.params(mode, workload.answer)
            )

        return Case({"mode": mode}, measure)

    rows = beside_ar(take_turns(bench, "latency", [case(mode) for mode in bench.settings.modes]))
    return [_reported(bench, "latency", bench.beside_vllm("latency", row)) for row in rows]


def throughput(bench: Bench) -> list[TableRow]:
    """Run a batch of requests at once, to the end of the last; at the end those with the longest answers run alone."""
    workload = bench.settings.workload
    found = []
    for batch in workload.batches:
        arrivals = bench.target.prompts.batch(batch, workload.prompt, workload.answer)
        cases = [_case(bench, mode, arrivals, batch=batch) for mode in bench.settings.modes]
        rows = beside_ar(take_turns(bench, "throughput", cases))
        found += [_reported(bench, "throughput", bench.beside_vllm("throughput", row, batch=batch)) for row in rows]
    return found


def find_rate(bench: Bench) -> float:
    """Requests a second: the requested rate, or 0.7 of what the baseline serves when all requests are there at once.
    The baseline is vLLM's AR if it was measured, otherwise ours."""
    settings = bench.settings
    if settings.rate is not None:
        return settings.rate
    baseline = bench.baseline("serving", load="all at once")
    if baseline is not None:
        return rounded(LOAD * baseline["requests"] / baseline["seconds"])
    return rounded(LOAD * capacity(bench, settings.workload.requests))


def capacity(bench: Bench, count: int) -> float:
    """Requests a second that our AR serves when all are there at once."""
    most = bench.settings.workload.answer
    everything = bench.target.prompts.arrivals(count, most, float("inf"))
    for _ in range(2):  # the first captures and compiles
        figures = bench.loop.serve(everything, bench.settings.params("autoregressive", most))
    return count / figures["seconds"]


def serving(bench: Bench) -> list[TableRow]:
    """Run the same arrivals in every mode."""
    workload, rate = bench.settings.workload, find_rate(bench)
    arrivals = bench.target.prompts.arrivals(workload.requests, workload.answer, rate)
    label = {"requests": workload.requests, "requests_per_s": rate}
    rows = beside_ar(
        take_turns(bench, "serving", [_case(bench, mode, arrivals, **label) for mode in bench.settings.modes])
    )
    found = []
    for row in rows:
        tail = rounded(row["between_p99_ms"] / row["between_ms"]) if row["between_ms"] else 0.0
        beside = bench.beside_vllm("serving", {**row, "p99_over_median": tail}, load="arrivals")
        found.append(_reported(bench, "serving", beside))
    return found


def prefill(bench: Bench) -> list[TableRow]:
    """Run one long prompt whose answer is one token, with nothing cached, in chunks as configured and as a whole."""
    scheduler = bench.target.engine.scheduler
    usual = scheduler.max_num_batched_tokens
    length = min(bench.settings.workload.long_prompt, bench.target.prompts.max_model_len - 2)
    arrivals = [Arrival(0.0, bench.target.prompts.of(0, length), 1)]

    def case(chunk: int) -> Case:
        def measure(_: int) -> Figures:
            scheduler.max_num_batched_tokens = chunk
            try:
                figures = bench.loop.serve(arrivals, bench.settings.params("autoregressive", 1))
            finally:
                scheduler.max_num_batched_tokens = usual
            return {"tok_per_s": length / figures["seconds"], "first_token_ms": figures["first_token_ms"]}

        return Case({"prompt": length, "chunk": chunk}, measure)

    rows = take_turns(bench, "prefill", [case(chunk) for chunk in dict.fromkeys((usual, length))])
    return [_reported(bench, "prefill", bench.beside_vllm("prefill", row, prompt=length)) for row in rows]


def scenarios(bench: Bench) -> list[TableRow]:
    """Run prompts whose answers follow a pattern, and prompts whose answers do not."""
    workload, found = bench.settings.workload, []
    for name, text in SCENARIOS.items():
        arrivals = [Arrival(0.0, bench.target.prompts.ask(text), workload.answer)]
        cases = [_case(bench, mode, arrivals, scenario=name) for mode in bench.settings.modes]
        rows = beside_ar(take_turns(bench, "scenarios", cases, warm=name == "counting"))
        found += [_reported(bench, "scenarios", row) for row in rows]
    return found


def _case(bench: Bench, mode: str, arrivals: Sequence[Arrival], **label: Any) -> Case:
    params = bench.settings.params(mode, bench.settings.workload.answer)
    return Case({**label, "mode": mode}, lambda _: bench.loop.serve(arrivals, params))


def _reported(bench: Bench, part: str, row: TableRow) -> TableRow:
    bench.report(part, row)
    return row
