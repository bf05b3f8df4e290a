# SPDX-License-Identifier: Apache-2.0
"""The controller decides by measured costs: the rows of adaptive windows, and the rows of prompt chunks
beside windows."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from wedlm.algorithm.lookup import Proposal, TextLookup
from wedlm.engine.adaptive.draft_budget import DraftBudget, longest_draft
from wedlm.engine.adaptive.lookup_budget import LookupBudget, RequestLookup, StepLoad
from wedlm.engine.adaptive.prefill_budget import PrefillBudget
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.options import EngineOptions
from wedlm.engine.plan import StepPlan, StepResults
from wedlm.engine.request import Request

_MOST_PREFILL_ROWS = 1024  # larger forwards cost in proportion, so the table is extrapolated


class CostSource(Protocol):
    """A way to run steps, asked only for what steps cost."""

    @property
    def has_padded_costs(self) -> bool:
        """Whether a step costs as much as one of the next larger captured size."""
        ...

    def measure_costs(self, costs: StepCosts, most_rows: int) -> None:
        """Add the missing sizes up to ``most_rows`` to the table. Runs forwards for up to a second."""
        ...


class Controller:
    """The only owner of step costs, of the budgets that follow them, and of the clock that measures them.

    Costs are measured when a request or a step first needs them, outside the scheduler and outside any step's time.
    """

    def __init__(self, options: EngineOptions, source: CostSource, clock: Callable[[], float]) -> None:
        ratio = options.chunk_step_ratio
        self.chunk_step_ratio = math.inf if ratio is None else ratio
        self._max_num_seqs, self._max_num_batched_tokens = options.max_num_seqs, options.max_num_batched_tokens
        self._source, self._clock = source, clock
        self.costs = StepCosts([], source.has_padded_costs)
        self._most_rows_measured = 0
        self.prefill_budget: PrefillBudget | None = None  # since prompts and windows first met
        self.draft_budget: DraftBudget | None = None  # since the first adaptive request
        self._lookup_budget = LookupBudget()
        self._last_read: float | None = None  # when the last step was read, if it had windows
        self._laid_out_for = 1  # its row budget, which laid out the windows of the step after it

    def measure_costs(self, most_rows: int) -> None:
        """Extend the table to ``most_rows`` rows, as far as a step can have them. No step's time includes this."""
        most_rows = min(most_rows, self._max_num_batched_tokens)
        if most_rows > self._most_rows_measured:
            self._last_read = None
            self._source.measure_costs(self.costs, most_rows)
            self._most_rows_measured = most_rows  # only now, so that a call after an error measures again

    def prepare(self, request: Request) -> None:
        """For an adaptive request, make sure that its steps' costs are known, and start from the current row budget."""
        decode = request.decode
        if not decode.is_adaptive:
            return
        self.measure_costs(decode.max_rows * self._max_num_seqs)
        if self.draft_budget is None:
            self.draft_budget = DraftBudget(self.costs)
        request.limits.max_rows = min(decode.row_budget, self.draft_budget.budget.rows)

    @property
    def limits_prefill(self) -> bool:
        """Whether prompt chunks beside windows are limited."""
        return self.chunk_step_ratio < math.inf

    def prefill_rows(self, window_rows: int | None) -> int | None:
        """The most rows of prompt chunks beside ``window_rows`` rows of streamed windows. None means no limit, as when
        there are no such windows."""
        if window_rows is None:
            return None
        if self.prefill_budget is None:
            self.measure_costs(_MOST_PREFILL_ROWS)
            self.prefill_budget = PrefillBudget(self.costs, self.chunk_step_ratio)
        return self.prefill_budget.chunk_rows(window_rows)

    def propose(self, requests: Sequence[Request]) -> None:
        """Look up what may follow the texts of windows that may run in the next step, and choose how much of it each
        takes."""
        load: StepLoad | None = None
        for request in requests:
            decode, limits, text = request.decode, request.limits, request.output.tokens
            if not decode.max_lookup:
                continue
            if limits.lookup is None:
                limits.lookup = RequestLookup(TextLookup(text))
            limits.proposal = None
            if decode.is_adaptive and limits.lookup.rests(len(requests)):
                continue
            # A step that has not been read may use up the first ones.
            length, tokens = limits.lookup.find(2 * decode.max_lookup + 1, decode.stop_token_ids)
            most = max(0, min(len(tokens), decode.max_lookup, request.max_tokens - request.num_output_tokens - 1))
            if length and decode.is_adaptive:
                load = self._load(len(requests)) if load is None else load
                most = self._lookup_budget.choose(load, limits.lookup, length, most)
            limits.lookup.note(most > 0)
            if length:
                limits.proposal = Proposal(len(text), tokens, length, most)

    def _load(self, num_windows: int) -> StepLoad:
        """The next step's load without drafts from texts."""
        assert self.draft_budget is not None
        budget = self.draft_budget.budget
        seconds = self.draft_budget.seconds_beside(num_windows, budget.rows)
        tokens, rows = self.draft_budget.expected()
        rows = budget.rows if self.costs.padded else rows
        return StepLoad(self.costs, seconds, num_windows * rows, num_windows * tokens, rows, tokens, *budget)

    def forget(self, request: Request) -> None:
        """The request has ended: drop what its text has shown, even if the caller keeps the request."""
        request.limits.lookup = request.limits.proposal = None

    def set_row_budgets(self, plan: StepPlan) -> StepPlan:
        """Add to the plan the rows for adaptive windows. Call ``limit`` once it runs."""
        adaptive = [one.request for one in plan.scheduled if one.is_window and one.request.decode.is_adaptive]
        if not adaptive:
            return plan
        assert self.draft_budget is not None
        most = max(request.decode.row_budget for request in adaptive)
        budget = self.draft_budget.choose(sum(one.is_window for one in plan.scheduled), most)
        return replace(plan, row_budget=budget.rows, max_drafts=budget.drafts)

    def limit(self, plan: StepPlan) -> None:
        """Note the most rows that adaptive windows can have after a step that runs, or that has run. A plan may be
        dropped, and then they stay as wide as they are."""
        if self.draft_budget is None:
            return
        for one in plan.scheduled:
            decode = one.request.decode
            if one.is_window and decode.is_adaptive:
                one.request.limits.max_rows = min(decode.row_budget, plan.row_budget)

    def observe(self, plan: StepPlan, results: StepResults) -> None:
        """Learn from a step that has just been read: what it cost, and what became of drafts."""
        windows = [result for result in results if result is not None]
        now, last = self._clock(), self._last_read
        self._last_read = now if windows else None
        row_budget, self._laid_out_for = self._laid_out_for, plan.row_budget
        if self.prefill_budget is None and self.draft_budget is None:
            return
        if last is not None and windows:
            rows = sum(result.num_rows for result in windows)
            looked_up = any(one.num_lookup_drafts() for one in plan.scheduled)
            chunk_rows = sum(one.count for one in plan.scheduled if not one.is_window)
            if self.prefill_budget is not None:
                self.prefill_budget.observe(rows, chunk_rows, now - last)
            if self.draft_budget is not None and not chunk_rows and not looked_up:
                self.draft_budget.observe_time(len(windows), rows, now - last, row_budget)
        if self.draft_budget is not None:
            self._observe_drafts(self.draft_budget, plan, results, len(windows))

    def _observe_drafts(self, budget: DraftBudget, plan: StepPlan, results: StepResults, num_windows: int) -> None:
        outcomes: Counter[tuple[int, int, int]] = Counter()  # most windows of a large batch have the same
        for one, result in zip(plan.scheduled, results, strict=True):
            decode, limits = one.request.decode, one.request.limits
            if result is None or not decode.is_adaptive:
                continue
            drafts, accepted = result.num_drafts, len(result.tokens) - 1
            if one.proposal is not None and limits.lookup is not None:
                self._lookup_budget.observe(limits.lookup, one.proposal, one.request.output.tokens, result.tokens)
            if not one.num_lookup_drafts():
                outcomes[drafts, accepted, limits.longest_draft] += 1
            most = min(plan.max_drafts, decode.max_drafts)
            limits.longest_draft = longest_draft(result.num_rows, drafts, accepted, most)
        for outcome, count in outcomes.items():
            budget.observe(*outcome, num_windows, count)

    def pause(self) -> None:
        """Nothing runs for a while, so the next step's time does not begin when the last one ended."""
        self._last_read = None
