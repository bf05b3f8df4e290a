# SPDX-License-Identifier: Apache-2.0
"""From a checked body to an answer: prompts, admission, the engine, and what can go wrong on the way."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from wedlm.engine.async_llm import AsyncEngine
from wedlm.engine.constraints.grammar import Compiled, Grammars, GrammarsBusy, grammars_of
from wedlm.engine.engine import Engine
from wedlm.engine.llm import LLM
from wedlm.engine.outputs import GenerationOutput
from wedlm.engine.request_stream import EngineFault, EngineStopped, RequestStream
from wedlm.engine.sampling_params import SamplingParams
from wedlm.server.answers import OPENAI, Job, PromptEcho, in_pieces
from wedlm.server.bodies import Parser, not_an_object, parse
from wedlm.server.config import ServerConfig
from wedlm.server.converters.base import Chat
from wedlm.server.converters.responses import ResponseStore
from wedlm.server.errors import ApiError, internal_error, queue_full, unavailable
from wedlm.server.limits import is_json
from wedlm.server.metrics import Metrics, Stopwatch
from wedlm.server.prompts import Prompt, Prompts
from wedlm.server.protocol import MAX_LOGPROB_ENTRIES, ChatRequest, CompletionRequest
from wedlm.server.readers import CallReader, ForcedReader, PlainReader, Reader, ThinkReader
from wedlm.server.sse import CutOff, Disconnected, EventStream, Whole, unless_disconnected
from wedlm.server.workers import Busy, Workers

log = logging.getLogger("wedlm.server")
WARNING = "X-Wedlm-Warning"
_COMPLETION_TOKENS = 16  # OpenAI's default there
_LARGEST_SEED = 2**63 - 1
_SEND_S = 10.0  # beyond the request's time, for a slow client to take the last of a stream
_SMALL_BYTES = 2**15  # a body of up to this size does not wait for larger ones
_MAX_WAITING = 256  # bodies to be read
_LOOP_ENTRIES = 512  # log-probabilities that are written in the event loop; more of them elsewhere
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Service:
    """What the routes call. ``engine`` exists from ``start`` on; ``draining`` refuses whatever is new."""

    engine: AsyncEngine

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self.llm, self.config = llm, config
        self.metrics = Metrics()
        self.responses = ResponseStore()
        self.draining = False
        self.num_preparing = 0  # requests whose body has been read and which the engine has not taken yet
        self._small, self._large = Workers("small", 2, _MAX_WAITING), Workers("large", 1, _MAX_WAITING // 4)
        self.parser = Parser()  # for the thread of large bodies
        self._answers = Workers("answers", 2, _MAX_WAITING)
        self.prompts = Prompts(llm, config)
        self._grammars = self._load_grammars()  # now, because it holds up every thread for a fraction of a second

    def _load_grammars(self) -> Grammars | str:
        """Or why there are none."""
        try:
            return grammars_of(self.llm.tokenizer, self.llm.engine.config.vocab_size)
        except ValueError as error:
            return str(error)

    def start(self) -> None:
        """Hand the LLM's engine over to a thread. In the loop."""
        self.engine = AsyncEngine(self.llm.engine, self._renew)
        self.metrics.watch(self.engine, self._num_at_work)
        self._cut_off = asyncio.Event()

    def _num_at_work(self) -> int:
        """Requests being prepared, or threads still at work on some that ended, whichever are more."""
        working = sum(workers.num_working for workers in (self._small, self._large, self._answers))
        return max(self.num_preparing, working)

    def cut_off(self) -> None:
        """End what is being prepared with a 503; what the engine has ends with the engine."""
        self._cut_off.set()

    async def stop(self) -> None:
        """End the engine and the threads."""
        self.cut_off()
        await self.engine.stop()
        for workers in (self._small, self._large, self._answers):
            workers.close()
        self.parser.close()

    def _renew(self, broken: Engine) -> Engine:
        self.llm.engine = self.llm.blueprint.rebuild(broken)
        return self.llm.engine

    @property
    def num_open(self) -> int:
        """Requests that are being prepared, and sequences that the engine has."""
        return self.num_preparing + self.engine.num_open

    @property
    def status(self) -> str:
        """ "ok", or why requests are refused."""
        if self.draining:
            return "draining"
        return "ok" if self.engine.state == "running" else self.engine.state

    async def respond(self, request: Request, model: type[BaseModel]) -> Response:
        """Read a request's body and answer it. ``model`` is ``ChatRequest``, ``CompletionRequest``, or another API's
        that becomes a ``Chat``. From the body's last byte on it has ``request_timeout_s``, and ends when the client
        leaves. ApiError where it is refused, or fails before the answer has begun."""
        return await self._timed(request, lambda raw, deadline: self._respond(request, raw, model, deadline))

    async def _timed(self, request: Request, work: Callable[[bytes, float], Coroutine[Any, Any, Response]]) -> Response:
        """What ``work`` makes of the body before the deadline that it is told, unless the client leaves."""
        if not is_json(request.headers.get("content-type", "")):
            raise not_an_object()
        raw = await request.body()
        del request._body  # the engine may take minutes, in which no text of it is needed
        deadline = asyncio.get_running_loop().time() + self.config.request_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                return await unless_disconnected(request.receive, work(raw, deadline), self._cut_off)
        except Disconnected:
            request.scope["wedlm.log"]["disconnected"] = True
            return Response(status_code=499)  # nobody will see it but the log
        except CutOff:
            raise _failure(EngineStopped()) from None
        except Busy as error:
            raise queue_full(str(error)) from error
        except (EngineFault, EngineStopped, TimeoutError) as error:
            raise _failure(error) from error

    async def _respond(self, request: Request, raw: bytes, model: type[BaseModel], deadline: float) -> Response:
        workers, read = self._reading(raw)
        self.num_preparing += 1
        try:
            asked: Any = await workers.run(partial(read, raw, model))
            own = isinstance(asked, ChatRequest | CompletionRequest)
            chat = Chat(asked) if own else await workers.run(partial(self._chat, asked))
            if isinstance(chat.body, CompletionRequest):
                job = await self._completion_job(chat.body, workers)
            else:
                job = await self._chat_job(chat.body, workers)
        finally:
            self.num_preparing -= 1
        return await self._answer(replace(job, form=chat.form or OPENAI), request, deadline)

    def _reading(self, raw: bytes) -> tuple[Workers, Callable[[bytes, type[Any]], Any]]:
        """Which threads read a body, and how."""
        return (self._small, parse) if len(raw) <= _SMALL_BYTES else (self._large, self.parser.parse)

    def _chat(self, body: Any) -> Chat:
        """Another API's request as a chat."""
        try:
            return body.chat(self)
        except ValueError as error:
            raise _refusal(error, "chat") from error

    async def look_up(self, request: Request, model: type[M], work: Callable[[M], Any]) -> Response:
        """Answer a request that needs no engine by ``work``, in a thread, under the rules of ``respond``."""
        return await self._timed(request, lambda raw, _: self._look_up(raw, model, work))

    async def _look_up(self, raw: bytes, model: type[M], work: Callable[[M], Any]) -> Response:
        workers, read = self._reading(raw)

        def answer() -> bytes:
            return in_pieces(work(read(raw, model)))

        try:
            return Whole(await workers.run(answer))
        except ValueError as error:
            raise _refusal(error, "chat") from error

    def count(self, body: Any) -> dict[str, int]:
        """The tokens of the prompt of Anthropic's request. In a thread."""
        chat = body.chat(self).body
        self.check_model(chat.model)
        return {"input_tokens": len(self.prompts.of(chat, chat.offered_tools).token_ids)}

    async def _chat_job(self, body: ChatRequest, workers: Workers) -> Job:
        """ApiError 400 if the conversation has no prompt, or an option is refused."""
        self._admit(body.model, body.n or 1)
        try:
            tools = body.offered_tools
        except ValueError as error:
            raise _refusal(error, "chat") from error
        prompt = await self._tokens(workers, partial(self.prompts.of, body, tools), "messages")
        job = await workers.run(partial(self._job, "chat", body, [prompt.token_ids], self._room(prompt.token_ids)))
        return replace(await self._with_grammar(job, body), new_reader=self._reader(body, prompt))

    def _reader(self, body: ChatRequest, prompt: Prompt) -> Callable[[], Reader]:
        """What makes a message of the text."""
        if body.forces_call:
            return ForcedReader
        names = [tool.function.name for tool in body.offered_tools]
        inner: Callable[[], Reader] = PlainReader
        if names:
            inner = partial(CallReader, self.prompts.tool_form, names, body.parallel_tool_calls is not False)
        if not self.prompts.reasons or body.forms_asked_for():  # a form leaves no room for reasoning
            return inner
        return lambda: ThinkReader(inner(), prompt.thinks)

    async def _with_grammar(self, job: Job, body: ChatRequest | CompletionRequest) -> Job:
        """With the grammar, if there is one, compiled and held, so that the engine's thread finds it done."""
        params = job.sequences[0][1]
        if params.json_schema is None and params.grammar is None:
            return job
        return replace(job, grammar=await self._compile(params, body.form_of_answer(self.prompts.tool_form)[0]))

    async def _compile(self, params: SamplingParams, field: str) -> Compiled:
        """In a process of its own, which ends when the caller is cancelled."""
        try:
            if isinstance(self._grammars, str):
                raise ValueError(self._grammars)
            return await self._grammars.compile_ahead(params)
        except GrammarsBusy as error:
            raise queue_full(str(error).removesuffix(", try again later")) from error
        except ValueError as error:
            message = _naming(field, str(error))
            raise ApiError(400, message, param=field, code="invalid_value") from error

    async def _completion_job(self, body: CompletionRequest, workers: Workers) -> Job:
        """As ``_chat_job``."""
        prompts = body.prompts
        several = "n" if (body.best_of or 1) <= (body.n or 1) else "best_of"
        self._admit(body.model, (getattr(body, several) or 1) * len(prompts), several)
        encoded = [
            await self._tokens(workers, partial(self.llm.tokenizer.encode, one), "prompt")
            if isinstance(one, str)
            else one
            for one in prompts
        ]
        job = await workers.run(partial(self._job, "text", body, encoded, _COMPLETION_TOKENS))
        return replace(await self._with_grammar(job, body), echoes=await self._echoes(body, encoded))

    async def _echoes(self, body: CompletionRequest, encoded: list[list[int]]) -> list[PromptEcho]:
        """What the answer tells of the prompts; none if nothing."""
        count = body.num_prompt_logprobs
        if not body.echo and count is None:
            return []
        if body.streams and (count is not None or body.only_prompt):
            message = "the prompt alone, or log-probabilities of it, are asked for beside stream; expected no stream"
            raise ApiError(400, message, param="stream", code="invalid_value")
        shown = body.logprobs if body.echo else None
        echoes = []
        for prompt, ids in zip(body.prompts, encoded, strict=True):
            text = None
            if body.echo:
                text = prompt if isinstance(prompt, str) else self.prompts.decode(ids)
            scores = None
            if count is not None:
                try:
                    scores = await self.engine.score_prompt(ids, count, body.cache_salt or "")
                except ValueError as error:
                    raise _refusal(error, "text") from error
            echoes.append(PromptEcho(ids, text, scores, shown, body.prompt_logprobs))
        return echoes

    async def _answer(self, job: Job, request: Request, deadline: float) -> Response:
        """Run a job. What the engine raises where it refuses or fails it before the answer has begun."""
        self._admit(job.model, len(job.sequences))  # once more: the prompts took time
        if job.only_prompt:
            return await self._prompt_alone(job, request)
        ticket = self.engine.submit(job.sequences, job.watches, job.streams)
        request.scope["wedlm.log"] |= {"id": job.id, "prompt_tokens": job.num_prompt_tokens}
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
                events = self._events(job, ticket, request)
                return EventStream(events, close, limit, headers, media_type=job.form.stream_type)
            outputs = await self._collect(job, ticket, request)
            num_tokens = sum(len(output.token_ids) for output in outputs)
            num_entries = num_tokens * job.entries_per_token + job.num_echoed
            left = threading.Event()
            build = partial(job.form.whole, job, outputs, self.llm.tokenizer, left.is_set)
            try:
                return Whole(await self._off_loop(build, num_entries), headers=headers)
            finally:
                left.set()  # the thread need not go on if this was cancelled
        except ValueError as error:
            raise _refusal(error, job.kind) from error
        finally:
            if not handed_over:
                close()

    async def _prompt_alone(self, job: Job, request: Request) -> Response:
        """The answer that has no tokens of its own."""
        request.scope["wedlm.log"] |= {"id": job.id, "prompt_tokens": job.num_prompt_tokens}
        logprobs: list[float] | None = [] if job.shows_logprobs else None
        nothing = GenerationOutput("", [], None, "length", logprobs=logprobs)
        build = partial(job.form.whole, job, [nothing] * len(job.sequences), self.llm.tokenizer)
        return Whole(await self._off_loop(build, job.num_echoed))

    async def _off_loop(self, work: Callable[[], T], num_entries: int) -> T:
        """The result of ``work``, which writes that many tokens or log-probabilities; in a thread if it takes time."""
        return work() if num_entries <= _LOOP_ENTRIES else await self._answers.run(work)

    async def _collect(self, job: Job, ticket: RequestStream, request: Request) -> list[GenerationOutput]:
        outputs: dict[int, GenerationOutput] = {}
        stopwatch = Stopwatch(self.metrics, len(job.sequences))
        async for news in ticket:
            for index, piece in news:
                stopwatch.piece(index, piece)
                if piece.output is not None:
                    outputs[index] = piece.output
        return _in_order(outputs, request)

    async def _events(self, job: Job, ticket: RequestStream, request: Request) -> AsyncIterator[bytes]:
        outputs: dict[int, GenerationOutput] = {}
        stopwatch = Stopwatch(self.metrics, len(job.sequences))
        stream = job.form.stream(job, self.llm.tokenizer)
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

    def check_model(self, model: str) -> None:
        """ApiError 404 unless the model is ours."""
        if model != self.config.model_name:
            message = f"model is {json_name(model)}; expected {self.config.model_name}"
            raise ApiError(404, message, type="not_found_error", param="model", code="model_not_found")

    def _admit(self, model: str, count: int, several: str = "n") -> None:
        """ApiError unless the model is ours, the engine runs, and there is room for ``count`` more sequences."""
        self.check_model(model)
        room = self.llm.engine.config.options.max_num_seqs + self.config.max_queue
        most = min(self.config.max_choices, room)
        if count > most:
            message = f"{several} times the number of prompts is {count}; expected at most {most}"
            raise ApiError(400, message, param=several, code="invalid_value")
        if self.status != "ok":
            raise unavailable(f"the server is {self.status} and takes no requests", self.status)
        if self.engine.num_open + count > room:
            raise queue_full(f"{self.engine.num_open} of {room} places are taken; expected {count} free ones")

    async def _tokens(self, workers: Workers, encode: "partial[T]", param: str) -> T:
        """In another thread: a long prompt must not hold up everybody's streams."""
        try:
            return await workers.run(encode)
        except ValueError as error:
            named = str(error).partition(" ")[0]
            param = named if named in ChatRequest.model_fields else param
            raise ApiError(400, str(error), param=param, code="invalid_value") from error

    def _room(self, prompt: Sequence[int]) -> int:
        """Tokens that the model and the cache have left for an answer to ``prompt``; at least 1."""
        config, pool = self.llm.engine.config, self.llm.engine.pool
        slots = pool.num_pages * pool.page_size - 2 * config.options.wedlm_window_size
        return max(1, min(config.max_model_len, slots) - len(prompt))

    def _job(self, kind: str, body: ChatRequest | CompletionRequest, prompts: list[list[int]], room: int) -> Job:
        if body.stream_options is not None and not body.streams:
            shown = body.stream_options.model_dump_json(exclude_unset=True)
            message = f"stream_options is {shown}; expected stream to be true beside it"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        if body.wedlm_trace and not body.streams:
            message = "wedlm_trace is true; expected stream to be true beside it"
            raise ApiError(400, message, param="wedlm_trace", code="invalid_value")
        if not prompts:
            raise ApiError(400, "prompt is []; expected at least one prompt", param="prompt", code="invalid_value")
        try:
            params = body.sampling_params(room, self.prompts.tool_form)
        except ValueError as error:
            raise _refusal(ValueError(_naming(_form_field(body, self.prompts), str(error))), kind) from error
        count = kept = body.n or 1
        shows_logprobs = params.logprobs is not None
        if isinstance(body, CompletionRequest) and body.best_of is not None:
            count = _best_of(body, kept)
            params = params if shows_logprobs else replace(params, logprobs=0)
        entries = count * len(prompts) * params.max_tokens * (0 if params.logprobs is None else 1 + params.logprobs)
        only_prompt = False
        if isinstance(body, CompletionRequest):
            only_prompt, asked = body.only_prompt, body.num_prompt_logprobs
            entries += 0 if asked is None else kept * sum(map(len, prompts)) * (1 + asked)
        if entries > MAX_LOGPROB_ENTRIES:
            message = (
                f"choices times max_tokens times log-probabilities of a token are {entries}; expected at most "
                f"{MAX_LOGPROB_ENTRIES} of them in an answer"
            )
            raise ApiError(400, message, param="logprobs", code="invalid_value")
        # Choices must differ under one seed, too: each has its own, the first the one given.
        seeds = [None if params.seed is None else min(params.seed + i, _LARGEST_SEED) for i in range(count)]
        return Job(
            kind="chat" if kind == "chat" else "text",
            model=self.config.model_name,
            sequences=[(prompt, replace(params, seed=seed)) for prompt in prompts for seed in seeds],
            num_choices=count,
            num_kept=kept,
            shows_logprobs=shows_logprobs,
            only_prompt=only_prompt,
            streams=body.streams,
            wants_usage=body.wants_usage,
            counts_always=body.counts_always,
            watches=bool(body.wedlm_trace),
            warning=self.llm.window_warning(params),
        )


