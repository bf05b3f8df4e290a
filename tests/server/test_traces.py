# SPDX-License-Identifier: Apache-2.0
"""Traces, as a collector gets them. Needs the extra ``traces``."""

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.cli.command import wedlm
from tests.server.asking import CHAT, TEXT
from tests.server.running import Running, serving, wait_until
from wedlm.extras import install_extras

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """An OTLP collector; ``spans`` are those it has been sent, and ``services`` who sent them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list = []
        self.services: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.server.services.add(named["service.name"])
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as one:
        threading.Thread(target=one.serve_forever).start()
        yield one
        one.shutdown()


@pytest.fixture(scope="module")
def traced(llm, collector) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with serving(llm, otlp_traces_endpoint=collector.url, api_keys=("secret-key",)) as one:
            yield one
            one.settled()


def span_of(collector: Collector, request_id: str):
    def found() -> list:
        return [span for span in collector.spans if attributes(span).get("wedlm.request_id") == request_id]

    wait_until(lambda: bool(found()))
    (span,) = found()
    return span


def attributes(span) -> dict:
    values = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        values[one.key] = [each.string_value for each in value.values] if kind == "array_value" else value
    return values


@pytest.mark.parametrize("stream", [False, True])
def test_a_span_tells_the_course(traced, collector, stream):
    headers = {"Authorization": "Bearer secret-key", "X-Request-Id": f"course-{stream}"}
    headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
    before = time.time_ns()
    body = {"messages": [{"role": "user", "content": "a private matter"}], "max_tokens": 9, "ignore_eos": True}
    answer = traced.post(CHAT, {**body, "stream": stream, "n": 2}, **headers)
    assert answer.status_code == 200
    span = span_of(collector, f"course-{stream}")
    after = time.time_ns()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == f"POST {CHAT}"
    said = attributes(span)
    assert said["gen_ai.request.model"] == "tiny"
    assert said["gen_ai.usage.output_tokens"] == 18
    assert said["gen_ai.usage.input_tokens"] > 0
    assert said["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert (said["http.route"], said["http.response.status_code"]) == (CHAT, 200)
    assert [event.name for event in span.events] == ["queued", "prefill", "decode", "end"]
    moments = [event.time_unix_nano for event in span.events]
    assert moments == sorted(moments)
    assert before < span.start_time_unix_nano < moments[0]
    assert moments[-1] < after
    everything = str(collector.spans)
    assert "private" not in everything
    assert "secret-key" not in everything
    assert collector.services == {"wedlm"}


def test_refusals_have_spans_and_what_is_only_read_has_none(traced, collector):
    headers = {"Authorization": "Bearer secret-key", "X-Request-Id": "refused"}
    assert traced.post(TEXT, {"prompt": "abc", "max_tokens": 0}, **headers).status_code == 400
    assert traced.http.get("/metrics", headers=headers).status_code == 200
    span = span_of(collector, "refused")
    assert attributes(span)["http.response.status_code"] == 400
    assert not span.events
    assert not span.parent_span_id


def test_without_a_collector_nothing_else_happens(llm, monkeypatch):
    """Requests are answered, and the server ends in time."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with serving(llm, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces") as running:
        for _ in range(3):
            assert running.text("abc", max_tokens=4)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    result = wedlm("serve", "--otlp-traces-endpoint", "http://127.0.0.1:9")
    assert result.exit_code == 2
    assert f"is not installed; install it with: {install_extras('traces')}" in " ".join(result.stderr.split())
