# SPDX-License-Identifier: Apache-2.0
"""The process: its sockets, uvicorn, and an orderly end that lets running requests finish."""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import ssl
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from wedlm.server.config import ServerConfig
from wedlm.server.connections import BoundedConnection, Sparing, fitting, watch_accept
from wedlm.server.service import Service

log = logging.getLogger("wedlm.server")
_LAST_WORDS_S = 0.5  # for errors of requests that were cut off to reach their clients
_KEEP_ALIVE_S = 30
_BACKLOG = 128  # also how often asyncio tries to accept at once, whether or not there is a descriptor left
_SWITCH_S = 0.001  # how long the loop may wait for another thread of Python's
_LOCAL = ("127.0.0.1", "::1", "localhost")
_GARBAGE = (50_000, 20, 20)  # a body of a megabyte may hold 350,000 lists, over which Python would look 20 times
_LATE_S = 5.0  # beyond the grace, for the end itself


class AddressError(OSError):
    """The server cannot use its address."""


@contextmanager
def bound_sockets(host: str, port: int) -> Iterator[list[socket.socket]]:
    """A socket for each address of ``host`` ("" means every address of this machine), bound but not listening yet.

    They are closed at the end. Raises AddressError if this machine has no such address, or if another process has the
    port.
    """
    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            bound = [_bind(stack, *one) for one in dict.fromkeys(found)]
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise AddressError(f"port {port} of {host!r} cannot be used: {reason}; expected a free one") from error
        yield bound


@contextmanager
def unix_socket(path: str) -> Iterator[list[socket.socket]]:
    """A socket at a path, bound but not listening yet; the process's umask and the folder decide who may connect. The
    path is removed at the end; a path that another server left behind is reused.

    Raises AddressError if it cannot be bound, or if something listens there.
    """
    one = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as other, suppress(ConnectionRefusedError):
                other.connect(path)
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            os.unlink(path)
        one.bind(path)
    except OSError as error:
        one.close()
        reason = (error.strerror or str(error)).lower()
        raise AddressError(f"uds is {path!r}, which cannot be used: {reason}; expected a free path") from error
    try:
        yield [one]
    finally:
        one.close()
        with suppress(FileNotFoundError):
            os.unlink(path)


def listening(config: ServerConfig) -> AbstractContextManager[list[socket.socket]]:
    """The sockets that the configuration asks for."""
    return bound_sockets(config.host, config.port) if config.uds is None else unix_socket(config.uds)


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """The TLS context, or None without TLS. Raises ValueError for unusable files."""
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")  # or it would ask the terminal
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        raise ValueError(
            f"ssl_certfile and ssl_keyfile are {files}, which cannot be used: {error}; expected a certificate and its "
            "key in PEM, without a password"
        ) from error
    return context


def _bind(stack: ExitStack, family: int, kind: int, protocol: int, _: str, address: Any) -> socket.socket:
    one = stack.enter_context(socket.socket(family, kind, protocol))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:  # which would otherwise take the port of IPv4, too
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(address)
    return one


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT: new requests get 503, and running ones may finish until
    ``shutdown_timeout_s`` is over. A second signal ends them at once. ``failed``: the engine is beyond repair.

    ``on_start`` is called with the server's address once it listens.
    """

    def __init__(self, app: FastAPI, on_start: Callable[[str], None] | None = None, **options: object) -> None:
        self.service: Service = app.state.service
        config = self.service.config
        context = tls_context(config)
        if context is not None:
            options["ssl_context_factory"] = lambda *_: context
        connection = type(
            "Connection",
            (BoundedConnection,),
            {
                "max_connections": fitting(config.max_connections),
                "header_timeout_s": config.header_timeout_s,
                "refused": Sparing(),
            },
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                loop="asyncio",  # where uvloop is installed, too: it is untested here
                ws="none",
                backlog=_BACKLOG,
                host=config.host,
                port=config.port,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,  # what must be waited for, drain() has waited for
                **options,  # type: ignore[arg-type]
            )
        )
        self.failed = False
        self._on_start = on_start
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owns_process = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        loop, config = asyncio.get_running_loop(), self.service.config
        watch_accept(loop)
        if config.ssl_certfile is not None:  # a connection counts as one after the handshake
            handshake = {"ssl_handshake_timeout": config.header_timeout_s}
            loop.create_server = partial(loop.create_server, **handshake)  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._owns_process = True
            self.service.parser.start()
            sys.setswitchinterval(_SWITCH_S)
            gc.collect()
            gc.freeze()  # the model and the libraries stay: looking through them takes 100 ms
            gc.set_threshold(*_GARBAGE)
        if not config.api_keys and config.uds is None and config.host not in _LOCAL:
            log.warning(
                "%s may be reached by others, and no API key is set; names that clients call it by need --allowed-host",
                config.host,
            )
        await super().serve(sockets)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop, on ``sockets`` or on the configured address. Raises AddressError if that is not
        available."""
        if sockets is not None:
            super().run(sockets)
            return
        with listening(self.service.config) as bound:
            super().run(bound)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        url = self._url(self.servers[0].sockets[0].getsockname())
        log.info("running on %s", url)
        if self._on_start is not None:
            self._on_start(url)

    def _url(self, address: Any) -> str:
        """The URL of a socket's address, as people write it."""
        if isinstance(address, str):
            return f"unix:{address}"
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        scheme = "http" if self.service.config.ssl_certfile is None else "https"
        return f"{scheme}://{host}:{address[1]}{self.service.config.root_path}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self.service.draining:
            self.should_exit = True
            self.force_exit = self.force_exit or sig == signal.SIGINT
        else:
            self.service.draining = True
            if self._owns_process:
                threading.Thread(target=self._end_late, name="wedlm-end", daemon=True).start()
            self._loop.call_soon_threadsafe(self._start_draining)

    async def on_tick(self, counter: int) -> bool:
        self._loop = asyncio.get_running_loop()
        if self.service.is_dead and not self.failed:
            log.critical("the engine could not be restarted; the server ends so that its supervisor can restart it")
            self.failed = self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves the application's own end out, which would show as a traceback
            with suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), _LAST_WORDS_S)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self.drain())

    def _end_late(self) -> None:
        """End the process when its time is over, whatever its threads and its loop are doing."""
        time.sleep(self.service.config.shutdown_timeout_s + _LATE_S)
        log.critical("the server did not end in time; it ends now")
        for handler in logging.getLogger("wedlm").handlers:
            handler.flush()
        os._exit(1)

    async def drain(self) -> None:
        """Refuse new requests, wait for the running ones, cut off the rest, and stop."""
        self.service.draining = True
        limit = self.service.config.shutdown_timeout_s
        log.info("shutting down; %d sequences may finish within %g seconds", self.service.num_sequences, limit)
        end = asyncio.get_running_loop().time() + limit
        while self.service.num_open and asyncio.get_running_loop().time() < end and not self.should_exit:
            await asyncio.sleep(0.02)
        if self.service.num_open:
            log.warning("%d requests and sequences are cut off", self.service.num_open)
            self.service.cut_off()
            await self.service.stop_engines()
            await asyncio.sleep(_LAST_WORDS_S)
        self.should_exit = True
