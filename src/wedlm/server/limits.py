# SPDX-License-Identifier: Apache-2.0
"""Middleware that refuses a request before it is parsed: unknown keys, foreign pages, bodies that are too large or too
slow."""

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from email.message import Message as Headed

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wedlm.server.errors import ApiError, queue_full

_GUARDED = ("/v1/", "/api/", "/metrics", "/tokenize", "/detokenize")
_HELD = 64
_DRAINED = 8  # how many times the limit is read and thrown away, so that the client gets to see the refusal


class RootPath:
    """Removes ``root`` from paths that begin with it, which some proxies do themselves. Everything inside sees the
    routes' paths."""

    def __init__(self, app: ASGIApp, root: str) -> None:
        self.app, self.root = app, root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http" and scope["path"] == self.root
        ):  # or the page's own addresses would be its neighbours
            await RedirectResponse(self.root + "/")(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].startswith(self.root + "/"):
            raw = scope["raw_path"].removeprefix(self.root.encode())
            scope = {**scope, "path": scope["path"].removeprefix(self.root), "raw_path": raw}
        await self.app(scope, receive, send)


class ApiKeys:
    """Requires ``Authorization: Bearer <key>`` or ``x-api-key: <key>`` for everything that generates, and for /metrics,
    if there are keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self._digests = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"].startswith(_GUARDED):
            headers = Headers(scope=scope)
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")  # Anthropic's clients
            if given is None or not self._knows(given):
                error = ApiError(
                    401,
                    "the API key is missing or unknown; expected one in the header Authorization: Bearer",
                    type="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response(scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _knows(self, key: str) -> bool:
        """Compare with every key in constant time, by digest, so that not even the length is revealed."""
        digest = _digest(key.encode("latin-1", "replace"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class KnownHosts:
    """Only answers clients that call the server by an address, by a local name or by one of ``names``, and whose page,
    if a page calls, came from there or from one of ``origins``. A server without keys is open to every program that can
    reach it, but not to pages in a browser that can: a page may give its own name any address (DNS rebinding)."""

    def __init__(self, app: ASGIApp, names: Sequence[str], origins: Sequence[str]) -> None:
        self.app, self._origins = app, frozenset(origins)
        self._names = frozenset(name.lower() for name in names) | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":  # whose probes may use any name
            headers = Headers(scope=scope)
            error = self._refusal(headers.get("host", ""), headers.get("origin"))
            if error is not None:
                await error.response(scope["path"])(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, host: str, origin: str | None) -> ApiError | None:
        if host and not self._knows(_without_port(host)):
            message = (
                f"Host is {host[:80]!r}; expected an address, localhost or a name that --allowed-host gives; with an "
                "API key any name will do"
            )
            return ApiError(403, message, type="permission_error", param="Host", code="unknown_host")
        own = origin is None or origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
        if not own and "*" not in self._origins and origin not in self._origins:
            message = f"Origin is {origin[:80]!r}; expected the server's own or one that --cors-origin gives"  # type: ignore[index]
            return ApiError(403, message, type="permission_error", param="Origin", code="unknown_origin")
        return None

    def _knows(self, name: str) -> bool:
        if "*" in self._names or name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)  # a page of another name cannot make the browser send it
        except ValueError:
            return False
        return True


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def takes_body(headers: Mapping[str, str]) -> bool:
    """Whether a request's body is read as JSON. A browser's request must have JSON's Content-Type, which pages of other
    origins cannot send without being asked first; browsers also name the page's origin. Some other programs name no
    type, or a form's: LiteLLM as Ollama's client, and curl."""
    if "origin" not in headers and "sec-fetch-site" not in headers:
        return True
    message = Headed()
    message["Content-Type"] = headers.get("content-type") or "text/plain"
    return message.get_content_maintype() == "application" and (
        message.get_content_subtype() == "json" or message.get_content_subtype().endswith("+json")
    )


class BodyLimit:
    """Reads the body of a POST, up to a size and for a limited time; the app then gets it in one piece. All bodies that
    are waiting to be read may have ``_HELD`` times that size together."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self.app, self.max_bytes, self.timeout_s = app, max_bytes, timeout_s
        self._held = 0  # bytes, of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        chunks: list[bytes] = []
        try:
            told = Headers(scope=scope).get("content-length", "0")  # digits, as far as h11 has let it pass
            if int(told) > _DRAINED * self.max_bytes:
                raise self._too_large()
            async with asyncio.timeout(self.timeout_s):
                body = await self._read(receive, chunks)
        except TimeoutError:
            message = f"the body did not arrive within {self.timeout_s:g} seconds"
            error = ApiError(408, message, code="body_timeout", headers={"Connection": "close"})
            await error.response(scope["path"])(scope, receive, send)
            return
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        finally:
            self._held -= sum(map(len, chunks))
            chunks.clear()
        if body is None:
            return  # the client left
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive, chunks: list[bytes]) -> bytes | None:
        """Read the body, adding its pieces to ``chunks``; None if the client left. Raises ApiError 413 if it is too
        large."""
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size <= self.max_bytes:
                chunks.append(message.get("body", b""))
                self._held += len(chunks[-1])
                if self._held > _HELD * self.max_bytes:
                    raise queue_full("too many bodies are being received")
                if not more:
                    return b"".join(chunks)
            elif not more or size > _DRAINED * self.max_bytes:
                raise self._too_large()
            else:
                self._held -= sum(map(len, chunks))
                chunks.clear()

    def _too_large(self) -> ApiError:
        message = f"the body has more than {self.max_bytes} bytes; expected at most that"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
