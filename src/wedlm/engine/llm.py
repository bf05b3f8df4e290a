# SPDX-License-Identifier: Apache-2.0
"""``LLM``: a checkpoint, an engine and a tokenizer behind a few methods."""

import itertools
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wedlm.engine import resolve_options
from wedlm.engine.factory import plan_engine
from wedlm.engine.load_weights import load_weights
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.original_names import METHODS
from wedlm.engine.outputs import GenerationOutput, StreamPiece
from wedlm.engine.prompt_logprobs import PromptScorer
from wedlm.engine.request import Request
from wedlm.engine.request_stream import EngineFault
from wedlm.engine.sampling_params import GAP, SamplingParams
from wedlm.engine.turns import Turns
from wedlm.model import Tokenizer, load_tokenizer
from wedlm.model.formats.checkpoint import with_end_tokens
from wedlm.model.lora.peft import read_row_factors
from wedlm.model.lora.row_factors import RowFactors

Message = Mapping[str, Any]
Prompt = str | list[int]
_SCORED_SUFFIX = 32  # tokens: later ones hardly depend on what fills the gap
Adapter = str | Sequence[str | None] | None  # names: one for all prompts, or one each


class LLM:
    """Generates text from a checkpoint, on any device that torch knows. Several threads may call its methods.

    * ``model``: a Hugging Face directory, a .gguf file, a hub id, or "demo".
    * ``adapters``: directories of adapters by the names that requests choose (``load_adapter``). The option ``adapter``
      is one for all requests.
    * ``options``: the fields of ``EngineOptions``, which explains each of them. An unknown option raises TypeError, a
      bad value ValueError.
    """

    def __init__(
        self, model: str | Path = "demo", *, adapters: Mapping[str, str | Path] | None = None, **options: Any
    ) -> None:
        self._load(model, EngineOptions.of(options))
        self._plan()
        self._build()
        for name, directory in (adapters or {}).items():
            self.load_adapter(name, directory)

    @classmethod
    def together(cls, models: Mapping[str, str | Path], **options: Any) -> "dict[str, LLM]":
        """Load several models, by name, each as ``LLM(model, **options)``, into the memory that one would use.

        All weights are loaded first. Then the caches get equal parts of ``kv_cache_bytes``, or of what is left by
        default. If their engines run in threads, they take turns, one step each.
        """
        chosen, turns = EngineOptions.of(options), Turns()
        llms = {name: cls.__new__(cls) for name in models}
        for name, llm in llms.items():
            llm._load(models[name], chosen)
        for llm in llms.values():
            llm._plan(len(llms))
        for llm in llms.values():
            llm._build()
            llm.turns = turns
        return llms

    def _load(self, model: str | Path, chosen: EngineOptions) -> None:
        """Load the tokenizer and the weights."""
        self.device = resolve_options.read_device(chosen.device)
        resolve_options.make_current(self.device)  # for what this thread runs beside steps
        self.allow_control_tokens = chosen.allow_control_tokens
        self.tokenizer: Tokenizer = load_tokenizer(model)
        if chosen.tensor_parallel_size > 1:
            from wedlm.engine.ranks.start import load_over_ranks  # which a single rank does not need

            loaded = load_over_ranks(model, chosen, self.device)
        else:
            loaded = load_weights(model, chosen, self.device)
        self.model, self.model_config, chosen = loaded.model, loaded.config, loaded.options
        self.model_config = with_end_tokens(self.model_config, self.tokenizer.end_token_ids())
        self._note, self._ranks = loaded.note, loaded.ranks
        self._engine_config = EngineConfig(
            vocab_size=self.model_config.vocab_size,
            mask_token_id=resolve_options.read_mask_token_id(chosen.mask_token_id, self.model_config, self.tokenizer),
            eos_token_ids=self.model_config.eos_token_ids,
            max_model_len=resolve_options.read_length(chosen.max_model_len, self.model_config),
            options=chosen,
            has_masked_rows=chosen.mask_token_id is not None or self.model_config.mask_token_id is not None,
            model_decoding=self.model_config.default_decoding,
            next_token=self.model_config.default_next_token,
            entropy_threshold=self.model_config.default_entropy_threshold,
            block_length=resolve_options.read_block_length(chosen.block_length, self.model_config),
        )

    def _plan(self, num_sharing: int = 1) -> None:
        """Plan the engine; its cache is one of ``num_sharing`` in the available memory."""
        self.blueprint = plan_engine(
            self.model, self._engine_config, self.tokenizer, self._note, num_sharing, self._ranks
        )

    def _build(self) -> None:
        self.engine = self.blueprint.build()
        self.turns = Turns()  # held by who runs the engine in a thread
        # Reentrant, since a stream may be closed by garbage collection in a thread that is inside the engine.
        self._lock = threading.RLock()
        self._busy = False
        self._abandoned: list[Request] = []
        self._ids = itertools.count()
        self._warned_unadapted = False
        self._fault: EngineFault | None = None  # what ended the requests of an engine that was replaced

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that requests may choose, in the order in which they were loaded."""
        return self.engine.adapters.names

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Load the adapter in ``directory`` under a name that requests may choose: a LoRA in peft's format, an adapter
        of masked rows, or both (docs/server.md). Requests with different adapters share steps, and nothing is merged.

        Raises ValueError, with nothing changed, if the adapter cannot be read, does not fit, or is one too many.
        """
        with self._engine_alone():
            self.engine.adapters.check(name)
        factors = self.read_adapter(name, directory)
        with self._engine_alone():
            self.engine.load_adapter(name, factors)

    def read_adapter(self, name: str, directory: str | Path) -> RowFactors:
        """Read an adapter for ``Engine.load_adapter``, without touching the engine. Raises ValueError."""
        if self._ranks is not None:
            raise ValueError(
                f"adapter {name!r} was asked for by name and tensor_parallel_size is {self._ranks.size}; expected 1, "
                "or an adapter for all requests"
            )
        options, config = self._engine_config.options, self._engine_config
        factors = read_row_factors(directory, self.model_config, options.max_adapter_rank)
        mask = factors.mask_token_id
        if factors.has_masked_rows and factors.mask_embedding is None and mask not in (None, config.mask_token_id):
            raise ValueError(
                f"the adapter {name!r} was trained with mask token {mask}; expected {config.mask_token_id}, the "
                "engine's (mask_token_id)"
            )
        return self.engine.adapters.prepare(factors)

    def unload_adapter(self, name: str) -> None:
        """Remove an adapter's name. Requests that use it finish with it, and its memory is free after the last one.
        Raises ValueError if there is no adapter of that name."""
        with self._engine_alone():
            self.engine.unload_adapter(name)

    def describe(self) -> str:
        """One line: the device, how steps run and why, and the cache's size."""
        return self.blueprint.describe()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
        adapter: Adapter = None,
    ) -> list[GenerationOutput]:
        """Complete prompts (strings or lists of token ids); results come in the order of the prompts.

        * ``params``: one for all prompts, or one per prompt.
        * ``adapter``: the name of a loaded adapter, or None for the model without one; for all prompts, or one per
          prompt (vLLM's ``lora_request``).
        * ``progress``: whether to show a progress bar. None shows one on a terminal for 8 or more prompts.
        * ``sampling_params`` and ``use_tqdm`` are what the original implementation and vLLM call ``params`` and
          ``progress``.

        If a prompt cannot run, its result has ``error`` set and a warning is given, while the others run. Raises
        ValueError if no prompt can run.
        """
        params = _one_of("params", params, "sampling_params", sampling_params)
        progress = _one_of("progress", progress, "use_tqdm", use_tqdm)
        prompt_list = _prompt_list(prompts)
        param_list = _param_list(params, len(prompt_list))
        adapter_list = _adapter_list(adapter, len(prompt_list))
        outputs: dict[int, GenerationOutput] = {}
        requests: dict[int, Request] = {}
        try:
            for index, (prompt, one, name) in enumerate(zip(prompt_list, param_list, adapter_list, strict=True)):
                try:
                    requests[index] = self._add(prompt, one, name, streamed=False)
                except ValueError as error:
                    outputs[index] = GenerationOutput("", [], None, "error", error=str(error))
            if outputs and not requests:
                raise ValueError(outputs[0].error)
            for index, output in outputs.items():
                warnings.warn(f"prompt {index} was refused: {output.error}", stacklevel=2)
            self._run(list(requests.values()), progress)
        finally:
            self._abort(list(requests.values()))
        outputs |= {index: GenerationOutput.of(request) for index, request in requests.items()}
        return [outputs[index] for index in range(len(prompt_list))]

    def generate_each(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[tuple[int, GenerationOutput]]:
        """Complete many prompts together, and yield the place and the output of each as soon as it ends.

        The engine has at most twice as many of them at a time as run in a step. ``params``: one for all prompts, or one
        per prompt. Closing the iterator aborts what has not ended. Raises ValueError at the first prompt that cannot
        run.
        """
        param_list = _param_list(params, len(prompts))
        most, following = 2 * self.engine.config.options.max_num_seqs, 0
        running: dict[int, Request] = {}
        try:
            while running or following < len(prompts):
                while following < len(prompts) and len(running) < most:
                    running[following] = self._add(prompts[following], param_list[following], None, streamed=False)
                    following += 1
                with self._engine_alone():
                    self._step(next(iter(running.values())))
                for place in [place for place, request in running.items() if request.finish_reason is not None]:
                    yield place, GenerationOutput.of(running.pop(place))
        finally:
            self._abort(list(running.values()))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        allow_control_tokens: bool | None = None,
        adapter: Adapter = None,
        **template_kwargs: Any,
    ) -> list[GenerationOutput]:
        """Answer one conversation, or several, through the tokenizer's chat template (ValueError if it has none).

        If a message spells out a control token, such as <|im_end|>, it is encoded as ordinary text. With
        ``allow_control_tokens`` it becomes the token, and whoever writes a message can end its turn and speak as the
        system (docs/security.md). None takes what the constructor was given.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several else [messages]
        chosen: Any = {**template_kwargs, "allow_control_tokens": allow_control_tokens}
        prompts = [self.chat_prompt(conversation, **chosen) for conversation in conversations]
        return self.generate(prompts, params, sampling_params=sampling_params, progress=progress, adapter=adapter)

    def chat_prompt(
        self, messages: Sequence[Message], *, allow_control_tokens: bool | None = None, **template_kwargs: Any
    ) -> list[int]:
        """The token ids of a conversation up to where the answer begins, encoded as by ``chat``."""
        if not messages:
            raise ValueError("messages is empty; expected at least one message")
        allowed = self.allow_control_tokens if allow_control_tokens is None else allow_control_tokens
        return self.tokenizer.encode_chat(messages, allow_control_tokens=allowed, **template_kwargs)

    def generate_stream(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: str | None = None,
    ) -> Iterator[StreamPiece]:
        """Yield the text of one prompt, or of a list with one prompt, as it becomes final. Close the iterator to abort
        the request."""
        params = _one_of("params", params, "sampling_params", sampling_params)
        several = isinstance(prompt, list) and bool(prompt) and all(isinstance(one, str | list) for one in prompt)
        prompts: Any = prompt if several else [prompt]
        if len(prompts) > 1:
            raise ValueError(
                f"generate_stream got {len(prompts)} prompts; expected one: generate takes many, and AsyncEngine "
                "streams many"
            )
        request = self._add(prompts[0], _param_list(params, 1)[0], adapter)
        stream = self._stream(request)
        next(stream)  # into its try: closing an iterator that was never read must abort, too
        return stream

    def infill(
        self,
        prefix: Prompt | Sequence[Prompt],
        suffix: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> list[GenerationOutput]:
        """Fill the gap between a prefix and a suffix, or between several of each, in their order (docs/infilling.md).

        The gap has ``max_tokens`` of ``params`` positions, or 16 without ``params``. With ``lengths`` each of these
        lengths is tried, and the result is the filling that the AR head finds likeliest, as a mean over its tokens and
        the suffix's first 32 tokens. Raises ValueError for lengths below 1, or if there are not as many suffixes as
        prefixes; otherwise like ``generate``.
        """
        prefixes, suffixes = _prompt_list(prefix), _prompt_list(suffix)
        if len(prefixes) != len(suffixes):
            raise ValueError(f"there are {len(suffixes)} suffixes; expected one for each of {len(prefixes)} prefixes")
        gaps = _param_list(SamplingParams(max_tokens=GAP) if params is None else params, len(prefixes))
        gaps = [self.before(one, gap) for one, gap in zip(suffixes, gaps, strict=True)]
        if lengths is None:
            return self.generate(prefixes, gaps, progress=progress)
        tried = [int(length) for length in lengths]
        if not tried or min(tried) < 1:
            raise ValueError(f"lengths are {list(lengths)}; expected at least one, each of at least 1 token")
        asked = [(one, replace(gap, max_tokens=n)) for one, gap in zip(prefixes, gaps, strict=True) for n in tried]
        outputs = self.generate([one for one, _ in asked], [gap for _, gap in asked], progress=progress)
        scores = [self._likelihood(*one, output) for one, output in zip(asked, outputs, strict=True)]
        best = []
        for start in range(0, len(outputs), len(tried)):
            among = range(start, start + len(tried))
            best.append(outputs[max(among, key=scores.__getitem__)])
        return best

    def before(self, suffix: Prompt, params: SamplingParams) -> SamplingParams:
        """The ``params`` for a request that fills the gap between its prompt and ``suffix``."""
        ids = self.tokenizer.encode(suffix, add_special_tokens=False) if isinstance(suffix, str) else suffix
        if not ids:
            raise ValueError(f"the suffix is {suffix!r}; expected some text, since generate continues without one")
        return replace(params, suffix_token_ids=tuple(ids))

    def _likelihood(self, prefix: Prompt, params: SamplingParams, output: GenerationOutput) -> float:
        """The AR head's mean log-probability of a filling's tokens and the suffix's first ones after the prefix."""
        if output.finish_reason == "error":
            return -math.inf
        known = self.tokenizer.encode(prefix) if isinstance(prefix, str) else prefix
        filling = output.token_ids
        if output.finish_reason == "stop":  # the text is what stands before an end token or a stop string
            filling = self.tokenizer.encode(output.text, add_special_tokens=False)
        text = [*known, *filling, *(params.suffix_token_ids or ())[:_SCORED_SUFFIX]]
        with self._engine_alone():
            scorer = PromptScorer(self.engine, text, 0, params.cache_salt, context=max(1, len(known)))
        while not scorer.done:
            with self._engine_alone():
                if not scorer.advance(self.engine):  # for want of pages, which other threads' requests hold
                    self.engine.step()
        logprobs = scorer.result.logprobs
        return math.fsum(logprobs) / max(1, len(logprobs))

    def exit(self) -> None:
        """Abort requests and end the processes of other ranks. Memory is free once nothing refers to this object. The
        name is the original implementation's."""
        self.abort()
        if self._ranks is not None:
            self._ranks.close()

    if not TYPE_CHECKING:  # which would take any attribute for one that is there

        def __getattr__(self, name: str) -> Any:
            """Explain attributes that the original implementation has and this class does not."""
            hint = f": {METHODS[name]}" if name in METHODS else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)

    def abort(self) -> None:
        """End every request. Streams give a last piece, with what they have and ``finish_reason`` "abort"."""
        with self._lock:
            self._abort(list(self.engine.requests.values()))

    def _stream(self, request: Request) -> Iterator[StreamPiece]:
        """Yield an empty piece first, then those of the request."""
        text = request.output.text
        assert text is not None
        shown = sent = 0
        output = None
        try:
            yield StreamPiece("", [], -1, None)
            while output is None:
                with self._engine_alone():  # another thread's step must not change the request while it is read
                    self._step(request)
                    output = None if request.finish_reason is None else GenerationOutput.of(request)
                    end = text.stable if output is None else len(text.text)
                    step = request.counters.num_forwards - 1
                    piece = StreamPiece(text.text[shown:end], request.output_token_ids[sent:], step, output)
                shown, sent = max(shown, end), sent + len(piece.token_ids)
                if piece.token_ids or output is not None:
                    yield piece
        finally:
            self._abort([request])

    def _add(self, prompt: Prompt, params: SamplingParams, adapter: str | None, streamed: bool = True) -> Request:
        if not isinstance(prompt, str | list):
            raise ValueError(f"the prompt is {prompt!r}; expected a string or a list of token ids")
        warning = self.window_warning(params, adapter)
        if warning is not None:
            warnings.warn(warning, stacklevel=3)
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        with self._engine_alone():
            self._renew()
            return self.engine.add(f"request-{next(self._ids)}", ids, params, streamed=streamed, adapter=adapter)

    def window_warning(self, params: SamplingParams, adapter: str | None = None) -> str | None:
        """A sentence if the window of these parameters asks for what the checkpoint was not trained for: masked rows at
        all, which is said once, or masked rows at such distances."""
        block, adapted = self.model_config.block_size, False
        if adapter is not None and adapter in self.engine.adapters.names:
            own = self.engine.adapters.get(adapter)
            adapted, block = own.has_masked_rows, own.block_size if own.has_masked_rows else block
        decoding = params.decoding_of(self.engine.config.decoding)
        window = params.wedlm_window_size or self.engine.config.window_size(decoding)
        if decoding not in ("streaming", "block") or self.engine.config.block_length is not None:
            return None
        unadapted = not (self.engine.config.has_masked_rows or adapted)
        if unadapted and not self._warned_unadapted and not params.suffix_token_ids:
            self._warned_unadapted = True
            return (
                f"this checkpoint was never adapted to predict masked positions, so {decoding} decoding "
                "gives meaningless text; auto gives the model's own text"
            )
        if block is None or window <= block:
            return None
        return (
            f"the window of {window} is wider than the noise block of {block} that this checkpoint was trained with: "
            "it meets distances that it never saw"
        )

    @contextmanager
    def _engine_alone(self) -> Iterator[None]:
        """Hold the engine exclusively; it is never half-done before or after."""
        with self._lock:
            self._busy = True
            try:
                yield
            finally:
                while self._abandoned:
                    self.engine.abort(self._abandoned.pop().request_id)
                self._busy = False

    def _step(self, request: Request) -> None:
        """Advance the engine, for all requests, unless another thread has finished the request in the meantime. Raises
        EngineFault if the engine that had the request failed, in whichever thread."""
        if request.finish_reason is not None:
            return
        if self._fault is not None and request.request_id not in self.engine.requests:
            raise self._fault
        with _interrupts_deferred():
            try:
                self.engine.step()
            except EngineFault as fault:
                self._fault = fault
                raise

    def _renew(self) -> None:
        """Build a new engine if ranks of the old one have ended; its requests end with the old one's error."""
        if self._ranks is not None and self._ranks.broken:
            self.engine = self.blueprint.rebuild(self.engine)

    def _abort(self, requests: Sequence[Request]) -> None:
        with self._lock:
            if self._busy:  # this very thread is inside the engine: it aborts them before it leaves
                self._abandoned += requests
                return
            for request in requests:
                self.engine.abort(request.request_id)

    def _run(self, requests: list[Request], progress: bool | None) -> None:
        show = len(requests) >= 8 and sys.stderr.isatty() if progress is None else progress
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*columns, TextColumn("{task.fields[speed]}"), transient=True, disable=not show)
        start = time.perf_counter()
        with bar:
            task = bar.add_task("Generating", total=len(requests), speed="")
            pending = requests
            while pending:
                with self._engine_alone():
                    self._step(pending[0])
                pending = [request for request in pending if request.finish_reason is None]
                tokens = sum(request.num_output_tokens for request in requests) if show else 0
                speed = f"{tokens / (time.perf_counter() - start):,.0f} tok/s"
                bar.update(task, completed=len(requests) - len(pending), speed=speed)


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C take effect after the step, because half a step would lose tokens of all requests in it.

    This only applies while Python's own handler is in force; an application with another handler decides for itself.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if caught:
        raise KeyboardInterrupt


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and all(isinstance(token, int) for token in prompts)):
        return [prompts if isinstance(prompts, str) else list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]


def _one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The value given under either name."""
    if value is not None and other is not None:
        raise ValueError(f"{name} and {other_name} are both given; expected one of them")
    return other if value is None else value


def _adapter_list(adapter: Adapter, count: int) -> list[str | None]:
    if adapter is None or isinstance(adapter, str):
        return [adapter] * count
    if not isinstance(adapter, list | tuple) or not all(one is None or isinstance(one, str) for one in adapter):
        raise ValueError(f"adapter is {adapter!r}; expected a name, None, or a list of these")
    if len(adapter) != count:
        raise ValueError(f"adapter has {len(adapter)} entries; expected one, or one for each of the {count} prompts")
    return list(adapter)


def _param_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
        raise ValueError(f"params is {params!r}; expected SamplingParams or a list of them")
    if len(params) != count:
        raise ValueError(f"params has {len(params)} entries; expected one, or one for each of the {count} prompts")
    return list(params)
