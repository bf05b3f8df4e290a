# SPDX-License-Identifier: Apache-2.0
"""Grammars over the tokens of a tokenizer: compiled within limits, kept, and followed token by token."""

import asyncio
import functools
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wedlm.engine.constraints.build import build, library, load_tokens
from wedlm.engine.constraints.trial import NUM_WORKERS, Cancellation, TrialFailed, Trials
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Tokenizer

# Kept for the next caller. What took processor time takes memory, at 160 MB a second at most.
_MAX_KEPT, _MAX_KEPT_SECONDS = 64, 3.0
_NEW_STATES_S = 0.001  # a step that takes longer has found states that will be kept
_MAX_REFUSALS = 256
_MAX_WAITING = 32
# Processor time of one text's matcher, beyond which it fails: ordinary ones take 0.2 ms for a token.
_SECONDS_FREE, _SECONDS_PER_TOKEN = 2.0, 0.01


class Matcher(Protocol):
    """A grammar and the state that a text has reached in it. It only knows text tokens; the caller handles the end of
    the text.

    A matcher that reached its own limits is ``failed`` and refuses everything. If it was the limit of one step, the
    matcher recovers once the tokens on the way there are taken back.
    """

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [vocabulary]."""

    def advance(self, token: int) -> bool:
        """Advance by a token. Returns False, with nothing changed, if it may not come next."""

    def rewind(self, count: int) -> None:
        """Take the last ``count`` tokens back."""

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""

    @property
    def complete(self) -> bool:
        """Whether the text may end here and nothing may follow."""

    @property
    def failed(self) -> bool: ...


@functools.lru_cache(maxsize=4)
def grammars_of(tokenizer: Tokenizer, vocab_size: int) -> "Grammars":
    """The grammars of a tokenizer, for as long as it lives; its tables take a fraction of a second to make."""
    return Grammars(tokenizer, vocab_size)


class GrammarsBusy(Exception):
    """Too many grammars wait to be compiled."""


class Compiled:
    """llguidance's matcher at the beginning of a text, and the processor time that compiling took."""

    def __init__(self, beginning: Any, seconds: float) -> None:
        self.beginning, self.seconds = beginning, seconds


