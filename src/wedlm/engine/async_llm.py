# SPDX-License-Identifier: Apache-2.0
"""An engine in a separate thread, for callers in an asyncio loop. Only that thread touches the engine."""

import asyncio
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from wedlm.engine.adapters import UnknownAdapter
from wedlm.engine.engine import Engine
from wedlm.engine.outputs import GenerationOutput, StreamPiece
from wedlm.engine.prompt_logprobs import PromptLogprobs, PromptScorer
from wedlm.engine.request import Request
from wedlm.engine.request_stream import EngineFault, EngineStopped, RequestStream
from wedlm.engine.sampling_params import SamplingParams
from wedlm.engine.turns import Turns
from wedlm.model.lora.row_factors import RowFactors

log = logging.getLogger(__name__)

State = Literal["running", "restarting", "dead", "stopped"]
T = TypeVar("T")
MAX_RESTARTS = 5  # attempts after one fault
_SMOKE_TEST_STEPS = 16


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How full the engine was after the last step."""

    num_waiting: int = 0
    num_running: int = 0
    pages_in_use: int = 0
    num_pages: int = 0
    waiting_adapters: tuple[str, ...] = ()
    running_adapters: tuple[str, ...] = ()


@dataclass(slots=True)
class _Live:
    """The engine thread's notes on one sequence: how much of it has been sent to the loop."""

    request: Request
    stream: RequestStream
    index: int
    characters: int = 0
    tokens: int = 0
    forwards: int = 0


