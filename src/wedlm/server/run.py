# SPDX-License-Identifier: Apache-2.0
"""The process: uvicorn, and a way out that lets running requests finish."""

import asyncio
import logging
import signal
from types import FrameType

import uvicorn
from fastapi import FastAPI

from wedlm.server.service import Service

log = logging.getLogger("wedlm.server")
_LAST_WORDS_S = 0.5  # for errors of requests that were cut off to reach their clients
_KEEP_ALIVE_S = 30


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT: new requests get 503, running ones may finish until
    ``shutdown_timeout_s`` is over. A second signal ends them at once. ``failed``: the engine is beyond repair."""

    def __init__(self, app: FastAPI, **options: object) -> None:
        self.service: Service = app.state.service
        config = self.service.config
        super().__init__(
            uvicorn.Config(
                app,
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self.service.draining:
            self.should_exit = True
            self.force_exit = self.force_exit or sig == signal.SIGINT
        else:
            self.service.draining = True
            self._loop.call_soon_threadsafe(self._start_draining)

    async def on_tick(self, counter: int) -> bool:
        self._loop = asyncio.get_running_loop()
        if self.service.engine.state == "dead" and not self.failed:
            log.critical("the engine could not be restarted; the server ends, for its supervisor to start it anew")
            self.failed = self.should_exit = True
        return await super().on_tick(counter)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self.drain())

    async def drain(self) -> None:
        """Refuse new requests, wait for the running ones, cut off the rest, and leave."""
        self.service.draining = True
        engine, limit = self.service.engine, self.service.config.shutdown_timeout_s
        log.info("shutting down; %d sequences may finish within %g seconds", engine.num_open, limit)
        end = asyncio.get_running_loop().time() + limit
        while engine.num_open and asyncio.get_running_loop().time() < end and not self.should_exit:
            await asyncio.sleep(0.02)
        if engine.num_open:
            log.warning("%d sequences are cut off", engine.num_open)
            await engine.stop()
            await asyncio.sleep(_LAST_WORDS_S)
        self.should_exit = True
