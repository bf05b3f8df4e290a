# SPDX-License-Identifier: Apache-2.0
"""From a checked body to an answer: prompts, admission, the engine, and what can go wrong on the way."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from wedlm.engine.adapters import UnknownAdapter
from wedlm.engine.llm import LLM
from wedlm.engine.outputs import GenerationOutput
from wedlm.engine.request_stream import EngineFault, EngineStopped, RequestStream
from wedlm.model.lora.row_factors import RowFactors
from wedlm.server.answers import OPENAI, Job, in_pieces
from wedlm.server.bodies import Parser, not_an_object, parse
from wedlm.server.config import ServerConfig
from wedlm.server.converters.base import Chat
from wedlm.server.converters.responses import ResponseStore
from wedlm.server.errors import ApiError, internal_error, queue_full, refused, unavailable, unknown_model
from wedlm.server.limits import takes_body
from wedlm.server.metrics import Metrics, Stopwatch
from wedlm.server.protocol import ChatRequest, CompletionRequest, LoadAdapterRequest, UnloadAdapterRequest
from wedlm.server.served import ServedModel
from wedlm.server.sse import CutOff, Disconnected, EventStream, Whole, unless_disconnected
from wedlm.server.workers import Busy, Workers

log = logging.getLogger("wedlm.server")
WARNING = "X-Wedlm-Warning"
_SEND_S = 10.0  # beyond the request's time, for a slow client to take the last of a stream
_SMALL_BYTES = 2**15  # a body of up to this size does not wait for larger ones
_MAX_WAITING = 256  # bodies to be read
_MAX_LOADING = 8  # adapters to be read
_SHOWN = 80  # characters of an unknown model's name
_LOOP_ENTRIES = 512  # log-probabilities that are written in the event loop; more of them elsewhere
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Service:
    """What the routes call. ``models`` are served by name; ``draining`` refuses everything new."""

    def __init__(self, models: Mapping[str, LLM], config: ServerConfig) -> None:
        if not models or not all(models):
            raise ValueError(f"models are {list(models)}; expected at least one, and a name for each")
        self.config = config
        self.metrics = Metrics()
        self.responses = ResponseStore()
        self.draining = False
        self.num_preparing = 0  # requests whose body has been read and which the engine has not taken yet
        self._small, self._large = Workers("small", 2, _MAX_WAITING), Workers("large", 1, _MAX_WAITING // 4)
        self.parser = Parser()  # for the thread of large bodies
        self._answers = Workers("answers", 2, _MAX_WAITING)
        self.models = {
            name: ServedModel(name, llm, config, self.metrics, lambda: self.draining) for name, llm in models.items()
        }
        names = [*self.models, *(adapter for one in self.models.values() for adapter in one.llm.adapters)]
        if len(set(names)) < len(names):
            raise ValueError(f"models and adapters are called {', '.join(names)}; expected a name for each")
        self._loading = Workers("adapters", 1, _MAX_LOADING)

    def start(self) -> None:
        """Give the engines to threads. Call it in the loop."""
        for one in self.models.values():
            one.start()
        self.metrics.watch(self._num_at_work)
        self._cut_off = asyncio.Event()

    def _num_at_work(self) -> int:
        """Requests being prepared, or threads still working on some that ended, whichever number is larger."""
        threads = (self._small, self._large, self._answers, self._loading)
        working = sum(workers.num_working for workers in threads)
        return max(self.num_preparing, working)

    def cut_off(self) -> None:
        """End what is being prepared with a 503; requests in the engines end with these."""
        self._cut_off.set()

    async def stop(self) -> None:
        """End the engines and the threads."""
        self.cut_off()
        await self.stop_engines()
        for workers in (self._small, self._large, self._answers, self._loading):
            workers.close()
        self.parser.close()

    async def stop_engines(self) -> None:
        """Stop the engines; what they hold fails with EngineStopped."""
        await asyncio.gather(*(one.engine.stop() for one in self.models.values()))

    @property
    def num_sequences(self) -> int:
        """The number of sequences in the engines."""
        return sum(one.engine.num_open for one in self.models.values())

    @property
    def num_open(self) -> int:
        """Requests that are being prepared, plus sequences in the engines."""
        return self.num_preparing + self.num_sequences

    @property
    def status(self) -> str:
        """Either "ok", or why the first model that refuses requests does so."""
        return next((one.status for one in self.models.values() if one.status != "ok"), "ok")

    @property
    def is_dead(self) -> bool:
        """Whether an engine is beyond repair."""
        return any(one.engine.state == "dead" for one in self.models.values())

    @property
    def names(self) -> dict[str, str | None]:
        """What clients may call a model: the models, and their adapters with the model that each belongs to."""
        adapters = {adapter: name for name, one in self.models.items() for adapter in one.llm.adapters}
        return {**dict.fromkeys(self.models), **adapters}

    def model(self, name: str | None) -> ServedModel:
        """The model, or the adapter, of that name; None means the only model. Raises ApiError 404 if there is none."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            message = f"model is missing; expected one of {', '.join(self.models)}"
            raise ApiError(400, message, param="model", code="missing")
        if name in self.models:
            return self.models[name]
        adapted = (one.adapted(name) for one in self.models.values())
        found = next((one for one in adapted if one is not None), None)
        if found is None:
            shown = repr(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")
            raise unknown_model(f"model is {shown}; expected {' or '.join(self.names)}")
        return found

    async def load_adapter(self, request: Request) -> Response:
        """Load an adapter under a name. Raises ApiError."""
        self._check_admin()
        return await self._timed(request, lambda raw, _: self._load_adapter(raw))

    async def unload_adapter(self, request: Request) -> Response:
        """Remove an adapter's name. Raises ApiError."""
        self._check_admin()
        return await self._timed(request, lambda raw, _: self._unload_adapter(raw))

    def _check_admin(self) -> None:
        if not self.config.api_keys:
            message = "this server has no API key; expected one (--api-key) where adapters are loaded and unloaded"
            raise ApiError(403, message, type="permission_error", code="needs_api_key")

    async def _load_adapter(self, raw: bytes) -> Response:
        asked = await self._small.run(partial(parse, raw, LoadAdapterRequest))
        base = self._base(asked.base_model_name)
        name, folder = asked.lora_name, self.config.adapter_folder
        if folder is None:
            message = "no folder of adapters was named at the server's start; expected one (--adapter-folder)"
            raise ApiError(403, message, type="permission_error", code="no_adapter_folder")
        try:
            if name in self.names:
                raise ValueError(f"lora_name is {name!r}, which is served already; expected another name")
            base.llm.engine.adapters.check(name)
            factors = await self._loading.run(partial(_read_adapter, base.llm, name, folder, asked.lora_path))
            if name in self.models:
                raise ValueError(f"lora_name is {name!r}, which is served already; expected another name")
            await base.engine.load_adapter(name, factors)
        except ValueError as error:
            raise ApiError(400, str(error), param="lora_path", code="invalid_value") from error
        log.info("adapter %r of %s was loaded", name, base.name)
        return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")

    async def _unload_adapter(self, raw: bytes) -> Response:
        asked = await self._small.run(partial(parse, raw, UnloadAdapterRequest))
        name = asked.lora_name
        base = next((one for one in self.models.values() if name in one.llm.adapters), None)
        try:
            if base is None:
                raise UnknownAdapter("there is no adapter of that name")
            await base.engine.unload_adapter(name)
        except UnknownAdapter:
            known = [one for one, parent in self.names.items() if parent is not None]
            message = f"lora_name is {name[:_SHOWN]!r}; expected {' or '.join(known) or 'one that is loaded'}"
            raise ApiError(404, message, type="not_found_error", param="lora_name", code="model_not_found") from None
        log.info("adapter %r of %s was unloaded", name, base.name)
        return Response(f"Success: LoRA adapter '{name}' removed successfully.", media_type="text/plain")

    def _base(self, name: str | None) -> ServedModel:
        """The model that an adapter is for; None means the only one. Raises ApiError."""
        if name is None and len(self.models) > 1:
            message = f"base_model_name is missing; expected one of {', '.join(self.models)}"
            raise ApiError(400, message, param="base_model_name", code="missing")
        if name is not None and name not in self.models:
            message = f"base_model_name is {name[:_SHOWN]!r}; expected {' or '.join(self.models)}"
            raise ApiError(404, message, type="not_found_error", param="base_model_name", code="model_not_found")
        return next(iter(self.models.values())) if name is None else self.models[name]

    async def respond(self, request: Request, kind: type[BaseModel]) -> Response:
        """Read a request's body and answer it. ``kind`` is ``ChatRequest``, ``CompletionRequest``, or another API's
        request that becomes a ``Chat``. After the body's last byte it has ``request_timeout_s``, and it ends when the
        client leaves. Raises ApiError if the request is refused, or fails before the answer has begun."""
        return await self._timed(request, lambda raw, deadline: self._respond(request, raw, kind, deadline))

    async def _timed(self, request: Request, work: Callable[[bytes, float], Coroutine[Any, Any, Response]]) -> Response:
        """The result of ``work`` on the body before a deadline, which it is told, unless the client leaves."""
        if not takes_body(request.headers):
            raise not_an_object()
        raw = await request.body()
        del request._body  # the engine may take minutes, in which no text of it is needed
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                return await unless_disconnected(request.receive, work(raw, deadline), self._cut_off)
        except Disconnected:
            request.scope["wedlm.log"]["disconnected"] = True
            return Response(status_code=499)  # only the log will see it
        except CutOff:
            raise _failure(EngineStopped()) from None
        except Busy as error:
            raise queue_full(str(error)) from error
        except (EngineFault, EngineStopped, TimeoutError) as error:
            raise _failure(error) from error

    async def _respond(self, request: Request, raw: bytes, kind: type[BaseModel], deadline: float) -> Response:
        workers, read = self._reading(raw)
        self.num_preparing += 1
        try:
            asked: Any = await workers.run(partial(read, raw, kind))
            own = isinstance(asked, ChatRequest | CompletionRequest)
            chat = Chat(asked) if own else await workers.run(partial(self._chat, asked))
            model = self.model(chat.body.model)
            request.scope["wedlm.log"]["model"] = model.name
            if isinstance(chat.body, CompletionRequest):
                job = await model.completion_job(chat.body, workers)
            else:
                job = await model.chat_job(chat.body, workers)
        finally:
            self.num_preparing -= 1
        return await self._answer(model, replace(job, form=chat.form or OPENAI), request, deadline)

    def _reading(self, raw: bytes) -> tuple[Workers, Callable[[bytes, type[Any]], Any]]:
        """Which threads read a body, and how."""
        return (self._small, parse) if len(raw) <= _SMALL_BYTES else (self._large, self.parser.parse)

    def _chat(self, body: Any) -> Chat:
        """Another API's request as a chat."""
        try:
            return body.chat(self)
        except ValueError as error:
            raise refused(error, "chat") from error

    async def look_up(self, request: Request, kind: type[M], work: Callable[[M], Any]) -> Response:
        """Answer a request that needs no engine with ``work``, in a thread, under the rules of ``respond``."""
        return await self._timed(request, lambda raw, _: self._look_up(raw, kind, work))

    async def _look_up(self, raw: bytes, kind: type[M], work: Callable[[M], Any]) -> Response:
        workers, read = self._reading(raw)

        def answer() -> bytes:
            return in_pieces(work(read(raw, kind)))

        try:
            return Whole(await workers.run(answer))
        except ValueError as error:
            raise refused(error, "chat") from error

    def count(self, body: Any) -> dict[str, int]:
        """The tokens of the prompt of Anthropic's request. Runs in a thread."""
        chat = body.chat(self).body
        prompt = self.model(chat.model).prompts.of(chat, chat.offered_tools)
        return {"input_tokens": len(prompt.token_ids)}

    async def _answer(self, model: ServedModel, job: Job, request: Request, deadline: float) -> Response:
        """Run a job. Raises the engine's error if it refuses or fails the job before the answer has begun."""
        model.admit(len(job.sequences))  # once more: the prompts took time
        if job.only_prompt:
            return await self._prompt_alone(model, job, request)
        ticket = model.engine.submit(job.sequences, job.watches, job.streams, model.adapter)
        request.scope["wedlm.log"] |= {"id": job.id, "prompt_tokens": job.num_prompt_tokens}
        request.scope["wedlm.course"] = {"queued": time.perf_counter()}
        headers = {} if job.warning is None else {WARNING: job.warning}
        if job.warning is not None:
            request.scope["wedlm.log"]["warning"] = job.warning
        timer = asyncio.get_running_loop().call_at(deadline, ticket.expire)
        handed_over = False

        def close() -> None:
            timer.cancel()
            ticket.abort()

        try:
            await ticket.accepted()
            if job.streams:
                handed_over = True
                limit = deadline - asyncio.get_running_loop().time() + _SEND_S
                events = self._events(model, job, ticket, request)
                return EventStream(events, close, limit, headers, media_type=job.form.stream_type)
            outputs = await self._collect(model, job, ticket, request)
            num_tokens = sum(len(output.token_ids) for output in outputs)
            num_entries = num_tokens * job.entries_per_token + job.num_echoed
            left = threading.Event()
            build = partial(job.form.whole, job, outputs, model.llm.tokenizer, left.is_set)
            try:
                return Whole(await self._off_loop(build, num_entries), headers=headers)
            finally:
                left.set()  # the thread need not go on if this was cancelled
        except ValueError as error:
            raise refused(error, job.kind) from error
        finally:
            if not handed_over:
                close()

    async def _prompt_alone(self, model: ServedModel, job: Job, request: Request) -> Response:
        """The answer without tokens of its own."""
        request.scope["wedlm.log"] |= {"id": job.id, "prompt_tokens": job.num_prompt_tokens}
        logprobs: list[float] | None = [] if job.shows_logprobs else None
        nothing = GenerationOutput("", [], None, "length", logprobs=logprobs)
        build = partial(job.form.whole, job, [nothing] * len(job.sequences), model.llm.tokenizer)
        return Whole(await self._off_loop(build, job.num_echoed))

    async def _off_loop(self, work: Callable[[], T], num_entries: int) -> T:
        """The result of ``work``, which writes that many tokens or log-probabilities; runs in a thread if it takes
        time."""
        return work() if num_entries <= _LOOP_ENTRIES else await self._answers.run(work)

    async def _collect(
        self, model: ServedModel, job: Job, ticket: RequestStream, request: Request
    ) -> list[GenerationOutput]:
        outputs: dict[int, GenerationOutput] = {}
        stopwatch = Stopwatch(model.metrics, len(job.sequences))
        async for news in ticket:
            for index, piece in news:
                stopwatch.piece(index, piece)
                if piece.output is not None:
                    outputs[index] = piece.output
        return _in_order(outputs, request)

    async def _events(
        self, model: ServedModel, job: Job, ticket: RequestStream, request: Request
    ) -> AsyncIterator[bytes]:
        outputs: dict[int, GenerationOutput] = {}
        stopwatch = Stopwatch(model.metrics, len(job.sequences))
        stream = job.form.stream(job, model.llm.tokenizer)
        try:
            yield stream.opening()
            async for news in ticket:
                for index, piece in news:
                    stopwatch.piece(index, piece)
                    if piece.output is not None:
                        outputs[index] = piece.output
                num_tokens = sum(len(piece.token_ids) for _, piece in news)
                write = partial(stream.pieces, news)
                yield await self._off_loop(write, num_tokens * job.entries_per_token)
            yield stream.closing(_in_order(outputs, request))
        except Exception as error:
            failure = _failure(error)
            if failure.status == 500:
                log.error("a stream failed", exc_info=error, extra={"fields": request.scope["wedlm.log"]})
            request.scope["wedlm.log"]["error"] = failure.detail.code
            yield stream.failure(failure)


def _read_adapter(llm: LLM, name: str, folder: str, path: str) -> RowFactors:
    """Runs in a thread. ``path`` must lead below ``folder``; ValueErrors reveal nothing about other places."""
    root = Path(folder).resolve()
    try:
        directory = (root / path).resolve()
        is_below = directory != root and directory.is_relative_to(root) and directory.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a loop of links, or no path at all
        is_below = False
    if not is_below:
        raise ValueError(f"lora_path is {path[:_SHOWN]!r}; expected a directory below the server's --adapter-folder")
    try:
        return llm.read_adapter(name, directory)
    except ValueError as error:
        raise ValueError(str(error).replace(str(directory), path)) from error


def _in_order(outputs: dict[int, GenerationOutput], request: Request) -> list[GenerationOutput]:
    ordered = [outputs[index] for index in sorted(outputs)]
    tokens = sum(len(output.token_ids) for output in ordered)
    request.scope["wedlm.log"] |= {"tokens": tokens, "finish": [output.finish_reason for output in ordered]}
    stats = [output.stats for output in ordered if output.stats is not None]
    if stats:
        course = request.scope["wedlm.course"]
        course["prefill"] = course["queued"] + min(one.queue_s for one in stats)
        course["decode"] = course["queued"] + min(one.time_to_first_token_s for one in stats)
        course["end"] = course["queued"] + max(one.elapsed_s for one in stats)
    return ordered


def _failure(error: Exception) -> ApiError:
    if isinstance(error, EngineFault):
        return ApiError(500, f"{error}; send the request again", type="server_error", code="engine_fault")
    if isinstance(error, EngineStopped):
        return unavailable("the server is shutting down", "shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took longer than the server allows", type="timeout_error", code="timeout")
    return internal_error()
