# SPDX-License-Identifier: Apache-2.0
"""Tries grammars in processes of their own, within limits of time and memory, before this process compiles them.

A compiled grammar cannot be handed from one process to another. But compiling does the same again: what was built
there within the limits will be built here within them, and what was not has harmed nothing but its worker, which is
replaced by the next trial.
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
    """Whoever asked has left."""


class TrialFailed(Exception):
    """It says nothing about the grammar."""


class Cancellation:
    """Cuts a trial off: ``cancel`` may come from any thread, before, during or after it."""

    def __init__(self) -> None:
        self._lock, self.cancelled = threading.Lock(), False
        self._kill: Callable[[], None] | None = None

    def cancel(self) -> None:
        with self._lock:
            self.cancelled = True
            if self._kill is not None:
                self._kill()

    def guard(self, kill: Callable[[], None] | None) -> None:
        """From now on ``kill`` is how to cut off; None: there is nothing to cut off any more."""
        with self._lock:
            self._kill = kill
            if self.cancelled and kill is not None:
                kill()


class Trials:
    """At most ``NUM_WORKERS`` processes for one tokenizer, started when they are needed. For several threads."""

    def __init__(self, tokenizer_json: str, vocab_size: int, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._first = json.dumps([tokenizer_json, vocab_size]).encode()
        self._places = threading.Semaphore(NUM_WORKERS)
        self._idle: list[_Worker] = []
        self._closed = False

    def warm(self) -> None:
        """Have a worker that is ready."""
        with self._places:
            self._give_back(self._take())

    def run(self, schema: str | None, grammar: str | None, cancellation: Cancellation) -> tuple[str | None, float]:
        """What is wrong with a grammar, if anything, and how long it took to compile, in seconds of processor time.

        TrialFailed where that could not be found out; TrialCancelled.
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
        """End the processes that run no trial; others end with theirs."""
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
    """One process, which knows the tokenizer."""

    def __init__(self, first: bytes, limits: Limits) -> None:
        """TrialFailed if it does not come up."""
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
