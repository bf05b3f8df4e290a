# SPDX-License-Identifier: Apache-2.0
"""One JSON object per line, and a line per request, which can be found by its id. Prompts, answers and keys are never
logged."""

import asyncio
import contextlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from secrets import token_hex

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wedlm.server.errors import internal_error, unavailable
from wedlm.server.metrics import Metrics

log = logging.getLogger("wedlm.server")
_MAX_LINES, _FLUSH_S = 1000, 1.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class JsonFormatter(logging.Formatter):
    """Time, level, logger and message, the fields in ``extra={"fields": {...}}``, and a traceback if there is one."""

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


class Pipe(logging.Handler):
    """Writes lines to a descriptor in a separate thread. If the lines are not read, a thousand wait and the rest are
    dropped and counted, because an unread log must not stop the server."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[bytes | threading.Event] = queue.Queue(_MAX_LINES)
        self._dropped = 0
        # A daemon, and no buffered file, whose lock it could hold when the interpreter ends.
        threading.Thread(target=self._write_all, name="wedlm-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record).encode() + b"\n")
        except queue.Full:
            self._dropped += 1
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait until all lines so far are written, but no longer than a second."""
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(written)
            written.wait(_FLUSH_S)

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            self._write(line)
            if self._dropped and self._lines.empty():
                count, self._dropped = self._dropped, 0
                text = "%d lines of the log were dropped, because standard error was not read"
                self.emit(log.makeRecord(log.name, logging.WARNING, "", 0, text, (count,), None))

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:  # a full disk, a closed pipe
            self._dropped += 1


def set_up_logging(level: str) -> None:
    """Send the logs of the server, the engine, uvicorn and the traces' exporter to standard error."""
    handler = Pipe(sys.stderr.fileno())
    handler.setFormatter(JsonFormatter())
    for name in ("wedlm", "uvicorn", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


class RequestLog:
    """Middleware: gives each request an id (or keeps a sane ``X-Request-Id``), echoes it, times and logs the request,
    and turns an unhandled exception into a plain 500."""

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
        except asyncio.CancelledError:  # by uvicorn, at the end of its life, after a connection's last chance
            fields["cut_off"] = True
            if not status:
                error = unavailable("the server is shutting down", "shutting_down")
                await error.response()(scope, receive, send_with_id)
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
