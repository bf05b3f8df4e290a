# SPDX-License-Identifier: Apache-2.0
"""One JSON object a line, and a line per request, found again by its id. No prompt, no answer, no key is written."""

import json
import logging
import re
import sys
import time
from secrets import token_hex

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wedlm.server.errors import internal_error
from wedlm.server.metrics import Metrics

log = logging.getLogger("wedlm.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message; whatever ``extra={"fields": {...}}`` adds; a traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logging(level: str) -> None:
    """Send what the server, the engine and uvicorn have to say to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("wedlm", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


class RequestLog:
    """Middleware: gives each request an id (or keeps a sane ``X-Request-Id``), echoes it, times and logs the request,
    and turns an exception that nobody handled into a plain 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else f"req-{token_hex(12)}"
        fields = scope["wedlm.log"] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        start, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("a request failed", extra={"fields": fields})
            if not status:
                await internal_error().response()(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - start
            fields |= {"status": status, "seconds": round(seconds, 4)}
            log.info("request", extra={"fields": fields})
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.http.labels(route, str(status)).inc()
            if route.startswith("/v1/"):
                self.metrics.seconds.observe(seconds)
