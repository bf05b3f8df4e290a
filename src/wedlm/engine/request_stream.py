# SPDX-License-Identifier: Apache-2.0
"""What an asyncio loop sees of sequences that an engine's thread runs for it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from wedlm.engine.outputs import StreamPiece

Updates = list[tuple[int, StreamPiece]]  # index of a sequence in its submission, and a piece of it


class EngineFault(RuntimeError):
    """The engine failed while it held this request, whose state is lost."""


class EngineStopped(RuntimeError):
    """The engine has stopped: it takes no requests and finishes none."""


class RequestStream:
    """Sequences submitted together, as the loop sees them. Iterate for updates; ``abort`` at any time."""

    def __init__(self, request_ids: list[str], abort: Callable[[], None], closed: Callable[[int], None]) -> None:
        """``abort`` asks the engine to end the sequences; ``closed(count)`` is called when that many have ended."""
        self.request_ids = request_ids
        self.num_open = len(request_ids)
        self._abort, self._closed = abort, closed
        self._accepted = False
        self._failure: Exception | None = None
        self._updates: deque[tuple[int, StreamPiece]] = deque()
        self._wake = asyncio.Event()

    async def accepted(self) -> None:
        """Wait until the engine has taken all sequences.

        Raises ValueError, EngineFault, EngineStopped or TimeoutError (``expire``) if it did not.
        """
        while self.num_open and not (self._accepted or self._failure):
            await self._wait()
        if self._failure is not None:
            raise self._failure

    async def __aiter__(self) -> AsyncIterator[Updates]:
        """All updates since the last call, in order, until every sequence has had its last piece.

        Raises what ``accepted`` raises, after the updates that came before the failure.
        """
        while True:
            if self._updates:
                updates = list(self._updates)
                self._updates.clear()
                yield updates
            elif self._failure is not None:
                raise self._failure
            elif not self.num_open:
                return
            else:
                await self._wait()

    def abort(self) -> None:
        """End what still runs, before the next step; no update follows."""
        if self.num_open:
            self._abort()

    def expire(self) -> None:
        """Abort, and raise TimeoutError in the reader."""
        if self.num_open:
            self._abort()
            self.fail(TimeoutError())

    async def _wait(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    def accept(self) -> None:
        """The engine has taken all sequences. The engine calls this and the methods below, in the loop."""
        self._accepted = True
        self._wake.set()

    def receive(self, index: int, piece: StreamPiece) -> None:
        """An update of one sequence; a piece with an output is its last."""
        if not self.num_open:
            return  # on its way when it expired
        self._updates.append((index, piece))
        if piece.output is not None:
            self._close(1)
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """End everything that is open with ``error``."""
        self._failure = error
        self._close(self.num_open)
        self._wake.set()

    def end(self) -> None:
        """Everything that was open has been aborted."""
        self._close(self.num_open)
        self._wake.set()

    def _close(self, count: int) -> None:
        self.num_open -= count
        self._closed(count)
