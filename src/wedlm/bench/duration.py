# SPDX-License-Identifier: Apache-2.0
"""How long the chosen parts of a run will take, announced before they begin. The estimate is right to a factor of two,
without captures and compilation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wedlm.bench.end_to_end import LOAD
from wedlm.bench.pairs import NUM_BATCHES
from wedlm.bench.prompts import SCENARIOS, Arrival
from wedlm.bench.settings import LLAMACPP_PARTS, Settings
from wedlm.bench.steps import AUTO_WARM_STEPS, fixed_batches
from wedlm.bench.target import Target

_MEASURED_ROWS = 128
# In the time of an empty step: few rows cost nothing that can be measured, but those of long prompts do.
_MOST_FREE_ROWS = 200
_AUTO_ROWS = 4  # of a sequence, on average
# Steps of one row, in engines of both kinds, that one run of a part beside llama.cpp takes at the usual workload.
_LLAMACPP_STEPS = {"step": 600, "chat": 7000, "streams": 3500, "prompt": 2500, "cold": 600, "busy": 900}
_LLAMACPP_START_STEPS = 1500  # until its servers are up, once a part


@dataclass(frozen=True)
class StepCosts:
    """What steps cost: ``base_s`` seconds, and ``row_s`` for each row, be it of a prompt, a window or another
    sequence."""

    base_s: float
    row_s: float

    def of(self, num_rows: float) -> float:
        """Seconds of a step with this many rows."""
        return self.base_s + num_rows * self.row_s


def measure_step_costs(target: Target) -> StepCosts:
    """Measure an AR step of one stream, and what the rows of a prompt add to a step."""
    from wedlm.bench.loop import Loop
    from wedlm.engine.sampling_params import SamplingParams

    def seconds(num_rows: int, num_tokens: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, decoding="autoregressive", ignore_eos=True)
        arrivals = [Arrival(0.0, target.prompts.of(0, num_rows), num_tokens)]
        return min(Loop(target).serve(arrivals, params)["seconds"] for _ in range(2))  # the first one warms up

    few, many = 16, min(_MEASURED_ROWS, target.prompts.max_model_len - 2)
    short, long, tokens = seconds(few, 8), seconds(many, 1), 8
    # short = tokens * base + (few + tokens - 1) * row, long = base + many * row
    row_s = (tokens * long - short) / (tokens * many - few - tokens + 1)
    base_s = max((short - (few + tokens - 1) * row_s) / tokens, 0.0)  # a busy machine's clock may say less
    return StepCosts(base_s, max(row_s, base_s / _MOST_FREE_ROWS))


def expected_seconds(settings: Settings, target: Target, costs: StepCosts) -> float:
    """Expected seconds of the settings' parts together, given what steps cost."""
    if settings.against == "llamacpp":
        return _beside_llamacpp(settings) * costs.of(1)
    return sum(_PARTS[part](_Work(settings, target, costs)) for part in settings.parts)


def _beside_llamacpp(settings: Settings) -> float:
    """In steps of one row."""
    workload = settings.workload
    share = {"chat": workload.chats * workload.answer / 256, "streams": workload.answer / 64}
    return sum(
        _LLAMACPP_START_STEPS + _LLAMACPP_STEPS[part] * share.get(part, workload.steps / 32) * (workload.runs + 1)
        for part in settings.parts
        if part in LLAMACPP_PARTS
    )


class _Work:
    """Seconds of what parts consist of."""

    def __init__(self, settings: Settings, target: Target, costs: StepCosts) -> None:
        self.settings, self.workload, self.target, self.costs = settings, settings.workload, target, costs
        self.runs, self.modes = settings.workload.runs + 1, len(settings.modes)
        self.prompt_s = len(target.prompts.of(0, settings.workload.prompt)) * costs.row_s

    def fixed(self, batch: int, rows: float, prompt_s: float | None = None) -> float:
        """All runs of a case with a fixed batch, whose sequences have ``rows`` rows."""
        steps = self.workload.steps + self.workload.warm_steps
        prompts_s = batch * (self.prompt_s if prompt_s is None else prompt_s)
        return self.runs * (prompts_s + steps * self.costs.of(batch * rows))

    def answers(self, batch: int) -> float:
        """A batch to the end of its answers."""
        return batch * self.prompt_s + self.workload.answer * self.costs.of(batch)

    def at_once(self, arrivals: Sequence[Arrival]) -> float:
        """All arrivals without waiting for one."""
        rows = sum(len(one.prompt) + one.max_tokens for one in arrivals)
        return rows * self.costs.row_s + max(one.max_tokens for one in arrivals) * self.costs.base_s

    def arrivals(self, load: float, rate: float | None = None) -> float:
        """Requests that arrive at ``rate``, or at ``load`` times what can be served, to the end of the last."""
        count, most, arrivals = self.workload.requests, self.workload.answer, self.target.prompts.arrivals
        least = self.at_once(arrivals(count, most, float("inf")))
        last = arrivals(count, most, rate or load * count / least)[-1].at_s
        return max(last, least) + self.answers(1)

    def serving(self) -> float:
        rate = self.settings.rate
        found = self.runs * self.modes * self.arrivals(LOAD, rate)
        return found if rate else found + 2 * self.arrivals(1.0)

    def pairs(self) -> float:
        kinds = 2 if self.target.prompts.tokenizer is None else 3
        batches = self.workload.batches[:NUM_BATCHES]
        served = kinds * sum(map(self.answers, batches)) + self.arrivals(1.0) / 3
        return (self.workload.pairs + 1) * 2 * served

    def accept(self) -> float:
        once = sum(AUTO_WARM_STEPS * self.costs.of(batch * _AUTO_ROWS) for batch in self.workload.batches)
        batches = sum(self.fixed(batch, _AUTO_ROWS) for batch in self.workload.batches)
        return (len(self.settings.curves) + 3) * (once + batches)

    def contexts(self) -> float:
        lengths = self.workload.contexts
        return sum(self.fixed(1, rows, length * self.costs.row_s) for length in lengths for rows in (1, 16))


_PARTS: dict[str, Callable[[_Work], float]] = {
    "latency": lambda work: work.runs * work.modes * work.answers(1),
    "throughput": lambda work: work.runs * work.modes * sum(map(work.answers, work.workload.batches)),
    "serving": _Work.serving,
    "prefill": lambda work: work.runs * 2 * work.costs.of(work.workload.long_prompt),
    "scenarios": lambda work: (work.workload.runs * len(SCENARIOS) + 1) * work.modes * work.answers(1),
    "steps": lambda work: sum(work.fixed(case.batch, case.rows) for case in fixed_batches(work.settings)),
    "accept": _Work.accept,
    "host": lambda work: sum(
        work.fixed(batch, rows)
        for batch in {work.workload.batches[0], work.workload.batches[-1]}
        for rows in (1, 16, 16)
    ),
    "contexts": _Work.contexts,
    "pairs": _Work.pairs,
}


def in_words(seconds: float) -> str:
    """The duration in words, at least five seconds."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    return f"about {round(2 * seconds / 60) / 2:g} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
