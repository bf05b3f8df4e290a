# SPDX-License-Identifier: Apache-2.0
"""The process that compiles a stranger's grammar before the server does, see ``trial.py``. It is run by ``python -m``
with the limits in seconds and megabytes.

It answers questions in JSON. First comes [tokenizer, vocabulary size], answered by null or a sentence. Then come
grammars, [schema, grammar], each answered by [null or a sentence, seconds of processor time]. Breaking a limit ends the
process. The time limit counts processor time where there are interval timers (not on Windows); the memory limit counts
from the memory held before, where /proc shows it (Linux).
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wedlm.engine.constraints.build import build, load_tokens, sentence
from wedlm.engine.constraints.one_of import check_one_of
from wedlm.engine.helper_process import answer_questions


@dataclass(frozen=True)
class Limits:
    """The limits of one trial: at least ten times what human-written schemas of 65,536 characters need."""

    seconds: float = 1.0
    megabytes: int = 256


LIMITS = Limits()

# Less than any thread has that builds the grammar again: what overflows the stack must do so here.
_STACK_BYTES = 2**20


def main() -> None:
    """Answer questions until the other side closes."""
    threading.stack_size(_STACK_BYTES)
    trials = _Trials(Limits(float(sys.argv[1]), int(sys.argv[2])))
    # Only the main thread may say what signals do, and only another has a stack of that size.
    if hasattr(signal, "SIGINT"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    thread = threading.Thread(target=answer_questions, args=(trials.answer,), daemon=True)
    thread.start()
    thread.join()


class _Trials:
    """Answers the questions of one process."""

    def __init__(self, limits: Limits) -> None:
        self._meter, self._tokens = _Meter(limits), None

    def answer(self, question: bytes) -> bytes:
        if self._tokens is None:
            self._tokens, error = _load(*json.loads(question))
            return json.dumps(error).encode()
        started = time.process_time()
        self._meter.start()
        error = _try(self._tokens, *json.loads(question))
        self._meter.stop()
        return json.dumps([error, time.process_time() - started]).encode()


def _load(tokenizer_json: str, vocab_size: int) -> tuple[Any, str | None]:
    try:
        return load_tokens(tokenizer_json, vocab_size), None
    except ValueError as error:
        return None, str(error)


def _try(tokens: Any, schema: str | None, grammar: str | None) -> str | None:
    """What is wrong with a grammar, if anything."""
    try:
        if schema is not None:
            check_one_of(json.loads(schema))
        build(tokens, schema, grammar)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except BaseException as error:  # a panic of the Rust library is no Exception
        return sentence(error)
    return None


_OUT_OF_MEMORY = 77


class _Meter:
    """Keeps trials within the limits, as far as this system can."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        try:
            import resource
        except ImportError:
            self._resource: Any = None
        else:
            self._resource = resource
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def start(self) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(
                signal.ITIMER_PROF, self._limits.seconds
            )  # SIGPROF ends the process, inside the library, too
        self._limit_memory(self._limits.megabytes * 2**20)

    def stop(self) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
        self._limit_memory(None)

    def _limit_memory(self, more: int | None) -> None:
        try:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return
        hard = self._resource.getrlimit(self._resource.RLIMIT_AS)[1]
        most = hard if more is None else held + more
        if hard != self._resource.RLIM_INFINITY:
            most = min(most, hard)
        self._resource.setrlimit(self._resource.RLIMIT_AS, (most, hard))


def why_it_ended(returncode: int, limits: Limits) -> str:
    """What a trial did to end the process."""
    if returncode == -getattr(signal, "SIGPROF", 0):
        return f"it takes more than {limits.seconds:g} s to compile; expected a simpler one"
    if returncode in (_OUT_OF_MEMORY, -signal.SIGABRT):
        return f"it takes more than {limits.megabytes} MB to compile; expected a simpler one"
    return "the grammar library broke down on it; expected a simpler one"


if __name__ == "__main__":
    main()