class AsyncEngine:
    """Runs ``engine``, which must be empty (ValueError), in a thread. Create it inside the loop that will use it.

    ``rebuild(broken_engine)`` makes the engine that replaces it after a fault. ``state`` is "restarting" from the fault
    until the new engine has generated a token, and "dead" once ``MAX_RESTARTS`` of them failed to. Sequences that the
    broken engine held fail with EngineFault; those that it had not taken yet go to the new one. If several engines
    share a machine, the thread that steps holds ``turns``.
    """

    def __init__(
        self,
        engine: Engine,
        rebuild: Callable[[Engine], Engine],
        first_retry_s: float = 1.0,
        turns: Turns | None = None,
    ) -> None:
        if engine.has_work:
            raise ValueError(f"the engine has {len(engine.requests)} requests; expected one with none")
        self.engine, self._rebuild, self._first_retry_s = engine, rebuild, first_retry_s
        self._turns = Turns() if turns is None else turns
        self.state: State = "running"
        self.num_open = 0  # sequences submitted and not finished, in the loop's view
        self.num_faults = self.num_restarts = 0
        self.load = EngineLoad()
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count()
        self._live: dict[str, _Live] = {}
        self._scores: deque[tuple[asyncio.Future[PromptLogprobs], PromptScorer]] = deque()
        self._reports: list[Callable[[], None]] = []
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._ended = False
        # A daemon: a step that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="wedlm-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        sequences: Sequence[tuple[list[int], SamplingParams]],
        watch: bool = False,
        streamed: bool = True,
        adapter: str | None = None,
    ) -> RequestStream:
        """Queue sequences (prompt ids and parameters), all or none. ``watch``: pieces carry windows, one per step.
        ``streamed``: the caller reads the tokens as they come. ``adapter``: the name of a loaded adapter.

        Raises EngineStopped if the engine has stopped. Errors in a sequence come from ``RequestStream.accepted``.
        """
        if self._ended:
            raise EngineStopped("the engine has stopped")
        names = [f"request-{next(self._ids)}" for _ in sequences]
        stream = RequestStream(names, lambda: self._command(partial(self._abort, stream)), self._closed)
        self.num_open += stream.num_open
        self._command(partial(self._add, stream, list(sequences), watch, streamed, adapter))
        return stream

    async def load_adapter(self, name: str, factors: RowFactors) -> None:
        """Call ``Engine.load_adapter`` between two steps. Raises ValueError or EngineStopped."""
        await self._between_steps(lambda: self.engine.load_adapter(name, factors))

    async def unload_adapter(self, name: str) -> None:
        """Call ``Engine.unload_adapter`` between two steps. Raises UnknownAdapter or EngineStopped."""
        await self._between_steps(lambda: self.engine.unload_adapter(name))

    async def _between_steps(self, work: Callable[[], object]) -> None:
        """Have the engine's thread run ``work``, which happens even if the caller is cancelled."""
        if self._ended:
            raise EngineStopped("the engine has stopped")
        future: asyncio.Future[None] = self._loop.create_future()
        self._command(partial(self._do, future, work))
        await future

    async def score_prompt(
        self, prompt: Sequence[int], num_top: int, salt: str = "", adapter: str | None = None
    ) -> PromptLogprobs:
        """Compute the log-probabilities of a prompt's tokens between the steps. Stops if the caller is cancelled.

        Raises ValueError, EngineFault or EngineStopped.
        """
        if self._ended:
            raise EngineStopped("the engine has stopped")
        future: asyncio.Future[PromptLogprobs] = self._loop.create_future()
        self.num_open += 1
        self._command(partial(self._add_score, future, list(prompt), num_top, salt, adapter))
        try:
            return await future
        finally:
            self.num_open -= 1

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step in progress; everything still open fails with EngineStopped."""
        self._stopping.set()
        self._commands.put(None)
        end = self._loop.time() + timeout_s
        while self._thread.is_alive() and self._loop.time() < end:  # no thread waits: asyncio would wait for that one
            await asyncio.sleep(0.005)
        await asyncio.sleep(0)  # let what the thread reported last take effect

    def _closed(self, count: int) -> None:
        self.num_open -= count

    def _command(self, command: Callable[[], None]) -> None:
        if not self._ended:
            self._commands.put(command)

    # From here on: the engine thread.

    def _run(self) -> None:
        """Run until told to stop, or beyond repair. Catches BaseException, because a SystemExit from a library would
        end the thread silently and leave requests waiting for an engine that seems to run."""
        try:
            while self.state == "running":
                try:
                    self._serve()
                    self.state = "stopped"
                except BaseException as error:
                    self._recover(error)
            with self._turns:
                for request_id in self._live:  # none after a fault: the engine is whole
                    self.engine.abort(request_id)
        except BaseException:
            log.exception("the engine's thread failed outside a step")
            self.state = "dead"
        self._fail_live(EngineStopped("the engine has stopped"))
        self._report(self._thread_ended)
        self._send_reports()

    def _serve(self) -> None:
        """Run commands and steps until told to stop. While it waits for a command, others may have the turn."""
        while True:
            waited = [] if self.engine.has_work or self._scores else [self._commands.get()]
            with self._turns:
                if not self._obey(waited):
                    return
                self._note_load()
                self._send_reports()
                if self._scores:
                    self._score()
                    self._send_reports()
                if self.engine.has_work:
                    self._step()
                    self._note_load()
                    self._send_reports()

    def _obey(self, waited: list[Callable[[], None] | None]) -> bool:
        """Run these commands and all others in the queue. Returns False for a stop."""
        while True:
            try:
                command = waited.pop() if waited else self._commands.get_nowait()
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _add(
        self,
        stream: RequestStream,
        sequences: list[tuple[list[int], SamplingParams]],
        watch: bool,
        streamed: bool,
        adapter: str | None,
    ) -> None:
        how: dict[str, Any] = {"streamed": streamed, "watched": watch, "adapter": adapter}
        try:
            for index, (request_id, sequence) in enumerate(zip(stream.request_ids, sequences, strict=True)):
                request = self.engine.add(request_id, *sequence, turn=index, **how)
                self._live[request_id] = _Live(request, stream, index)
        except ValueError as error:
            self._drop(stream)
            self._report(partial(stream.fail, error))
        except BaseException:
            self._report(partial(stream.fail, EngineFault("the engine failed")))
            raise
        else:
            self._report(stream.accept)

    def _add_score(
        self,
        future: "asyncio.Future[PromptLogprobs]",
        prompt: list[int],
        num_top: int,
        salt: str,
        adapter: str | None,
    ) -> None:
        try:
            self._scores.append((future, PromptScorer(self.engine, prompt, num_top, salt, adapter)))
        except ValueError as error:
            self._report(partial(_settle, future, error))

    def _do(self, future: "asyncio.Future[None]", work: Callable[[], object]) -> None:
        """Run ``work``, which changes nothing if it fails."""
        try:
            work()
        except ValueError as error:
            self._report(partial(_settle, future, error))
        except BaseException:
            self._report(partial(_settle, future, EngineFault("the engine failed")))
            raise
        else:
            self._report(partial(_settle, future, None))

    def _score(self) -> None:
        """Score one chunk of one prompt, taking turns among prompts, so that streams do not wait for long."""
        future, scorer = self._scores[0]
        if future.done():  # the caller has left
            self._scores.popleft()
            return
        try:
            if not scorer.done and not scorer.advance(self.engine):
                assert self.engine.has_work, "a prompt that fits has no pages while nothing runs"
        except UnknownAdapter as error:
            self._scores.popleft()
            self._report(partial(_settle, future, error))
            return
        self._scores.rotate(-1)
        if scorer.done:
            self._scores.pop()
            self._report(partial(_settle, future, scorer.result))

    def _abort(self, stream: RequestStream) -> None:
        self._drop(stream)
        self._report(stream.end)

    def _drop(self, stream: RequestStream) -> None:
        for request_id in stream.request_ids:
            if self._live.pop(request_id, None) is not None:
                self.engine.abort(request_id)

    def _step(self) -> None:
        changed = {request.request_id for request in self.engine.step()}
        changed |= {
            name
            for name, one in self._live.items()
            if one.request.watched and one.request.counters.num_forwards > one.forwards
        }
        for name in changed:
            one = self._live[name]
            self._report(partial(one.stream.receive, one.index, self._piece(one)))
            if one.request.finish_reason is not None:
                del self._live[name]

    def _piece(self, one: _Live) -> StreamPiece:
        request = one.request
        sequence, text = request.output, request.output.text
        assert text is not None, "an engine behind AsyncEngine has a tokenizer"
        finished = request.finish_reason is not None
        first, sent = len(request.prompt_token_ids), one.tokens
        one.tokens, one.forwards = request.num_output_tokens, request.counters.num_forwards
        end = len(text.text) if finished else text.stable
        start, one.characters = one.characters, max(one.characters, end)
        borders = [0, *text.ends[max(0, sent - 1) : one.tokens]] if sent == 0 else text.ends[sent - 1 : one.tokens]
        if finished:  # characters that never became whole belong to the last token; an end token adds none
            borders = [*borders[: one.tokens - sent], len(text.text)]
        return StreamPiece(
            text=text.text[start:end],
            token_ids=sequence.tokens[first + sent :],
            step=request.counters.num_forwards - 1,
            output=GenerationOutput.of(request) if finished else None,
            token_texts=[text.text[a:b] for a, b in itertools.pairwise(borders)],
            logprobs=sequence.logprobs[sent:] if request.params.logprobs is not None else [],
            top_logprobs=sequence.top_logprobs[sent:] if request.params.logprobs else [],
            window=self.engine.runner.windows.snapshot(request) if one.request.watched and not finished else None,
        )

    def _recover(self, error: BaseException) -> None:
        """Fail what the broken engine held, and replace it by one that is known to work."""
        self.state = "restarting"
        self.num_faults += 1
        log.error("the engine failed in a step", exc_info=error)
        # A fault of its own says for users what happened.
        fault = EngineFault("the engine failed during a step; what it was generating is lost")
        self._fail_live(error if isinstance(error, EngineFault) else fault)
        for attempt in range(MAX_RESTARTS):
            if attempt and self._stopping.wait(self._first_retry_s * 2 ** (attempt - 1)):
                break
            try:
                with self._turns:
                    self.engine = self._rebuild(self.engine)
                    self._smoke_test()
            except BaseException:
                log.exception("the engine could not be restarted (attempt %d of %d)", attempt + 1, MAX_RESTARTS)
            else:
                self.num_restarts += 1
                self.state = "running"
                log.warning("the engine was restarted")
                return
        self.state = "stopped" if self._stopping.is_set() else "dead"

    def _smoke_test(self) -> None:
        """Generate one token."""
        request = self.engine.add("smoke test", [0], SamplingParams(max_tokens=1))
        for _ in range(_SMOKE_TEST_STEPS):
            self.engine.step()
            if request.finish_reason is not None:
                return
        raise RuntimeError(f"the new engine made no token in {_SMOKE_TEST_STEPS} steps")

    def _fail_live(self, error: Exception) -> None:
        for one in self._live.values():
            self._report(partial(one.stream.fail, error))
        self._live.clear()
        while self._scores:
            self._report(partial(_settle, self._scores.pop()[0], error))
        self._note_load()
        self._send_reports()

    def _note_load(self) -> None:
        scheduler, pool = self.engine.scheduler, self.engine.pool
        in_use = pool.num_pages - pool.num_available
        waiting, running = (_adapters_of(queue) for queue in (scheduler.waiting, scheduler.running))
        counts = len(scheduler.waiting), len(scheduler.running), in_use, pool.num_pages
        self.load = EngineLoad(*counts, waiting_adapters=waiting, running_adapters=running)

    def _report(self, report: Callable[[], None]) -> None:
        self._reports.append(report)

    def _send_reports(self) -> None:
        """Wake up the loop once for everything that a step has to report."""
        if self._reports:
            reports, self._reports = self._reports, []
            try:
                self._loop.call_soon_threadsafe(_call_all, reports)
            except RuntimeError:  # the loop is closed: no reader is left
                self._stopping.set()
                self._commands.put(None)

    def _thread_ended(self) -> None:
        """Runs in the loop: fail what was queued and never taken."""
        self._ended = True
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, partial) and command.func == self._add:
                command.args[0].fail(EngineStopped("the engine has stopped"))
            elif isinstance(command, partial) and command.func in (self._add_score, self._do):
                _settle(command.args[0], EngineStopped("the engine has stopped"))


def _adapters_of(requests: Iterable[Request]) -> tuple[str, ...]:
    return tuple(sorted({one.adapter.name for one in requests if one.adapter is not None}))


def _settle(future: "asyncio.Future[T]", result: T | Exception) -> None:
    """Runs in the loop."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _call_all(reports: list[Callable[[], None]]) -> None:
    for report in reports:
        report()
