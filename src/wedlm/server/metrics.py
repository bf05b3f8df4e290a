# SPDX-License-Identifier: Apache-2.0
"""Figures for Prometheus. Each app has its own registry."""

import time
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from wedlm.engine.async_llm import AsyncEngine
from wedlm.engine.outputs import GenerationOutput, StreamPiece

_MODEL = "model_name"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_PER_FORWARD = (1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 16)
_SHARES = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1)


class Metrics:
    """All figures of a server: its own, those of its process, and those of each model. docs/server.md lists
    the names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        labels = ["path", "status"]
        self.http = Counter("wedlm_http_requests", "Answers by address and status", labels, registry=self.registry)
        text = "From a request's arrival to its last byte"
        self.seconds = Histogram("wedlm_request_seconds", text, buckets=_SECONDS, registry=self.registry)
        self._families = ModelFamilies(self.registry)

    def of(self, model: str) -> "ModelMetrics":
        """The figures of one model."""
        return ModelMetrics(self._families, model)

    def watch(self, num_preparing: Callable[[], float]) -> None:
        """Ask for the state whenever the figures are requested."""
        text = "Requests being made into prompts, and threads at work on them"
        Gauge("wedlm_requests_preparing", text, registry=self.registry).set_function(num_preparing)

    def text(self) -> bytes:
        """The figures in Prometheus' text format."""
        return generate_latest(self.registry)


class ModelFamilies:
    """The figures that every model has, with its name as a label."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.adapters = AdaptersInfo()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"wedlm_{name}", text, [_MODEL, *labels], registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"wedlm_{name}", text, [_MODEL], buckets=buckets, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"wedlm_{name}", text, [_MODEL], registry=registry)

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
        self.queue = histogram("queue_seconds", "From arrival to the first forward", _SECONDS)
        self.inter_token = histogram(
            "inter_token_seconds", "Between pieces of a stream, divided by the later one's tokens", _TOKEN_SECONDS
        )
        self.per_forward = histogram("tokens_per_forward", "Of each finished sequence", _PER_FORWARD)
        self.p_cache = histogram("p_cache", "Tokens per row of each finished sequence", _SHARES)
        self.gauges: dict[Gauge, Callable[[AsyncEngine], float]] = {
            gauge("sequences_open", "Sequences accepted and not finished"): lambda engine: engine.num_open,
            gauge("sequences_waiting", "Sequences that wait for a place"): lambda engine: engine.load.num_waiting,
            gauge("sequences_running", "Sequences with a place"): lambda engine: engine.load.num_running,
            gauge("cache_pages_in_use", "Cache pages that running sequences hold"): lambda e: e.load.pages_in_use,
            gauge("cache_pages", "All cache pages"): lambda engine: engine.load.num_pages,
            gauge("engine_up", "1 if the engine runs, 0 if it restarts or is dead"): lambda e: e.state == "running",
            gauge("engine_faults", "Steps that failed since the start"): lambda engine: engine.num_faults,
            gauge("engine_restarts", "Restarts since the start"): lambda engine: engine.num_restarts,
            # What the endpoint picker of Kubernetes' inference gateway reads, under the names that it has for vLLM.
            Gauge("vllm:num_requests_waiting", "As wedlm_sequences_waiting", [_MODEL], registry=registry): (
                lambda engine: engine.load.num_waiting
            ),
            Gauge("vllm:num_requests_running", "As wedlm_sequences_running", [_MODEL], registry=registry): (
                lambda engine: engine.load.num_running
            ),
            Gauge("vllm:kv_cache_usage_perc", "Pages in use of all, from 0 to 1", [_MODEL], registry=registry): (
                lambda engine: engine.load.pages_in_use / max(1, engine.load.num_pages)
            ),
        }
        registry.register(self.adapters)


class AdaptersInfo(Collector):
    """The third of the endpoint picker's gauges: which adapters requests run and wait with, as labels; the value is
    when that was so."""

    def __init__(self) -> None:
        self._engines: list[AsyncEngine] = []

    def watch(self, engine: AsyncEngine) -> None:
        """One more engine."""
        self._engines.append(engine)

    def collect(self) -> Iterator[Metric]:
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of requests, and when", labels=labels)
        for engine in self._engines:
            load, most = engine.load, engine.engine.config.options.max_adapters
            family.add_metric(
                [str(most), ",".join(load.running_adapters), ",".join(load.waiting_adapters)], time.time()
            )
        yield family


class ModelMetrics:
    """The figures of one model. Call ``observe_*`` in the loop."""

    def __init__(self, families: ModelFamilies, model: str) -> None:
        self._families, self._model = families, model
        self.prompt_tokens = families.prompt_tokens.labels(model)
        self.reused_tokens = families.reused_tokens.labels(model)
        self.tokens = families.tokens.labels(model)
        self.finished_tokens = families.finished_tokens.labels(model)
        self.forwards = families.forwards.labels(model)
        self.rows = families.rows.labels(model)
        self.drafted = families.drafted.labels(model)
        self.accepted = families.accepted.labels(model)
        self.lookup_drafted = families.lookup_drafted.labels(model)
        self.lookup_accepted = families.lookup_accepted.labels(model)
        self.preemptions = families.preemptions.labels(model)
        self.first_token = families.first_token.labels(model)
        self.queue = families.queue.labels(model)
        self.inter_token = families.inter_token.labels(model)
        self.per_forward = families.per_forward.labels(model)
        self.p_cache = families.p_cache.labels(model)

    def watch(self, engine: AsyncEngine) -> None:
        """Read the engine's state whenever the figures are requested."""
        for gauge, read in self._families.gauges.items():
            gauge.labels(self._model).set_function(partial(read, engine))
        self._families.adapters.watch(engine)

    def observe_end(self, output: GenerationOutput) -> None:
        """Record that a sequence has ended normally."""
        stats = output.stats
        assert stats is not None, "only a refused prompt has none"
        self._families.finished.labels(self._model, output.finish_reason).inc()
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
        self.queue.observe(stats.queue_s)
        self.per_forward.observe(stats.tokens_per_forward)
        self.p_cache.observe(stats.p_cache)


class Stopwatch:
    """Times the pieces of one request's sequences."""

    def __init__(self, metrics: ModelMetrics, num_sequences: int) -> None:
        self._metrics, self._start = metrics, time.perf_counter()
        self._last: list[float | None] = [None] * num_sequences

    def piece(self, index: int, piece: StreamPiece) -> None:
        """Record that a piece has arrived."""
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
