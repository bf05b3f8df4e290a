# SPDX-License-Identifier: Apache-2.0
"""One model of the server: its engine, and the way from a checked body to the engine's requests."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TypeVar

from wedlm.engine.async_llm import AsyncEngine
from wedlm.engine.constraints.grammar import Compiled, Grammars, GrammarsBusy, grammars_of
from wedlm.engine.engine import Engine
from wedlm.engine.llm import LLM
from wedlm.engine.sampling_params import SamplingParams
from wedlm.server.answers import Job, PromptEcho
from wedlm.server.config import ServerConfig
from wedlm.server.errors import ApiError, queue_full, refused, unavailable
from wedlm.server.metrics import Metrics
from wedlm.server.prompts import Prompt, Prompts
from wedlm.server.protocol import MAX_LOGPROB_ENTRIES, ChatRequest, CompletionRequest
from wedlm.server.readers import CallReader, ForcedReader, PlainReader, Reader, ThinkReader
from wedlm.server.workers import Workers

_COMPLETION_TOKENS = 16  # OpenAI's default there
_LARGEST_SEED = 2**63 - 1
T = TypeVar("T")


class ServedModel:
    """``engine`` exists from ``start`` on. ``draining``: whether the server refuses everything new. ``adapter`` None is
    the model without one."""

    engine: AsyncEngine
    adapter: str | None = None

    def __init__(
        self, name: str, llm: LLM, config: ServerConfig, metrics: Metrics, draining: Callable[[], bool]
    ) -> None:
        self.name, self.llm, self.config, self.metrics = name, llm, config, metrics.of(name)
        self._draining, self._metrics_of = draining, metrics.of
        self._adapted: dict[str, ServedModel] = {}
        self.prompts = Prompts(llm, config)
        self._grammars = self._load_grammars()  # now, because it holds up every thread for a fraction of a second

    def _load_grammars(self) -> Grammars | str:
        """Load the grammars, or note why there are none."""
        try:
            return grammars_of(self.llm.tokenizer, self.llm.engine.config.vocab_size)
        except ValueError as error:
            return str(error)

    def start(self) -> None:
        """Give the LLM's engine to a thread. Call it in the loop."""
        self.engine = AsyncEngine(self.llm.engine, self._renew, turns=self.llm.turns)
        self.metrics.watch(self.engine)

    def adapted(self, adapter: str) -> "ServedModel | None":
        """The model with this adapter, under its name; None if it is not loaded."""
        if adapter not in self.llm.adapters:
            return None
        if adapter not in self._adapted:
            one = copy(self)
            one.name = one.adapter = adapter
            one.metrics = self._metrics_of(adapter)
            self._adapted[adapter] = one
        return self._adapted[adapter]

    def _renew(self, broken: Engine) -> Engine:
        self.llm.engine = self.llm.blueprint.rebuild(broken)
        return self.llm.engine

    @property
    def status(self) -> str:
        """ "ok", or why requests are refused."""
        if self._draining():
            return "draining"
        return "ok" if self.engine.state == "running" else self.engine.state

    def admit(self, count: int, several: str = "n") -> None:
        """Raises ApiError unless the engine runs and has room for ``count`` more sequences."""
        room = self.llm.engine.config.options.max_num_seqs + self.config.max_queue
        most = min(self.config.max_choices, room)
        if count > most:
            message = f"{several} times the number of prompts is {count}; expected at most {most}"
            raise ApiError(400, message, param=several, code="invalid_value")
        if self.status != "ok":
            raise unavailable(f"the server is {self.status} and takes no requests", self.status)
        if self.engine.num_open + count > room:
            raise queue_full(f"{self.engine.num_open} of {room} places are taken; expected {count} free ones")

    async def chat_job(self, body: ChatRequest, workers: Workers) -> Job:
        """The job of a chat. Raises ApiError 400 if the conversation gives no prompt, or an option is refused."""
        self.admit(body.n or 1)
        try:
            tools = body.offered_tools
        except ValueError as error:
            raise refused(error, "chat") from error
        prompt = await self._tokens(workers, partial(self.prompts.of, body, tools), "messages")
        job = await workers.run(partial(self._job, "chat", body, [prompt.token_ids], self._room(prompt.token_ids)))
        return replace(await self._with_grammar(job, body), new_reader=self._reader(body, prompt))

    def _reader(self, body: ChatRequest, prompt: Prompt) -> Callable[[], Reader]:
        """The reader that turns the text into a message."""
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
        """Compile the grammar, if there is one, and hold it, so that the engine's thread finds it done."""
        params = job.sequences[0][1]
        if params.json_schema is None and params.grammar is None:
            return job
        return replace(job, grammar=await self._compile(params, body.form_of_answer(self.prompts.tool_form)[0]))

    async def _compile(self, params: SamplingParams, field: str) -> Compiled:
        """Compile in a separate process, which ends when the caller is cancelled."""
        try:
            if isinstance(self._grammars, str):
                raise ValueError(self._grammars)
            return await self._grammars.compile_ahead(params)
        except GrammarsBusy as error:
            raise queue_full(str(error).removesuffix(", try again later")) from error
        except ValueError as error:
            message = _naming(field, str(error))
            raise ApiError(400, message, param=field, code="invalid_value") from error

    async def completion_job(self, body: CompletionRequest, workers: Workers) -> Job:
        """Like ``chat_job``."""
        prompts = body.prompts
        several = "n" if (body.best_of or 1) <= (body.n or 1) else "best_of"
        self.admit((getattr(body, several) or 1) * len(prompts), several)
        encoded = [
            await self._tokens(workers, partial(self.llm.tokenizer.encode, one), "prompt")
            if isinstance(one, str)
            else one
            for one in prompts
        ]
        job = await workers.run(partial(self._job, "text", body, encoded, _COMPLETION_TOKENS))
        job = await self._with_suffix(job, body, workers)
        return replace(await self._with_grammar(job, body), echoes=await self._echoes(body, encoded))

    async def _with_suffix(self, job: Job, body: CompletionRequest, workers: Workers) -> Job:
        """The parameters with the text after the answers, if there is one."""
        if not body.suffix:
            return job
        if body.echo or body.num_prompt_logprobs is not None:
            shown = "echo" if body.echo else "prompt_logprobs"
            message = f"{shown} is set with suffix; expected one of them"
            raise ApiError(400, message, param=shown, code="invalid_value")
        encode = partial(self.llm.tokenizer.encode, body.suffix, add_special_tokens=False)
        suffix = await self._tokens(workers, encode, "suffix")
        try:
            sequences = [(ids, replace(params, suffix_token_ids=suffix)) for ids, params in job.sequences]
        except ValueError as error:
            raise refused(error, "text") from error
        return replace(job, sequences=sequences, warning=self.llm.window_warning(sequences[0][1]))

    async def _echoes(self, body: CompletionRequest, encoded: list[list[int]]) -> list[PromptEcho]:
        """What the answer says about the prompts; empty if nothing."""
        count = body.num_prompt_logprobs
        if not body.echo and count is None:
            return []
        if body.streams and (count is not None or body.only_prompt):
            message = "the prompt alone, or log-probabilities of it, are requested with stream; expected no stream"
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
                    scores = await self.engine.score_prompt(ids, count, body.cache_salt or "", self.adapter)
                except ValueError as error:
                    raise refused(error, "text") from error
            echoes.append(PromptEcho(ids, text, scores, shown, body.prompt_logprobs))
        return echoes

    async def _tokens(self, workers: Workers, encode: "partial[T]", param: str) -> T:
        """Encode in another thread, because a long prompt must not hold up everybody's streams."""
        try:
            return await workers.run(encode)
        except ValueError as error:
            named = str(error).partition(" ")[0]
            param = named if named in ChatRequest.model_fields else param
            raise ApiError(400, str(error), param=param, code="invalid_value") from error

    def _room(self, prompt: Sequence[int]) -> int:
        """The tokens that the model and the cache have left for an answer to ``prompt``; at least 1."""
        config, pool = self.llm.engine.config, self.llm.engine.pool
        slots = pool.num_pages * pool.page_size - config.most_window_rows
        return max(1, min(config.max_model_len, slots) - len(prompt))

    def _job(self, kind: str, body: ChatRequest | CompletionRequest, prompts: list[list[int]], room: int) -> Job:
        if body.stream_options is not None and not body.streams:
            shown = body.stream_options.model_dump_json(exclude_unset=True)
            message = f"stream_options is {shown}; expected stream to be true with it"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        if body.wedlm_trace and not body.streams:
            message = "wedlm_trace is true; expected stream to be true with it"
            raise ApiError(400, message, param="wedlm_trace", code="invalid_value")
        if not prompts:
            raise ApiError(400, "prompt is []; expected at least one prompt", param="prompt", code="invalid_value")
        try:
            params = body.sampling_params(room, self.prompts.tool_form)
        except ValueError as error:
            raise refused(ValueError(_naming(_form_field(body, self.prompts), str(error))), kind) from error
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
            model=self.name,
            sequences=[(prompt, replace(params, seed=seed)) for prompt in prompts for seed in seeds],
            num_choices=count,
            num_kept=kept,
            shows_logprobs=shows_logprobs,
            only_prompt=only_prompt,
            streams=body.streams,
            wants_usage=body.wants_usage,
            counts_always=body.counts_always,
            watches=bool(body.wedlm_trace),
            warning=self.llm.window_warning(params, self.adapter),
        )


def _form_field(body: ChatRequest | CompletionRequest, prompts: Prompts) -> str:
    try:
        return body.form_of_answer(prompts.tool_form)[0]
    except ValueError:
        return "response_format"


def _naming(field: str, message: str) -> str:
    """Give an engine's error about the form of the answer the name of the field that asked for it."""
    for name in ("json_schema", "grammar"):
        if message.startswith(name):
            return field + message.removeprefix(name)
    return message


def _best_of(body: CompletionRequest, kept: int) -> int:
    """How many choices to make for those that are kept. Raises ApiError."""
    assert body.best_of is not None
    if body.best_of < kept:
        message = f"best_of is {body.best_of}; expected at least n, {kept}"
        raise ApiError(400, message, param="best_of", code="invalid_value")
    if body.streams and body.best_of > kept:
        message = f"best_of is {body.best_of} with stream; expected n, {kept}, or no stream"
        raise ApiError(400, message, param="best_of", code="invalid_value")
    return body.best_of