class Grammars:
    """Compiles grammars, for several threads. ``vocab_size`` is the model's, which may be padded.

    Each grammar is first tried in a separate process, see ``trial.py``. Results are cached: the latest ones, and those
    that a caller holds, so that a caller who compiles ahead and holds the result finds it again in any thread.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Raises ValueError if llguidance is missing or cannot read the tokenizer."""
        self.vocab_size = vocab_size
        library()
        text, size = tokenizer.backend.to_str(), max(vocab_size, tokenizer.vocab_size)
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Compiled] = OrderedDict()
        self._held: weakref.WeakValueDictionary[_Key, Compiled] = weakref.WeakValueDictionary()
        self._refusals: OrderedDict[_Key, str] = OrderedDict()
        self._num_waiting = 0
        self._trials = Trials(text, size)
        self._threads = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="grammar")
        weakref.finalize(self, _close, self._trials, self._threads)
        self._first_warm = self._threads.submit(self._trials.warm)  # while this process reads the tokenizer, too
        self._tokens = load_tokens(text, size)

    def matcher(self, params: SamplingParams) -> Matcher:
        """A matcher at the beginning of the text. Raises ValueError, naming the field, for an invalid grammar."""
        return LibraryMatcher(self.compile(params), self.vocab_size)

    def compile(self, params: SamplingParams, cancellation: Cancellation | None = None) -> Compiled:
        """Compile like ``matcher``; may raise TrialCancelled. Takes seconds at worst, and no time while a caller holds
        the result."""
        schema = params.json_schema
        assert not isinstance(schema, dict), "SamplingParams keeps schemas as text"
        key, name = (schema, params.grammar), "grammar" if schema is None else "json_schema"
        refusal = self._refusals.get(key)
        found = self._find(key) if refusal is None else None
        if refusal is None and found is None:
            wait([self._first_warm])  # submitted before anything that could wait for it in the same threads
            try:
                refusal, seconds = self._trials.run(*key, cancellation or Cancellation())
            except TrialFailed as error:
                raise ValueError(f"{name} is not usable: {error}") from error
            if refusal is None:
                return self._keep(key, Compiled(build(self._tokens, *key), seconds))
            self._refuse(key, refusal)
        if found is None:
            raise ValueError(f"{name} is not usable: {refusal}")
        return found

    async def compile_ahead(self, params: SamplingParams) -> Compiled:
        """Run ``compile`` in a separate kind of thread, and stop it if the caller is cancelled. Raises GrammarsBusy."""
        if self._num_waiting >= _MAX_WAITING:
            raise GrammarsBusy(f"{self._num_waiting} grammars wait to be compiled; expected fewer, try again later")
        cancellation = Cancellation()
        self._num_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self.compile, params, cancellation)
        finally:
            self._num_waiting -= 1
            cancellation.cancel()

    def _refuse(self, key: "_Key", refusal: str) -> None:
        with self._lock:
            self._refusals[key] = refusal
            if len(self._refusals) > _MAX_REFUSALS:
                self._refusals.popitem(last=False)
        with suppress(RuntimeError):  # at exit
            self._threads.submit(self._trials.warm)  # the worker may have ended over it

    def _find(self, key: "_Key") -> Compiled | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._held.get(key)

    def _keep(self, key: "_Key", new: Compiled) -> Compiled:
        """The result to use, because another thread may have been faster."""
        with self._lock:
            new = self._held.setdefault(key, new)
            self._kept[key] = new
            self._kept.move_to_end(key)
            while len(self._kept) > _MAX_KEPT or (
                len(self._kept) > 1 and sum(one.seconds for one in self._kept.values()) > _MAX_KEPT_SECONDS
            ):
                self._kept.popitem(last=False)
            return new


_Key = tuple[str | None, str | None]  # schema, grammar


def _close(trials: Trials, threads: ThreadPoolExecutor) -> None:
    trials.close()
    threads.shutdown(wait=False, cancel_futures=True)


class LibraryMatcher:
    """llguidance's matcher as a ``Matcher``. It copies that of ``compiled`` and does not change it."""

    def __init__(self, compiled: Compiled, vocab_size: int) -> None:
        self._compiled, self._vocab_size = compiled, vocab_size
        self._matcher = compiled.beginning.deep_copy()
        self._tokens: list[int] = []
        self._seconds, self._exhausted = 0.0, False

    def allowed(self) -> NDArray[np.bool_]:
        started = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._charge(started)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def advance(self, token: int) -> bool:
        if self._exhausted:
            return False
        started = time.thread_time()
        moved = self._matcher.try_consume_tokens([token]) == 1
        self._charge(started)
        if moved:
            self._tokens.append(token)
        return moved

    def rewind(self, count: int) -> None:
        if not count:
            return
        del self._tokens[len(self._tokens) - count :]
        if not self._matcher.is_error():
            self._matcher.rollback(count)
            return
        # It failed on a way that was only tried, and it never leaves that state.
        started = time.thread_time()
        self._matcher = self._compiled.beginning.deep_copy()
        self._matcher.try_consume_tokens(self._tokens)
        self._charge(started)

    @property
    def accepting(self) -> bool:
        return not self.failed and self._matcher.is_accepting()

    @property
    def complete(self) -> bool:
        return self.accepting and self._matcher.is_stopped()

    @property
    def failed(self) -> bool:
        return self._exhausted or self._matcher.is_error()

    def _charge(self, started: float) -> None:
        """Count work. If a text's grammar costs far more than others', the text ends, for its neighbours' sake."""
        seconds = time.thread_time() - started
        self._seconds += seconds
        if seconds > _NEW_STATES_S:
            self._compiled.seconds += seconds
        self._exhausted = self._exhausted or self._seconds > _SECONDS_FREE + _SECONDS_PER_TOKEN * len(self._tokens)
