# SPDX-License-Identifier: Apache-2.0
"""The process: uvicorn, and a way out that lets running requests finish."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

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


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT: new requests get 503, running ones may finish until
    ``shutdown_timeout_s`` is over. A second signal ends them at once. ``failed``: the engine is beyond repair."""

    def __init__(self, app: FastAPI, **options: object) -> None:
        self.service: Service = app.state.service
        config = self.service.config
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
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owns_process = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watch_accept(asyncio.get_running_loop())
        if threading.current_thread() is threading.main_thread():
            self._owns_process = True
            sys.setswitchinterval(_SWITCH_S)
            gc.collect()
            gc.freeze()  # the model and the libraries stay: looking through them takes 100 ms
            gc.set_threshold(*_GARBAGE)
        config = self.service.config
        if not config.api_keys and config.host not in _LOCAL:
            log.warning(
                "%s may be reached by others, and no API key is set; names that clients call it by need --allowed-host",
                config.host,
            )
        await super().serve(sockets)

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
        if self.service.engine.state == "dead" and not self.failed:
            log.critical("the engine could not be restarted; the server ends, for its supervisor to start it anew")
            self.failed = self.should_exit = True
        return await super().on_tick(counter)

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
        """Refuse new requests, wait for the running ones, cut off the rest, and leave."""
        self.service.draining = True
        engine, limit = self.service.engine, self.service.config.shutdown_timeout_s
        log.info("shutting down; %d sequences may finish within %g seconds", engine.num_open, limit)
        end = asyncio.get_running_loop().time() + limit
        while self.service.num_open and asyncio.get_running_loop().time() < end and not self.should_exit:
            await asyncio.sleep(0.02)
        if self.service.num_open:
            log.warning("%d requests and sequences are cut off", self.service.num_open)
            self.service.cut_off()
            await engine.stop()
            await asyncio.sleep(_LAST_WORDS_S)
        self.should_exit = True
