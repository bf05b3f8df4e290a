# SPDX-License-Identifier: Apache-2.0
"""Try grammars in separate processes, within limits of time and memory, before this process compiles them.

A compiled grammar cannot be passed from one process to another, but compiling repeats the same work. What was built
there within the limits will be built here within them, and what was not has only harmed its worker, which the next
trial replaces.
"""

import json
import threading
from collections.abc import Callable

from wedlm.engine.constraints import trial_worker
from wedlm.engine.constraints.trial_worker import LIMITS, Limits, why_it_ended
from wedlm.engine.helper_process import HelperProcess

NUM_WORKERS = 2  # each holds the tables of the tokenizer
_MAX_WALL_S = 10.0  # of a trial whose processor time is limited, on a machine with much else to do
_MAX_START_S = 60.0


class TrialCancelled(Exception):
    """The caller has left."""


class TrialFailed(Exception):
    """The trial could not say anything about the grammar."""


class Cancellation:
    """Cancels a trial: call ``cancel`` from any thread, before, during or after it."""

    def __init__(self) -> None:
        self._lock, self.cancelled = threading.Lock(), False
        self._kill: Callable[[], None] | None = None

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._kill is not None:
                self._kill()

    def guard(self, kill: Callable[[], None] | None) -> None:
        """From now on ``cancel`` calls ``kill``; None means that there is nothing left to cancel."""
        with self._lock:
            self._kill = kill
            if self.cancelled and kill is not None:
                kill()


class Trials:
    """At most ``NUM_WORKERS`` processes for one tokenizer, started when they are needed. Safe for several threads."""

    def __init__(self, tokenizer_json: str, vocab_size: int, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._first = json.dumps([tokenizer_json, vocab_size]).encode()
        self._places = threading.Semaphore(NUM_WORKERS)
        self._idle: list[_Worker] = []
        self._closed = False

    def warm(self) -> None:
        """Start a worker, so that one is ready."""
        with self._places:
            self._give_back(self._take())

    def run(self, schema: str | None, grammar: str | None, cancellation: Cancellation) -> tuple[str | None, float]:
        """What is wrong with a grammar, if anything, and how long it took to compile, in seconds of processor time.

        Raises TrialFailed if that could not be determined, and TrialCancelled.
        """
        question = json.dumps([schema, grammar]).encode()
        with self._places:
            for _ in range(2):  # once more if somebody else ended the process
                if cancellation.cancelled:
                    raise TrialCancelled
                worker = self._take()
                if cancellation.cancelled:  # while it started; the next one need not wait for another
                    self._give_back(worker)
                    raise TrialCancelled
                answer: bytes | None = None
                try:
                    cancellation.guard(worker.kill)
                    answer = worker.ask(question, _MAX_WALL_S)
                finally:
                    cancellation.guard(None)
                    if answer is None:
                        worker.close()
                    else:
                        self._give_back(worker)
                if answer is not None:
                    refusal, seconds = json.loads(answer)
                    return refusal, seconds
                if worker.late:
                    raise TrialFailed(f"this machine did not compile it within {_MAX_WALL_S:g} s; try again later")
                if not worker.killed:
                    return why_it_ended(worker.close(), self._limits), 0.0
        if cancellation.cancelled:
            raise TrialCancelled
        raise TrialFailed("the process that compiles it was killed; try again later")

    def close(self) -> None:
        """End the processes that run no trial; the others end with their trial."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> "_Worker":
        try:
            worker = self._idle.pop()
        except IndexError:
            return _Worker(self._first, self._limits)
        if worker.alive:
            return worker
        worker.close()  # somebody ended it meanwhile
        return _Worker(self._first, self._limits)

    def _give_back(self, worker: "_Worker") -> None:
        self._idle.append(worker)
        if self._closed:
            self.close()


class _Worker(HelperProcess):
    """One process, which has loaded the tokenizer."""

    def __init__(self, first: bytes, limits: Limits) -> None:
        """Raises TrialFailed if the process does not start."""
        super().__init__(trial_worker.__name__, str(limits.seconds), str(limits.megabytes))
        try:
            answer = self.ask(first, _MAX_START_S)
            if answer is None:
                raise TrialFailed("the process that compiles grammars did not start")
            if (error := json.loads(answer)) is not None:
                raise TrialFailed(error)
        except BaseException:
            self.close()
            raise
