# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus. Each app has a registry of its own."""

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from wedlm.engine.async_llm import AsyncEngine
from wedlm.engine.outputs import GenerationOutput, StreamPiece

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_PER_FORWARD = (1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 16)
_SHARES = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1)


class Metrics:
    """All figures; ``observe_*`` are called in the loop. Names are listed in docs/server.md."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"wedlm_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"wedlm_{name}", text, buckets=buckets, registry=self.registry)

        self.http = counter("http_requests", "Answers by address and status", "path", "status")
        self.seconds = histogram("request_seconds", "From a request's arrival to its last byte", _SECONDS)
        self.finished = counter("sequences_finished", "Sequences by the reason of their end", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished sequences")
        self.reused_tokens = counter("prompt_tokens_reused", "Those whose keys were in the cache already")
        self.tokens = counter("generated_tokens", "Tokens that clients were given")
        self.finished_tokens = counter("finished_tokens", "Tokens of finished sequences")
        self.forwards = counter("forwards", "Forwards of finished sequences after the prompt")
        self.rows = counter("rows", "Rows of those forwards")
        self.drafted = counter("drafts", "Drafts that those forwards verified")
        self.accepted = counter("drafts_accepted", "Those that were right")
        self.lookup_drafted = counter("lookup_drafts", "Drafts among them that came from the text")
        self.lookup_accepted = counter("lookup_drafts_accepted", "Those that were right")
        self.preemptions = counter("preemptions", "Sequences that lost their keys to others, and resumed")
        self.first_token = histogram("time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self.inter_token = histogram(
            "inter_token_seconds", "Between pieces of a stream, divided by the later one's tokens", _TOKEN_SECONDS
        )
        self.per_forward = histogram("tokens_per_forward", "Of each finished sequence", _PER_FORWARD)
        self.p_cache = histogram("p_cache", "Tokens per row of each finished sequence", _SHARES)

    def watch(self, engine: AsyncEngine, num_preparing: Callable[[], float]) -> None:
        """Read the engine's state whenever the figures are asked for."""

        def gauge(name: str, text: str, read: Callable[[], float]) -> None:
            Gauge(f"wedlm_{name}", text, registry=self.registry).set_function(read)

        gauge("requests_preparing", "Requests being made into prompts, and threads at work on them", num_preparing)
        gauge("sequences_open", "Sequences accepted and not finished", lambda: engine.num_open)
        gauge("sequences_waiting", "Sequences that wait for a place", lambda: engine.load.num_waiting)
        gauge("sequences_running", "Sequences with a place", lambda: engine.load.num_running)
        gauge("cache_pages_in_use", "Cache pages that running sequences hold", lambda: engine.load.pages_in_use)
        gauge("cache_pages", "All cache pages", lambda: engine.load.num_pages)
        gauge("engine_up", "1 if the engine runs, 0 if it restarts or is dead", lambda: engine.state == "running")
        gauge("engine_faults", "Steps that failed since the start", lambda: engine.num_faults)
        gauge("engine_restarts", "Restarts since the start", lambda: engine.num_restarts)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def observe_end(self, output: GenerationOutput) -> None:
        """A sequence has ended by itself."""
        stats = output.stats
        assert stats is not None, "only a refused prompt has none"
        self.finished.labels(output.finish_reason).inc()
        self.prompt_tokens.inc(stats.num_prompt_tokens)
        self.reused_tokens.inc(stats.num_reused_tokens)
        self.finished_tokens.inc(stats.num_tokens)
        self.forwards.inc(stats.num_forwards)
        self.rows.inc(stats.num_rows)
        self.drafted.inc(stats.num_drafted)
        self.accepted.inc(stats.num_accepted)
        self.lookup_drafted.inc(stats.num_lookup_drafted)
        self.lookup_accepted.inc(stats.num_lookup_accepted)
        self.preemptions.inc(stats.num_preemptions)
        self.per_forward.observe(stats.tokens_per_forward)
        self.p_cache.observe(stats.p_cache)


class Stopwatch:
    """Times the pieces of one request's sequences."""

    def __init__(self, metrics: Metrics, num_sequences: int) -> None:
        self._metrics, self._start = metrics, time.perf_counter()
        self._last: list[float | None] = [None] * num_sequences

    def piece(self, index: int, piece: StreamPiece) -> None:
        """A piece has arrived."""
        if piece.token_ids:
            now, last = time.perf_counter(), self._last[index]
            if last is None:
                self._metrics.first_token.observe(now - self._start)
            else:
                self._metrics.inter_token.observe((now - last) / len(piece.token_ids))
            self._last[index] = now
            self._metrics.tokens.inc(len(piece.token_ids))
        if piece.output is not None:
            self._metrics.observe_end(piece.output)
