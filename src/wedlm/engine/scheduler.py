# SPDX-License-Identifier: Apache-2.0
"""Which requests run in the next step, and with which pages. Knows no tensors."""

from collections import deque
from collections.abc import Callable
from operator import attrgetter

from wedlm.engine.pages import PagePool
from wedlm.engine.request import Request, StepPlan, WindowSnapshot, Work


class Scheduler:
    """First come, first served, with one token budget a step for windows and prompt chunks alike.

    ``suspend(request)`` is called when a running request is preempted and returns its window, the only state besides
    tokens that must survive. Preemption takes the latest arrival; since ``admit`` refuses a request that could not run
    alone, the earliest one always gets on. ``chunk_rows(rows of windows)``: most rows of prompt chunks beside those.
    """

    def __init__(
        self,
        pool: PagePool,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        suspend: Callable[[Request], WindowSnapshot],
        chunk_rows: Callable[[int], int] | None = None,
    ) -> None:
        self.pool = pool
        self._chunk_rows = chunk_rows
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._suspend = suspend
        self._step = 0

    def add(self, request: Request) -> None:
        """Queue a request. ValueError if it could never run, even alone."""
        rows = _max_rows(request)
        if rows > self.max_num_batched_tokens:
            raise ValueError(
                f"wedlm_window_size is {request.decode.window_size}, which can take {rows} rows a step; "
                f"expected at most max_num_batched_tokens, {self.max_num_batched_tokens}"
            )
        prompt, new = len(request.prompt_token_ids), request.max_tokens
        slots = min(prompt + new + rows, request.decode.max_positions)
        if self.pool.pages_for(slots) > self.pool.num_pages:
            raise ValueError(
                f"the prompt has {prompt} tokens and max_tokens is {new}: with {rows} rows of window they need {slots} "
                f"cache slots; expected at most {self.pool.num_pages * self.pool.page_size} (kv_cache_bytes)"
            )
        self.waiting.append(request)

    def schedule(self) -> StepPlan:
        """Plan the next step; empty only if nothing waits or runs."""
        plan = self._schedule({})
        assert plan is not None
        return plan

    def schedule_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after ``plan``, which nobody has read yet; pages are reserved for whatever it may commit.

        None if that takes a preemption, or if ``plan`` leaves nothing to do.
        """
        ahead = self._schedule({work.request.request_id: work for work in plan.work})
        return ahead if ahead is not None and ahead.work else None

    def _schedule(self, unread: dict[str, Work]) -> StepPlan | None:
        """The step after one that does ``unread``, by request. None if pages run short before it is read."""
        self._step += 1
        planned: dict[str, Work] = {}
        budget = self.max_num_batched_tokens
        chunk_budget = self._chunk_budget(unread)
        preempted = False
        # Least recently served first, so that a budget too small for all starves nobody.
        for request in sorted(self.running, key=attrgetter("last_step", "arrival")):
            done = unread.get(request.request_id)
            if done is not None and _ends(done):
                continue
            while not preempted or request in self.running:
                work = self._plan(request, _start(request, done), budget, chunk_budget)
                if work is None:
                    break
                # For each window of each step: ``min`` would cost more than all else in these two lines.
                slots, most = work.start + work.count, request.decode.max_positions
                if self.pool.reserve(request.request_id, slots if slots < most else most):
                    planned[request.request_id] = work
                    request.last_step = self._step
                    budget -= work.count
                    chunk_budget -= 0 if work.decodes else work.count
                    break
                if unread:
                    return None
                victim = max(self.running, key=lambda r: r.arrival)
                self._preempt(victim)
                preempted = True
                if (lost := planned.pop(victim.request_id, None)) is not None:
                    budget += lost.count
                    chunk_budget += 0 if lost.decodes else lost.count
        while self.waiting and not preempted and len(self.running) < self.max_num_seqs:
            admitted = self._admit(self.waiting[0], budget, chunk_budget)
            if admitted is None:
                break
            self.running.append(self.waiting.popleft())
            planned[admitted.request.request_id] = admitted
            admitted.request.last_step = self._step
            budget -= admitted.count
            chunk_budget -= 0 if admitted.decodes else admitted.count
        return StepPlan(sorted(planned.values(), key=attrgetter("decodes"), reverse=True))

    def _chunk_budget(self, unread: dict[str, Work]) -> int:
        """Rows that chunks may have in a step, for the sake of the windows beside them."""
        if self._chunk_rows is None:
            return self.max_num_batched_tokens
        windows = [r for r in self.running if _start(r, unread.get(r.request_id)) >= r.window.cached]
        if not any(request.streamed for request in windows):
            return self.max_num_batched_tokens
        if len(windows) == len(self.running) and not self.waiting:
            return self.max_num_batched_tokens
        return self._chunk_rows(sum(_max_rows(request) for request in windows))

    def _plan(self, request: Request, start: int, budget: int, chunk_budget: int) -> Work | None:
        """The request's next chunk or window, if the budget holds it."""
        missing = request.window.cached - start
        decodes = missing <= 0
        count = _max_rows(request) if decodes else min(missing, budget, chunk_budget)
        if count > budget or count <= 0:
            return None
        return Work(request, decodes, count, self.pool.table(request.request_id), start)

    def _admit(self, request: Request, budget: int, chunk_budget: int) -> Work | None:
        """Open a table and plan the first chunk, if all tokens to cache and a first window would fit now."""
        if budget <= 0:
            return None
        request.num_cached = self.pool.open(request.request_id, request.tokens, request.window.cached)
        needed = min(request.window.cached + request.decode.max_rows, request.decode.max_positions)
        missing = self.pool.pages_for(needed) - len(self.pool.table(request.request_id))
        fits = missing <= self.pool.num_available
        work = self._plan(request, request.num_cached, budget, chunk_budget) if fits else None
        if work is None or not self.pool.reserve(request.request_id, work.start + work.count):
            self.pool.close(request.request_id)
            request.num_cached = 0
            return None
        request.num_reused = max(request.num_reused, request.num_cached)
        return work

    def _preempt(self, request: Request) -> None:
        """Drop the request's keys, keep everything else, and let it be the next to resume."""
        request.window = self._suspend(request)
        request.num_preemptions += 1
        request.num_cached = 0
        self.pool.close(request.request_id)
        self.running.remove(request)
        self.waiting.appendleft(request)

    def cached(self, request: Request, num_cached: int) -> None:
        """Note that the request's first ``num_cached`` tokens now have valid keys."""
        request.num_cached = num_cached
        self.pool.commit(request.request_id, request.tokens, num_cached)

    def remove(self, request: Request) -> None:
        """Forget a request that has finished or was aborted."""
        if request in self.running:
            self.running.remove(request)
            self.pool.close(request.request_id)
        else:
            self.waiting.remove(request)


def _max_rows(request: Request) -> int:
    """Upper bound of the rows of the request's next window step."""
    most = request.decode.max_rows if request.row_bound is None else request.row_bound
    room = request.decode.max_positions - request.num_cached
    return most if most < room else room


def _start(request: Request, unread: Work | None) -> int:
    """Upper bound of the tokens that have keys when ``unread``, the request's share of a step, is done."""
    if unread is None:
        return request.num_cached
    return (request.num_cached if unread.decodes else unread.start) + unread.count


def _ends(unread: Work) -> bool:
    """Whether a step is sure to end the request: a verified one emits a token at least."""
    request = unread.request
    return request.num_output_tokens + 1 >= request.max_tokens and unread.decodes and request.decode.verifies
