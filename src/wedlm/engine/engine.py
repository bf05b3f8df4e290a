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
    """Admits, runs and finishes requests. ``scheduler`` says what runs, ``controller`` with how many rows, ``runner``
    runs it. ``clock`` returns seconds."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        pool: PagePool,
        tokenizer: EngineTokenizer | None,
        clock: Callable[[], float] = time.perf_counter,
        adapters: Adapters | None = None,
    ) -> None:
        """``adapters``: those that the model has; None: it takes none."""
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
        """Queue a request. ValueError, with nothing changed, if it is impossible. ``streamed`` and ``watched`` as in
        ``Request``; ``adapter``: the name of one that is loaded (UnknownAdapter), None for the model as it is. The
        first adaptive request has the costs of steps measured: up to a second.

        ``turn``: how many sequences its caller has asked for before it in the same breath. For each of them it lets
        ``TURN`` others go first, so that who asks for many does not keep out who asks for one.
        """
        if request_id in self.requests:
            raise ValueError(f"request_id is {request_id!r}, which is running; expected a new one")
        request = make_request(
            self.config,
            self.tokenizer,
            request_id,
            prompt_token_ids,
            params,
            order=(self._arrivals + turn * TURN, self._arrivals),
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
        """One forward for as many requests as fit; those that got tokens or ended. Empty if there is no work.

        Where the runner can, the next step is launched before this one is read: a request that turns out to have
        ended meanwhile runs once more, and its result is discarded.
        """
        if self._pending is None:
            plan = self._plan({})
            assert plan is not None
            if not plan.scheduled:
                assert not self.requests, "requests wait, but nothing can run"
                return []
            if not self.runner.can_launch(plan):
                return self.process(plan, self.runner.run(plan))
            self._pending = plan, self.runner.launch(plan)
        plan, pending = self._pending
        following = self._launch_after(plan)
        changed = self.process(plan, pending.wait())
        self._pending = following if self.requests else None
        return changed

    def measure_costs(self) -> None:
        """Measure now what adaptive steps of any size cost, instead of when the first request needs it."""
        self.controller.measure_costs(self.config.options.max_num_batched_tokens)

    def abort(self, request_id: str) -> Request | None:
        """End a request now; its tokens so far stay with it. None if it is not running (any more)."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
        return request

    def load_adapter(self, name: str, factors: RowFactors) -> LoadedAdapter:
        """Have an adapter by name, from the next request on. ValueError, with nothing changed, if it cannot be."""
        return self.adapters.load(name, factors)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter's name away. Requests that have it end with it; its memory is free after the last one.
        UnknownAdapter."""
        self.adapters.unload(name, self.adapters_in_use())

    def adapters_in_use(self) -> set[LoadedAdapter]:
        """Those of the requests that wait or run."""
        return {request.adapter for request in self.requests.values() if request.adapter is not None}

    def _plan(self, unread: Unread) -> StepPlan | None:
        """The next step, with its budgets; windows that it preempts are saved. None if it cannot be planned ahead."""
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
        return ahead, self.runner.launch(ahead)

    def process(self, plan: StepPlan, results: StepResults) -> list[Request]:
        """Deliver a step's results to the requests that still run."""
        self.controller.observe(plan, results)
        changed = []
        for one, result in zip(plan.scheduled, results, strict=True):
            request = one.request
            if request.output.finish_reason is not None:  # since the step was launched
                continue
            if result is None:
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
        """Append a window's tokens to the output. Why the request ends, or None."""
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
