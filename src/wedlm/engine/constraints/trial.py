# SPDX-License-Identifier: Apache-2.0
"""Tries grammars in processes of their own, within limits of time and memory, before this process compiles them.

A compiled grammar cannot be handed from one process to another. But compiling does the same again: what was built
there within the limits will be built here within them, and what was not has harmed nothing but its worker, which is
replaced by the next trial.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from wedlm.engine.constraints import trial_worker
from wedlm.engine.constraints.trial_worker import LIMITS, Limits, why_it_ended

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
        self._first = _line([tokenizer_json, vocab_size])
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
        question = _line([schema, grammar])
        with self._places:
            for _ in range(2):  # once more if somebody else ended the process
                if cancellation.cancelled:
                    raise TrialCancelled
                worker = self._take()
                answer: Any = None
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
                    return answer[0], answer[1]
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


class _Worker:
    """One process, which knows the tokenizer."""

    def __init__(self, first: bytes, limits: Limits) -> None:
        """TrialFailed if it does not come up."""
        # One heap, so that the limit of memory is not taken for the address space of others.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", trial_worker.__name__, str(limits.seconds), str(limits.megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self.late = False
        try:
            error = self.ask(first, _MAX_START_S, died="the process that compiles grammars did not start")
            if error is not None:
                raise TrialFailed(error)
        except BaseException:
            self.close()
            raise

    def ask(self, question: bytes, limit_s: float, died: Any = None) -> Any:
        """The answer, or ``died`` if the process ended over it."""
        timer = threading.Timer(limit_s, self._be_late)
        timer.daemon = True
        timer.start()
        try:
            self._questions.write(question)
            self._questions.flush()
            answer = self._answers.readline()
        except OSError:
            answer = b""
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        self._process.kill()
        self._process.wait()
        return died

    @property
    def killed(self) -> bool:
        """Whether the process was ended as only others do it."""
        return self._process.poll() == -getattr(signal, "SIGKILL", 0)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> int:
        """End the process; its return code."""
        self._process.kill()
        returncode = self._process.wait()
        for stream in (self._questions, self._answers):
            with suppress(OSError):  # what was not written has no reader
                stream.close()
        return returncode

    def _be_late(self) -> None:
        self.late = True
        self._process.kill()


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"
