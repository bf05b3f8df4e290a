# SPDX-License-Identifier: Apache-2.0
"""Decides which requests run in the next step, and with which pages. It is a function of the queues and of the budgets
it gets: it knows no tensors, never waits and calls nothing back."""

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from operator import attrgetter

from wedlm.engine.adapters import key_root_of
from wedlm.engine.pages import PagePool
from wedlm.engine.plan import ScheduledRequest, StepPlan
from wedlm.engine.request import Request, WindowSnapshot

Unread = Mapping[str, ScheduledRequest]  # the last thing that a launched step, not read yet, does: by request id
_Planned = dict[str, Sequence[ScheduledRequest]]  # by request id: a window, or a chunk, or a chunk and a window


class Scheduler:
    """Schedules first come, first served, by the requests' ``order``, with one token budget per step for windows and
    prompt chunks alike.

    Preemption takes the last request in that order. Since ``check`` refuses a request that could not run alone, the
    first one always makes progress. A waiting request takes the place of a running one that is behind it.
    """

    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._step = 0

    def check(self, request: Request) -> None:
        """Raises ValueError if the request could never run, even alone."""
        rows = min(request.decode.max_rows, request.decode.max_positions)
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

    def add(self, request: Request) -> None:
        """Queue a request that ``check`` accepted. Its first window has no more rows than its limits allow."""
        decode, most = request.decode, request.limits.max_rows
        if most < decode.row_budget:
            first = replace(decode, window_size=most)
            request.progress.window = WindowSnapshot.initial(request.prompt_token_ids, first)
        self._queue(request)

    def decoding(self) -> list[Request]:
        """The requests whose windows the next step may run: those that run, and those that could be let in."""
        if not self.waiting:
            return self.running.copy()
        first = self.waiting[0].order  # may take the place of those behind it
        places = self.max_num_seqs - len(self.running) + sum(first < request.order for request in self.running)
        return [*self.running, *islice(self.waiting, places)]

    def rows_beside_prompts(self, unread: Unread) -> int | None:
        """The rows of windows that share the next step with prompts. None if there are no prompts, or if none of these
        windows is streamed."""
        going_on = [r for r in self.running if r.request_id not in unread or not _ends(unread[r.request_id])]
        windows = [r for r in going_on if _start(r, unread.get(r.request_id)) >= r.progress.window.cached]
        if not any(request.streamed for request in windows):
            return None
        if len(windows) == len(going_on) and not self.waiting:
            return None
        return sum(_max_rows(request) for request in windows)

    def schedule(self, prefill_rows: int | None = None, unread: Unread | None = None) -> StepPlan | None:
        """Plan the step after ``unread``, and reserve pages for everything that it may commit.

        ``prefill_rows``: the most rows of prompt chunks; None sets no separate limit. The plan is empty if nothing can
        run. It is None if ``unread`` is given and the step needs a preemption, which has to wait for the results.
        """
        unread = unread or {}
        self._step += 1
        planned: _Planned = {}
        preempted: list[Request] = []
        budget = self.max_num_batched_tokens
        chunk_budget = budget if prefill_rows is None else prefill_rows
        # Least recently served first, so that a budget too small for all starves no request.
        for request in sorted(self.running, key=attrgetter("progress.last_step", "order")):
            done = unread.get(request.request_id)
            if done is not None and _ends(done):
                continue
            while not preempted or request in self.running:
                one = self._plan(request, _start(request, done), budget, chunk_budget)
                if one is None:
                    break
                # For each window of each step: ``min`` would cost more than all else in these two lines.
                slots, most = one.start + one.count, request.decode.max_positions
                if self.pool.reserve(request.request_id, slots if slots < most else most):
                    if one.is_window:  # as nearly always, and a call would take a tenth of the time
                        request.progress.last_step = self._step
                        planned[request.request_id] = (one,)
                        budget -= one.count
                    else:
                        budget, chunk_budget = self._add_to(planned, one, budget, chunk_budget)
                    break
                if unread:
                    return None
                rows, chunk_rows = self._preempt_last(planned, preempted)
                budget, chunk_budget = budget + rows, chunk_budget + chunk_rows
        out_of_pages = bool(preempted)
        while self.waiting and not out_of_pages and self.waiting[0] not in preempted:
            admitted = self._admit(self.waiting[0], budget, chunk_budget)
            if admitted is None:
                if not self._comes_before(self.waiting[0], budget, chunk_budget):
                    break
                if unread:
                    return None
                rows, chunk_rows = self._preempt_last(planned, preempted)
                budget, chunk_budget = budget + rows, chunk_budget + chunk_rows
                continue
            self.running.append(self.waiting.popleft())
            budget, chunk_budget = self._add_to(planned, admitted, budget, chunk_budget)
        scheduled = sorted(chain.from_iterable(planned.values()), key=attrgetter("is_window"), reverse=True)
        return StepPlan(scheduled, preempted)

    def _add_to(self, planned: _Planned, one: ScheduledRequest, budget: int, chunk_budget: int) -> tuple[int, int]:
        """Add a chunk or a window that has its pages to the plan. Returns what is left of the budgets."""
        request = one.request
        request.progress.last_step = self._step
        if one.is_window:
            planned[request.request_id] = (one,)
            return budget - one.count, chunk_budget
        window = self._first_window(one, min(budget, chunk_budget) - one.count)
        planned[request.request_id] = (one,) if window is None else (one, window)
        rows = one.count + (0 if window is None else window.count)
        return budget - rows, chunk_budget - rows

    def _first_window(self, chunk: ScheduledRequest, budget: int) -> ScheduledRequest | None:
        """The request's first window, to run beside the prompt's last chunk, if ``chunk`` is that, and budget and pages
        allow it. The window needs nothing of the chunk but its keys, which each layer writes before it attends."""
        request, start = chunk.request, chunk.start + chunk.count
        if start < request.progress.window.cached:
            return None
        rows = min(_max_rows(request), request.decode.max_positions - start)
        if not 0 < rows <= budget or not self.pool.reserve(request.request_id, start + rows):
            return None
        return ScheduledRequest(request, True, rows, chunk.pages, start, request.limits.proposal)

    def _plan(self, request: Request, start: int, budget: int, chunk_budget: int) -> ScheduledRequest | None:
        """The request's next chunk or window, if the budget allows it."""
        missing = request.progress.window.cached - start
        is_window = missing <= 0
        count = _max_rows(request) if is_window else min(missing, budget, chunk_budget)
        block = request.decode.block_length
        if block > 1 and not is_window and count > 0:  # whole blocks, whose rows see each other: one at least
            count = max((start + count) // block, start // block + 1) * block - start
        if count > budget or count <= 0:
            return None
        proposal = request.limits.proposal if is_window else None
        return ScheduledRequest(request, is_window, count, self.pool.table(request.request_id), start, proposal)

    def _admit(self, request: Request, budget: int, chunk_budget: int) -> ScheduledRequest | None:
        """Give the request a page table and plan its first chunk, if there is a place, and if all tokens to cache and a
        first window would fit now."""
        if budget <= 0 or len(self.running) >= self.max_num_seqs:
            return None
        progress = request.progress
        key_root = key_root_of(request.adapter)
        progress.num_cached = self.pool.allocate(
            request.request_id, request.placed_tokens, progress.window.cached, request.params.cache_salt, key_root
        )
        try:
            one = self._plan_first(request, budget, chunk_budget)
        except BaseException:
            self._release(request)
            raise
        if one is None:
            self._release(request)
            return None
        progress.num_reused = max(progress.num_reused, progress.num_cached)
        return one

    def _plan_first(self, request: Request, budget: int, chunk_budget: int) -> ScheduledRequest | None:
        """The share of a request that has just got its page table, with pages reserved for it."""
        progress = request.progress
        needed = min(progress.window.cached + request.decode.max_rows, request.decode.max_positions)
        if self.pool.pages_for(needed) - len(self.pool.table(request.request_id)) > self.pool.num_available:
            return None
        one = self._plan(request, progress.num_cached, budget, chunk_budget)
        if one is None or not self.pool.reserve(request.request_id, one.start + one.count):
            return None
        return one

    def _release(self, request: Request) -> None:
        """Take the pages back, because a waiting request holds none."""
        self.pool.free(request.request_id)
        request.progress.num_cached = 0

    def _comes_before(self, request: Request, budget: int, chunk_budget: int) -> bool:
        """Whether a request that was not admitted may take the place and the pages of a running one. It may not if it
        only lacked budget, since another step has some."""
        if budget < _max_rows(request) or chunk_budget < 1 or not self.running:
            return False
        return request.order < self._last.order

    def _preempt_last(self, planned: _Planned, preempted: list[Request]) -> tuple[int, int]:
        """Preempt one of the running requests. Returns how many rows its share of the plan had, and how many of them
        were of prompt chunks."""
        victim = self._last
        self.preempt(victim)
        preempted.append(victim)
        lost = planned.pop(victim.request_id, ())
        rows = sum(one.count for one in lost)
        return rows, 0 if lost and lost[0].is_window else rows

    def preempt(self, request: Request) -> None:
        """Drop the request's keys, keep everything else, and let it wait in its place. Whoever runs the plan must save
        its window (``save_window``) before any other step runs."""
        request.progress.num_preemptions += 1
        self._release(request)
        self.running.remove(request)
        self._queue(request)

    def _queue(self, request: Request) -> None:
        if not self.waiting or self.waiting[-1].order < request.order:  # as nearly always
            self.waiting.append(request)
        else:
            insort(self.waiting, request, key=attrgetter("order"))

    @property
    def _last(self) -> Request:
        """The running request that is preempted first."""
        return max(self.running, key=attrgetter("order"))

    def save_window(self, request: Request, window: WindowSnapshot) -> None:
        """Keep the window of a preempted request, which is the only state besides tokens that must survive."""
        request.progress.window = window

    def update_cached(self, request: Request, num_cached: int) -> None:
        """Note that the request's first ``num_cached`` tokens now have valid keys."""
        request.progress.num_cached = num_cached
        self.pool.commit(request.request_id, request.placed_tokens, num_cached)

    def remove(self, request: Request) -> None:
        """Drop a request that has finished or was aborted, and free its pages."""
        if request in self.running:
            self.running.remove(request)
            self.pool.free(request.request_id)
        else:
            self.waiting.remove(request)


def unread_of(plan: StepPlan) -> Unread:
    """What a plan does, by request id: the window of a request that also has a chunk."""
    return {one.request.request_id: one for one in reversed(plan.scheduled)}  # windows come first


def _max_rows(request: Request) -> int:
    """Upper bound of the rows of the request's next window step."""
    most, proposal = request.limits.max_rows, request.limits.proposal
    if proposal is not None and proposal.most >= most:
        most = proposal.most + 1
    room = request.decode.max_positions - request.progress.num_cached
    return most if most < room else room


def _start(request: Request, unread: ScheduledRequest | None) -> int:
    """Upper bound of the tokens that have keys once ``unread``, the request's share of a step, is done."""
    progress = request.progress
    if unread is None:
        return progress.num_cached
    if not unread.is_window:
        return unread.start + unread.count
    # A first window may run beside a chunk that is not counted yet.
    cached, first = progress.num_cached, progress.window.cached
    return (cached if cached > first else first) + unread.count


def _ends(unread: ScheduledRequest) -> bool:
    """Whether a step is sure to end the request: one with an anchor emits at least one token."""
    request = unread.request
    return unread.is_window and request.decode.has_anchor and request.num_output_tokens + 1 >= request.max_tokens
