# SPDX-License-Identifier: Apache-2.0
"""The engine's own loop with a clock: a fixed batch for a number of steps, or requests that arrive and end."""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from wedlm.bench.prompts import Arrival
from wedlm.bench.stats import Delivered, Figures, answer_figures, percentile
from wedlm.bench.target import Target
from wedlm.engine.request import Request
from wedlm.engine.sampling_params import SamplingParams


class Loop:
    """Runs requests through the target's engine, which nothing else may use at the same time."""

    def __init__(self, target: Target) -> None:
        self.engine, self._ids = target.engine, itertools.count()

    def start(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[Request]:
        """Start requests and run them past their prompts, until each has at least one token. On a GPU prompts may come
        from the cache. On a CPU attention copies keys whose pages are not consecutive, so this would change what a step
        costs."""
        if self.engine.runner.device.type == "cpu":
            self.engine.pool.reset_prefix_cache()
        requests = [self._add(prompt, params) for prompt in prompts]
        while any(request.num_output_tokens == 0 for request in requests):
            self.engine.step()
        return requests

    def steps(self, requests: Sequence[Request], num_steps: int) -> Figures:
        """Run ``num_steps`` steps of a batch; raises AssertionError if a request finished within them."""
        tokens, rows = (sum(map(count, requests)) for count in (_tokens, _rows))
        times = [time.perf_counter()]
        for _ in range(num_steps):
            self.engine.step()
            times.append(time.perf_counter())
        assert all(request.finish_reason is None for request in requests), "the requests are too short"
        tokens = sum(map(_tokens, requests)) - tokens
        rows = sum(map(_rows, requests)) - rows
        took = [1e3 * (after - before) for before, after in itertools.pairwise(times)]
        return {
            "step_ms": statistics.median(took),
            "step_p95_ms": percentile(took, 0.95),
            "tok_per_s": tokens / (times[-1] - times[0]),
            "tokens_per_step": tokens / num_steps / len(requests),
            "rows_per_step": rows / num_steps / len(requests),
        }

    def end(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.engine.abort(request.request_id)

    def batch(self, prompts: Sequence[list[int]], params: SamplingParams, warm: int, num_steps: int) -> Figures:
        """Run ``steps`` with separate requests, after ``warm`` steps."""
        requests = self.start(prompts, params)
        try:
            self.steps(requests, warm)
            return self.steps(requests, num_steps)
        finally:
            self.end(requests)

    def serve(self, arrivals: Sequence[Arrival], params: SamplingParams) -> Figures:
        """Run all requests to their ends, with no prompt in the cache: ``answer_figures``, tokens per forward and per
        row."""
        self.engine.pool.reset_prefix_cache()
        waiting, running = list(arrivals), {}  # type: ignore[var-annotated]
        streamed = any(one.at_s for one in arrivals)  # all at once: only their end counts
        done: list[tuple[Request, Delivered]] = []
        start = now = time.perf_counter()
        while waiting or running:
            while waiting and waiting[0].at_s <= now - start:
                one = waiting.pop(0)
                request = self._add(one.prompt, replace(params, max_tokens=one.max_tokens), streamed)
                running[request.request_id] = (request, Delivered(start + one.at_s))
            if not running:
                time.sleep(max(0.0, start + waiting[0].at_s - now))
            changed = self.engine.step() if running else []
            now = time.perf_counter()
            for request in changed:
                running[request.request_id][1].add(now, request.num_output_tokens)
                if request.finish_reason is not None:
                    done.append(running.pop(request.request_id))
        tokens, rows = (sum(count(request) for request, _ in done) for count in (_tokens, _rows))
        forwards = sum(request.counters.num_forwards for request, _ in done)
        per = {"tokens_per_forward": tokens / forwards, "p_cache": tokens / rows}
        return {**answer_figures([delivered for _, delivered in done], now - start), **per}

    def _add(self, prompt: list[int], params: SamplingParams, streamed: bool = True) -> Request:
        return self.engine.add(f"bench-{next(self._ids)}", prompt, params, streamed=streamed)


def _tokens(request: Request) -> int:
    return request.num_output_tokens


def _rows(request: Request) -> int:
    return request.counters.num_rows
