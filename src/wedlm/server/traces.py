# SPDX-License-Identifier: Apache-2.0
"""Traces by OpenTelemetry, which is an extra: a span for each request that generates, with the times of its
progress."""

import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_SEND_S = 3.0  # with all attempts; the process's end waits for it, and must not be late
# What the request's log line has, and what OpenTelemetry calls it.
_ATTRIBUTES = {
    "request_id": "wedlm.request_id",
    "model": "gen_ai.request.model",
    "id": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "tokens": "gen_ai.usage.output_tokens",
    "finish": "gen_ai.response.finish_reasons",
    "error": "error.type",
    "disconnected": "wedlm.disconnected",
}


def tracer_of(endpoint: str) -> "Tracer":
    """Sends spans to an OTLP collector over HTTP, in one of the SDK's threads, which drops what the collector does not
    take. ``OTEL_SERVICE_NAME`` and the SDK's other variables work."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "wedlm"}))
    provider = TracerProvider(resource=resource)  # sends what it has left when the process ends
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=_SEND_S)))
    return provider.get_tracer("wedlm")


class Tracing:
    """Middleware inside ``RequestLog``: a span within the caller's trace, if the request names one (``traceparent``).
    It never contains a prompt, an answer or a key. Events: ``queued``, ``prefill`` (the first step), ``decode`` (the
    first token) and ``end`` of the request's sequences; the earliest of each, but the latest ``end``."""

    def __init__(self, app: ASGIApp, tracer: "Tracer") -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        attributes = {"http.request.method": "POST", "url.path": scope["path"]}
        # Headers' names are lower case, as the propagators ask for them.
        span = self.tracer.start_span(
            "POST", context=extract(dict(Headers(scope=scope))), kind=SpanKind.SERVER, attributes=attributes
        )

        async def send_noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            await self.app(scope, receive, send_noting_status)
        except BaseException as error:
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            route = getattr(scope.get("route"), "path", None)
            if route is not None:
                span.update_name(f"POST {route}")
                span.set_attribute("http.route", route)
            fields: dict[str, Any] = scope["wedlm.log"]
            for name, attribute in _ATTRIBUTES.items():
                if name in fields:
                    span.set_attribute(attribute, fields[name])
            epoch_ns = time.time_ns() - time.perf_counter_ns()  # the zero of the clock that the course is told in
            for event, moment in scope.get("wedlm.course", {}).items():
                span.add_event(event, timestamp=epoch_ns + int(moment * 1e9))
            span.end()
