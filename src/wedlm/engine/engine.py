# SPDX-License-Identifier: Apache-2.0
"""The loop: requests in, one step at a time, finished requests out. Single-threaded; callers serialise access."""

import math
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from wedlm.algorithm.params import DecodeParams, Decoding
from wedlm.engine.adaptive.draft_budget import AutoRows, StepCosts, longest_draft
from wedlm.engine.adaptive.prefill_budget import Pacing
from wedlm.engine.auto_window import AutoWindow
from wedlm.engine.constraints.rules import constraint_of
from wedlm.engine.pages import PagePool
from wedlm.engine.request import FinishReason, Request, StepPlan, WindowResult, WindowSnapshot
from wedlm.engine.runner import Flight, Runner
from wedlm.engine.sampling_params import SamplingParams
from wedlm.engine.scheduler import Scheduler
from wedlm.engine.text import Decoder, TextStream

_MOST_PACED_ROWS = 1024  # larger forwards cost in proportion, so that the table goes on in a line


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What all requests share. Lengths in tokens."""

    vocab_size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    default_decoding: Decoding = "auto"
    default_window_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    # A step with prompt chunks should take at most so many times what its windows alone take; inf: no limit; None:
    # ``build_engine`` decides.
    chunk_step_ratio: float | None = None
    capture_chunks: bool = True


class Engine:
    """Admits, runs and finishes requests. The only place that decides that a request is finished."""

    def __init__(self, config: EngineConfig, runner: Runner, pool: PagePool, tokenizer: Decoder | None) -> None:
        self.config, self.runner, self.pool, self.tokenizer = config, runner, pool, tokenizer
        self._chunk_step_ratio = math.inf if config.chunk_step_ratio is None else config.chunk_step_ratio
        paced = self._chunk_rows if self._chunk_step_ratio < math.inf else None
        self.scheduler = Scheduler(pool, config.max_num_seqs, config.max_num_batched_tokens, runner.suspend, paced)
        self.requests: dict[str, Request] = {}
        self._arrivals = 0
        self._flight: tuple[StepPlan, Flight] | None = None  # a launched step that nobody has read
        self._most_rows_timed = 0
        self.pacing: Pacing | None = None  # since prompts and windows first met
        self.auto: AutoRows | None = None  # since the first request that decodes so
        self.auto_window: AutoWindow | None = None  # the same of auto streaming
        self._last_read: float | None = None  # when the last step was read, if it had windows

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request. ValueError, with nothing changed, if it is impossible."""
        if request_id in self.requests:
            raise ValueError(f"request_id is {request_id!r}, which is running; expected a new one")
        prompt = list(prompt_token_ids)
        self._check_prompt(prompt)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop is set but the engine has no tokenizer; expected stop_token_ids instead")
        max_tokens = min(params.max_tokens, self.config.max_model_len - len(prompt))
        decode = self._decode_params(prompt, params)
        constraint = constraint_of(
            params, decode.stop_token_ids, self.config.mask_token_id, self.config.vocab_size, self.tokenizer
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            decode=decode,
            max_tokens=max_tokens,
            window=WindowSnapshot.initial(prompt, decode),
            arrival=self._arrivals,
            tokens=list(prompt),
            text=None if self.tokenizer is None else TextStream(self.tokenizer, params.stop or ()),
            constraint=constraint,
        )
        self.scheduler.add(request)
        try:
            self._prepare(request)
        except BaseException:  # Ctrl-C, or no memory to measure in
            self.scheduler.remove(request)
            raise
        self._arrivals += 1
        self.requests[request_id] = request
        return request

    def _step_costs(self, most_rows: int) -> StepCosts:
        """What forwards of up to so many rows cost, as far as steps have them. What is not known is measured: on a CPU
        within a second, on a GPU a graph is captured for each size. No step's time is to contain that."""
        most_rows = min(most_rows, self.config.max_num_batched_tokens)
        if most_rows > self._most_rows_timed:
            self._most_rows_timed, self._last_read = most_rows, None
        return self.runner.step_costs(most_rows)

    def _chunk_rows(self, window_rows: int) -> int:
        if self.pacing is None:
            self.pacing = Pacing(self._step_costs(_MOST_PACED_ROWS), self._chunk_step_ratio)
        return self.pacing.chunk_rows(window_rows)

    def _prepare(self, request: Request) -> None:
        """If the request adapts: know what such steps cost, and begin with the rows of the hour."""
        decode = request.decode
        if not decode.adapts:
            return
        costs = self._step_costs(decode.max_rows * self.config.max_num_seqs)
        if not decode.verifies:
            self.auto_window = self.auto_window or AutoWindow(costs)
        else:
            self.auto = self.auto or AutoRows(costs)
            first = replace(decode, window_size=min(decode.window_size, self.auto.row_budget))
            request.window = WindowSnapshot.initial(request.prompt_token_ids, first)
            request.row_bound = first.row_budget

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise ValueError("the prompt has 0 tokens; expected at least 1")
        if len(prompt) >= self.config.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; expected at most {self.config.max_model_len - 1} "
                "(max_model_len less one for the answer)"
            )
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
                raise ValueError(f"the prompt contains {token!r}; expected ids from 0 to {self.config.vocab_size - 1}")

    def _decode_params(self, prompt: list[int], params: SamplingParams) -> DecodeParams:
        ends = tuple(params.stop_token_ids or ()) + (() if params.ignore_eos else self.config.eos_token_ids)
        if any(token >= self.config.vocab_size for token in ends):
            given = list(params.stop_token_ids or ())
            raise ValueError(f"stop_token_ids is {given}; expected ids below {self.config.vocab_size}")
        return DecodeParams(
            decoding=params.decoding or self.config.default_decoding,
            window_size=params.wedlm_window_size or self.config.default_window_size,
            entropy_threshold=params.wedlm_entropy_threshold,
            pos_penalty=params.wedlm_pos_penalty_factor,
            draft_entropy=params.wedlm_draft_entropy,
            temperature=params.temperature,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            mask_token_id=self.config.mask_token_id,
            stop_token_ids=tuple(dict.fromkeys(ends)),
            min_eos_position=len(prompt) + params.min_tokens if params.min_tokens else 0,
            max_positions=self.config.max_model_len,
        )

    def step(self) -> list[Request]:
        """One forward for as many requests as fit; those that got tokens or ended. Empty if there is no work.

        Where the runner can, the next step is launched before this one is read: a request that turns out to have
        ended meanwhile runs once more, and nobody looks at it.
        """
        if self._flight is None:
            plan = self._with_rows(self.scheduler.schedule())
            if not plan.work:
                assert not self.requests, "requests wait, but nothing can run"
                return []
            if not self.runner.can_launch(plan):
                return self._take(plan, self.runner.run(plan))
            self._flight = plan, self.runner.launch(plan)
        plan, flight = self._flight
        ahead = self.scheduler.schedule_ahead(plan)
        following = None
        if ahead is not None and self.runner.can_launch(ahead):
            ahead = self._with_rows(ahead)
            following = ahead, self.runner.launch(ahead)
        changed = self._take(plan, flight.read())
        self._flight = following if self.requests else None
        return changed

    def _with_rows(self, plan: StepPlan) -> StepPlan:
        """The plan with the rows that it leaves to windows that adapt; where both kinds do, auto decoding decides."""
        adapting = [work.request for work in plan.work if work.decodes and work.request.decode.adapts]
        chosen_by = [request for request in adapting if request.decode.verifies] or adapting
        if not adapting:
            return plan
        chooser = self.auto if chosen_by[0].decode.verifies else self.auto_window
        assert chooser is not None
        most = max(request.decode.row_budget for request in chosen_by)
        row_budget = chooser.choose(sum(work.decodes for work in plan.work), most)
        for request in adapting:
            most = min(request.decode.row_budget, row_budget)
            request.row_bound = most if request.decode.verifies else 2 * most
        return replace(plan, row_budget=row_budget)

    def _learn(self, plan: StepPlan, results: Sequence[WindowResult | None]) -> None:
        """Tell pacing and auto decoding what the step cost, and what became of drafts."""
        decoded = [result for result in results if result is not None]
        now, last = time.perf_counter(), self._last_read
        self._last_read = now if decoded else None
        if self.pacing is None and self.auto is None and self.auto_window is None:
            return
        if last is not None and decoded:
            rows = sum(result.num_rows for result in decoded)
            chunk_rows = sum(work.count for work in plan.work if not work.decodes)
            if self.pacing is not None:
                self.pacing.observe(rows, chunk_rows, now - last)
            if self.auto is not None and not chunk_rows:
                self.auto.observe_time(len(decoded), rows, now - last)
        outcomes: Counter[tuple[int, int, int]] = Counter()  # most windows of a large batch have the same
        for work, result in zip(plan.work, results, strict=True):
            request = work.request
            if result is None or not request.decode.adapts:
                continue
            if not request.decode.verifies:
                assert self.auto_window is not None
                self.auto_window.observe(-(-work.count // 2), len(result.tokens), len(decoded))
            else:
                drafts, accepted = result.num_drafts, len(result.tokens) - 1
                outcomes[drafts, accepted, request.longest_draft] += 1
                budget = min(plan.row_budget, request.decode.row_budget)
                request.longest_draft = longest_draft(result.num_rows, drafts, accepted, budget)
        for outcome, count in outcomes.items():
            assert self.auto is not None
            self.auto.observe(*outcome, len(decoded), count)

    def _take(self, plan: StepPlan, results: Sequence[WindowResult | None]) -> list[Request]:
        """Deliver a step's results to the requests that still run."""
        self._learn(plan, results)
        changed = []
        for work, result in zip(plan.work, results, strict=True):
            request = work.request
            if request.finish_reason is not None:  # since the step was launched
                continue
            if result is None:
                self.scheduler.cached(request, work.start + work.count)
                continue
            request.num_forwards += 1
            request.num_rows += result.num_rows
            self._deliver(request, result)
            cached, known = result.num_cached, len(request.tokens)
            self.scheduler.cached(request, cached if cached < known else known)
            if result.tokens:
                changed.append(request)
            if request.finish_reason is not None:
                self._remove(request)
        return changed

    def _deliver(self, request: Request, result: WindowResult) -> None:
        """Append emitted tokens up to the one that ends the request."""
        if request.first_token_time is None and result.tokens:
            request.first_token_time = time.perf_counter()
        constraint, step = request.constraint, request.num_forwards - 1
        for i, token in enumerate(result.tokens):
            if constraint is not None and not constraint.accept(token):
                request.finish_reason = "length"  # the grammar met its limits of work: cut, but valid so far
                return
            request.tokens.append(token)
            request.logprobs.append(result.logprobs[i])
            request.token_steps.append(step)
            if result.alternatives:
                request.alternatives.append(result.alternatives[i])
            request.finish_reason = reason = self._finish_reason(request, token)
            if reason is not None:
                return

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        text = request.text
        if token in request.decode.stop_token_ids:
            if text is not None:
                text.finish()  # the end token is reported as an id; it is no part of the text
            return "stop"
        num_tokens = request.num_output_tokens
        if text is not None and text.push(token, num_tokens >= request.params.min_tokens):
            return "stop"
        if request.constraint is not None and request.constraint.complete:
            if text is not None:
                text.finish()
            return "stop"
        return "length" if num_tokens == request.max_tokens else None

    def abort(self, request_id: str) -> Request | None:
        """End a request now; its tokens so far stay with it. None if it is not running (any more)."""
        request = self.requests.get(request_id)
        if request is not None:
            request.finish_reason = "abort"
            self._remove(request)
        return request

    def _remove(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.runner.unload(request)
        if request.text is not None and request.finish_reason != "stop":
            request.text.finish()
        del self.requests[request.request_id]
        if not self.requests:
            self._last_read = None
