# SPDX-License-Identifier: Apache-2.0
"""Middleware that refuses before anything is parsed: unknown keys, bodies that are too large or too slow."""

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wedlm.server.errors import ApiError

_GUARDED = ("/v1/", "/metrics")
_DRAINED = 8  # how many times the limit is read and thrown away, so that the client gets to see the refusal


class ApiKeys:
    """Requires ``Authorization: Bearer <key>`` for /v1 and /metrics, if there are keys at all."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self._digests = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"].startswith(_GUARDED):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._knows(key.strip()):
                error = ApiError(
                    401,
                    "the API key is missing or unknown; expected one in the header Authorization: Bearer",
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _knows(self, key: str) -> bool:
        """Compares with every key in constant time; of digests, so that the length tells nothing either."""
        digest = _digest(key.encode("latin-1", "replace"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class BodyLimit:
    """Reads the body of a POST, up to a size and for a time; the app then gets it in one piece."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self.app, self.max_bytes, self.timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.timeout_s):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the body did not arrive within {self.timeout_s:g} seconds"
            error = ApiError(408, message, code="body_timeout", headers={"Connection": "close"})
            await error.response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client left
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None if the client left. ApiError 413 if it is too large."""
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= self.max_bytes:
                chunks.append(message.get("body", b""))
                if not more:
                    return b"".join(chunks)
            elif not more or size > _DRAINED * self.max_bytes:
                message_text = f"the body has more than {self.max_bytes} bytes; expected at most that"
                raise ApiError(413, message_text, code="body_too_large", headers={"Connection": "close"})
            else:
                chunks.clear()