def json_name(name: str) -> str:
    """A name from outside, short and quoted."""
    return repr(name if len(name) <= 80 else name[:80] + "...")


def _form_field(body: ChatRequest | CompletionRequest, prompts: Prompts) -> str:
    try:
        return body.form_of_answer(prompts.tool_form)[0]
    except ValueError:
        return "response_format"


def _naming(field: str, message: str) -> str:
    """An error of the engine's about the form of the answer, with the name of the field that asked for it."""
    for name in ("json_schema", "grammar"):
        if message.startswith(name):
            return field + message.removeprefix(name)
    return message


def _best_of(body: CompletionRequest, kept: int) -> int:
    """How many choices to make for those that are kept. ApiError."""
    assert body.best_of is not None
    if body.best_of < kept:
        message = f"best_of is {body.best_of}; expected at least n, {kept}"
        raise ApiError(400, message, param="best_of", code="invalid_value")
    if body.streams and body.best_of > kept:
        message = f"best_of is {body.best_of} beside stream; expected n, {kept}, or no stream"
        raise ApiError(400, message, param="best_of", code="invalid_value")
    return body.best_of


def _in_order(outputs: dict[int, GenerationOutput], request: Request) -> list[GenerationOutput]:
    ordered = [outputs[index] for index in sorted(outputs)]
    tokens = sum(len(output.token_ids) for output in ordered)
    request.scope["wedlm.log"] |= {"tokens": tokens, "finish": [output.finish_reason for output in ordered]}
    return ordered


def _refusal(error: ValueError, kind: str) -> ApiError:
    """The engine's sentences name the field first, or begin with "the prompt"."""
    name = str(error).partition(" ")[0]
    if name == "the":
        name = "messages" if kind == "chat" else "prompt"
    return ApiError(400, str(error), param=name, code="invalid_value")


def _failure(error: Exception) -> ApiError:
    if isinstance(error, EngineFault):
        return ApiError(500, f"{error}; send the request again", type="server_error", code="engine_fault")
    if isinstance(error, EngineStopped):
        return unavailable("the server is shutting down", "shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took longer than the server allows", type="timeout_error", code="timeout")
    return internal_error()
