# SPDX-License-Identifier: Apache-2.0
"""Limits on connections: how many there are, how long one may be silent, and how finely it may split what it sends."""

import asyncio
import errno
import json
import logging
import resource
import socket
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from wedlm.server.errors import unavailable

log = logging.getLogger("wedlm.server")
_RECEIVED_BYTES = 2048  # at once: what a client packs into as much is parsed before others have their turn
_FREE_PIECES, _PIECE_BYTES = 1024, 256  # pieces that any body may have, and from there on their mean size
_RESERVED_DESCRIPTORS = 64  # for everything except clients' connections
_STUCK_S = 60.0  # in which a client must take something of what is sent to it
_QUIET_S = 10.0  # between two lines about one kind of trouble


class Pieces(h11.Connection):
    """Refuses a body in chunks of a byte or two, each of which costs as much as a large one."""

    _num_pieces, _num_bytes = 0, 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces, self._num_bytes = self._num_pieces + 1, self._num_bytes + len(event.data)
            if self._num_pieces > _FREE_PIECES + self._num_bytes // _PIECE_BYTES:
                raise h11.RemoteProtocolError("the body comes in too many pieces")
        return event


class BoundedConnection(H11Protocol):
    """uvicorn's connection, of which there are at most ``config.max_connections``. A client without a running request
    must send a whole head within ``config.header_timeout_s`` of connecting, or of the head's first byte. A client that
    takes nothing of its answer for a minute counts as gone."""

    max_connections: int
    header_timeout_s: float
    refused: "Sparing"
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = Pieces(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        raw = transport.get_extra_info("socket")
        if raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_STUCK_S * 1000))
        transport.max_size = _RECEIVED_BYTES  # type: ignore[attr-defined]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self.refused("a connection was refused; there are as many as --max-connections allows")
            transport.write(_full())
            transport.close()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer is under way
            self.transport.abort()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_timeout_s, self.transport.close)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _full() -> bytes:
    body = json.dumps(unavailable("there are too many connections", "too_many_connections").body).encode()
    head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nConnection: close"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Sparing:
    """Logs a warning at most every ten seconds, with the number of times it was due."""

    def __init__(self) -> None:
        self._count, self._next = 0, 0.0

    def __call__(self, message: str) -> None:
        self._count += 1
        if time.monotonic() >= self._next:
            log.warning(message, extra={"fields": {"times": self._count}})
            self._count, self._next = 0, time.monotonic() + _QUIET_S


def fitting(max_connections: int) -> int:
    """As many connections as the process has descriptors for, after raising their limit as far as possible, because
    beyond that the server could not even refuse a client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _RESERVED_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    room = max(1, soft - _RESERVED_DESCRIPTORS)
    if room < max_connections:
        log.warning("%d descriptors leave room for %d connections instead of %d", soft, room, max_connections)
        return room
    return max_connections


def watch_accept(loop: asyncio.AbstractEventLoop) -> None:
    """Log in one line, now and then, that descriptors have run out, where asyncio writes a traceback for each try.
    asyncio leaves the socket alone for a second after each."""
    warn = Sparing()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            warn(f"no connection can be accepted: {error.strerror}")
        else:
            log.error(context["message"], exc_info=error)

    loop.set_exception_handler(handle)
