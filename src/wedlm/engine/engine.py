# SPDX-License-Identifier: Apache-2.0
"""The loop: requests in, one step at a time, finished requests out. Single-threaded; callers serialise access."""

import time
from collections.abc import Callable, Sequence

from wedlm.engine.adapters import Adapters, LoadedAdapter
from wedlm.engine.adaptive.controller import Controller
from wedlm.engine.admission import make_request
from wedlm.engine.delivery import append_tokens
from wedlm.engine.execution.pending import PendingStep
from wedlm.engine.execution.runner import Runner
from wedlm.engine.options import EngineConfig
from wedlm.engine.pages import PagePool
from wedlm.engine.plan import StepPlan, StepResults, WindowResult
from wedlm.engine.request import FinishReason, Request
from wedlm.engine.sampling_params import SamplingParams
from wedlm.engine.scheduler import Scheduler, Unread, unread_of
from wedlm.engine.text import EngineTokenizer
from wedlm.model.lora.row_factors import RowFactors

TURN = 64  # a batch, by default


class Engine:
    """Admits, runs and finishes requests. ``scheduler`` decides what runs, ``controller`` how many rows it gets, and
    ``runner`` runs it. ``clock`` returns seconds."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        pool: PagePool,
        tokenizer: EngineTokenizer | None,
        clock: Callable[[], float] = time.perf_counter,
        adapters: Adapters | None = None,
    ) -> None:
        """``adapters``: the adapters by name that the model has; None if it takes none."""
        self.adapters = Adapters(None, 0, 0) if adapters is None else adapters
        self.adapters.sweep(())  # those that a former engine's requests had
        self.config, self.runner, self.pool, self.tokenizer, self.clock = config, runner, pool, tokenizer, clock
        self.scheduler = Scheduler(pool, config.options.max_num_seqs, config.options.max_num_batched_tokens)
        self.controller = Controller(config.options, runner, clock)
        self.requests: dict[str, Request] = {}
        self._arrivals = 0
        self._pending: tuple[StepPlan, PendingStep] | None = None  # launched, and not read yet

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        streamed: bool = True,
        watched: bool = False,
        turn: int = 0,
        adapter: str | None = None,
    ) -> Request:
        """Queue a request. Raises ValueError, with nothing changed, if it can never run. ``streamed`` and ``watched``
        are as in ``Request``. ``adapter`` is the name of a loaded adapter (UnknownAdapter), or None for the model
        without one. The first adaptive request triggers the measurement of step costs, which takes up to a second.

        ``turn``: how many sequences the same call asked for before this one. For each of them the request lets ``TURN``
        others go first, so that a call for many sequences does not delay a call for one.
        """
        if request_id in self.requests:
            raise ValueError(f"request_id is {request_id!r}, which is running; expected a new one")
        first = params.priority if self.config.options.scheduling_policy == "priority" else 0
        request = make_request(
            self.config,
            self.tokenizer,
            request_id,
            prompt_token_ids,
            params,
            order=(first, self._arrivals + turn * TURN, self._arrivals),
            arrival_time=self.clock(),
            streamed=streamed,
            watched=watched,
            adapter=None if adapter is None else self.adapters.get(adapter),
        )
        self.scheduler.check(request)
        self.controller.prepare(request)
        self.scheduler.add(request)
        self._arrivals += 1
        self.requests[request_id] = request
        return request

    def step(self) -> list[Request]:
        """Run one forward for as many requests as fit, and return those that got tokens or ended. Empty if there is no
        work.

        Where the runner can, the next step is launched before this one is read: a request that turns out to have ended
        runs once more, and its result is discarded.
        """
        if self._pending is None:
            plan = self._plan({})
            assert plan is not None
            if not plan.scheduled and plan.preempted:  # the last window gave its pages to a prompt that was held back
                plan = self._plan({})
                assert plan is not None
            if not plan.scheduled:
                assert not self.requests, "requests wait, but nothing can run"
                return []
            if not self.runner.can_launch(plan):
                results = self.runner.run(plan)
                self.controller.limit(plan)
                return self.process(plan, results)
            self._pending = self._launch(plan)
        plan, pending = self._pending
        following = self._launch_after(plan)
        changed = self.process(plan, pending.wait())
        self._pending = following if self.requests else None
        return changed

    def measure_costs(self) -> None:
        """Measure now what adaptive steps of any size cost, instead of when the first request needs it."""
        self.controller.measure_costs(self.config.options.max_num_batched_tokens)

    def abort(self, request_id: str) -> Request | None:
        """End a request now; its tokens so far stay with it. Returns None if it is not running (any more)."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
        return request

    def load_adapter(self, name: str, factors: RowFactors) -> LoadedAdapter:
        """Load an adapter under a name, for requests from now on. Raises ValueError, with nothing changed, if that
        fails."""
        return self.adapters.load(name, factors)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter's name. Requests that use it finish with it, and its memory is free after the last one.
        Raises UnknownAdapter."""
        self.adapters.unload(name, self.adapters_in_use())

    def adapters_in_use(self) -> set[LoadedAdapter]:
        """The adapters of the requests that wait or run."""
        return {request.adapter for request in self.requests.values() if request.adapter is not None}

    def _plan(self, unread: Unread) -> StepPlan | None:
        """Plan the next step with its budgets, and save the windows that it preempts. None if it cannot be planned
        ahead."""
        self.controller.propose(self.scheduler.decoding())
        prefill_rows = None
        if self.controller.limits_prefill:
            prefill_rows = self.controller.prefill_rows(self.scheduler.rows_beside_prompts(unread))
        num_waiting = len(self.scheduler.waiting)
        plan = self.scheduler.schedule(prefill_rows, unread)
        if plan is None:
            return None
        if plan.preempted or len(self.scheduler.waiting) != num_waiting:
            self._note_starts(plan)
        self._save_windows(plan.preempted)
        return self.controller.set_row_budgets(plan)

    def _note_starts(self, plan: StepPlan) -> None:
        for one in plan.scheduled:
            if one.request.counters.start_time is None:
                one.request.counters.start_time = self.clock()

    def _save_windows(self, preempted: Sequence[Request]) -> None:
        for request in preempted:
            self.scheduler.save_window(request, self.runner.suspend(request))

    def _launch_after(self, plan: StepPlan) -> tuple[StepPlan, PendingStep] | None:
        """Launch the step after ``plan``, which has not been read, if that is possible."""
        ahead = self._plan(unread_of(plan))
        if ahead is None or not ahead.scheduled or not self.runner.can_launch(ahead):
            return None
        return self._launch(ahead)

    def _launch(self, plan: StepPlan) -> tuple[StepPlan, PendingStep]:
        pending = self.runner.launch(plan)
        self.controller.limit(plan)
        return plan, pending

    def process(self, plan: StepPlan, results: StepResults) -> list[Request]:
        """Deliver a step's results to the requests that still run."""
        self.controller.observe(plan, results)
        changed = []
        for one, result in zip(plan.scheduled, results, strict=True):
            request = one.request
            if request.output.finish_reason is not None:  # since the step was launched
                continue
            if result is None:
                if one.start + one.count > request.progress.num_cached:  # the window of the same step has seen to it
                    self.scheduler.update_cached(request, one.start + one.count)
                continue
            reason = self._deliver(request, result, one.num_lookup_drafts())
            cached, known = result.num_cached, len(request.output.tokens)
            self.scheduler.update_cached(request, cached if cached < known else known)
            if result.tokens:
                changed.append(request)
            if reason is not None:
                self._finish(request, reason)
        return changed

    def _deliver(self, request: Request, result: WindowResult, num_lookup_drafts: int) -> FinishReason | None:
        """Append a window's tokens to the output. Returns why the request ends, or None."""
        counters = request.counters
        counters.num_forwards += 1
        counters.num_rows += result.num_rows
        if result.num_drafts:
            counters.num_drafted += result.num_drafts
            counters.num_accepted += len(result.tokens) - 1
        if num_lookup_drafts:
            counters.num_lookup_drafted += num_lookup_drafts
            counters.num_lookup_accepted += len(result.tokens) - 1
        if counters.first_token_time is None and result.tokens:
            counters.first_token_time = self.clock()
        return append_tokens(request, result)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.scheduler.remove(request)
        self.runner.unload(request)
        self.controller.forget(request)
        if request.output.text is not None and reason != "stop":
            request.output.text.finish()
        del self.requests[request.request_id]
        request.counters.finish_time = self.clock()
        request.output.finish_reason = reason
        if self.adapters.any_unloaded:
            self.adapters.sweep(self.adapters_in_use())
        if not self.requests:
            self.controller.pause()
