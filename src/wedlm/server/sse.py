# SPDX-License-Identifier: Apache-2.0
"""Answers that end when the client leaves: server-sent events, and the wait for a whole answer."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
_PIECE_BYTES = 2**16


class Disconnected(Exception):
    """The client has closed the connection."""


class CutOff(Exception):
    """The server ends before the work does."""


async def unless_disconnected(
    receive: Receive, work: Coroutine[Any, Any, T], cut_off: asyncio.Event | None = None
) -> T:
    """The result of ``work``, which is cancelled as soon as the client leaves (Disconnected) or ``cut_off`` is set
    (CutOff). The body must already be read."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    end = asyncio.ensure_future(asyncio.Event().wait() if cut_off is None else cut_off.wait())
    try:
        await asyncio.wait({task, watch, end}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected if watch.done() else CutOff
        return task.result()
    finally:
        for one in (task, watch, end):
            one.cancel()
        await asyncio.gather(task, watch, end, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Whole(Response):
    """JSON that may be large, sent as fast as the client takes it, because writing it all at once would copy it at
    once."""

    media_type = "application/json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for start in range(0, len(body), _PIECE_BYTES):
            piece = bytes(body[start : start + _PIECE_BYTES])
            await send({"type": "http.response.body", "body": piece, "more_body": start + _PIECE_BYTES < len(body)})


class EventStream(StreamingResponse):
    """Sends ``events``, by default server-sent ones, as they come, for at most ``limit_s``, because a client may stop
    reading without leaving. ``close`` is called at the end in any case."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        limit_s: float,
        headers: Mapping[str, str],
        media_type: str = "text/event-stream",
    ) -> None:
        # The second header asks nginx not to hold events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, headers=headers, media_type=media_type)
        self._events, self._close, self._limit_s = events, close, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await unless_disconnected(receive, self._send_all(send))
        except (Disconnected, TimeoutError) as error:
            scope["wedlm.log"]["disconnected" if isinstance(error, Disconnected) else "stuck"] = True
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
