# SPDX-License-Identifier: Apache-2.0
"""``LLM``: a checkpoint, an engine and a tokenizer behind a few methods."""

import itertools
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wedlm.algorithm.params import Decoding
from wedlm.engine import options
from wedlm.engine.engine import EngineConfig
from wedlm.engine.factory import build_engine
from wedlm.engine.interrupts import interrupts_deferred
from wedlm.engine.outputs import GenerationOutput, StreamPiece
from wedlm.engine.request import Request
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Tokenizer, load_model, load_tokenizer, pack_for_inference
from wedlm.model.lora.peft import adapted_config, apply_adapter

Message = Mapping[str, Any]
Prompt = str | list[int]


class LLM:
    """Generate text from a checkpoint, on any device that torch knows. Methods may be called from several threads.

    model: a Hugging Face directory, a .gguf file, a hub id, or "demo". dtype: a torch dtype's name, or "auto": the
    checkpoint's, but float32 on CPUs without bfloat16 instructions. quantization: the layers' weights in eight bits,
    for GPUs: "int8" (a CPU computes the same, slowly), or "fp8", inputs as well, where the GPU multiplies such numbers;
    text is that of the rounded weights, in every mode. device: "auto"
    takes CUDA where there is one. max_model_len: positions of a sequence; default: the checkpoint's length. decoding:
    mode of requests that name none; default: "auto", AR decoding's text with as many rows a forward as pay at the time.
    kv_cache_bytes: size of the cache; default on CUDA: what gpu_memory_utilization leaves, elsewhere: four full
    sequences, at most a quarter of the memory. adapter: directory of a LoRA in peft's format, merged into the weights
    as they load, or of one that `wedlm train` made for masked rows, which stays beside them; for another adapter make
    another LLM. cuda_graphs: steps on our kernels, as CUDA graphs; default: wherever that works; False: plain torch
    operations. capture_chunks: where steps are CUDA graphs, those with prompt chunks, too. chunk_step_ratio: prompt
    chunks are cut so that a step with some should take at most about so many times what its windows alone take, where
    a stream is among them; inf: no limit; default: 1.8 where such steps are CUDA graphs, elsewhere inf.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        dtype: str = "auto",
        quantization: str | None = None,
        device: str = "auto",
        max_model_len: int | None = None,
        decoding: Decoding | None = None,
        adapter: str | Path | None = None,
        wedlm_window_size: int = 16,
        mask_token_id: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        page_size: int = 16,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        cuda_graphs: bool | None = None,
        capture_chunks: bool = True,
        chunk_step_ratio: float | None = None,
    ) -> None:
        self.device = options.read_device(device)
        options.positive_integers(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            page_size=page_size,
            wedlm_window_size=wedlm_window_size,
            kv_cache_bytes=1 if kv_cache_bytes is None else kv_cache_bytes,
        )
        utilization = options.read_fraction("gpu_memory_utilization", gpu_memory_utilization)
        ratio = None if chunk_step_ratio is None else options.read_ratio("chunk_step_ratio", chunk_step_ratio)
        captures = options.read_flag("capture_chunks", capture_chunks)
        weights_dtype = options.read_dtype(dtype, self.device)
        bits = options.read_quantization(quantization)
        self.tokenizer: Tokenizer = load_tokenizer(model)
        transformer, self.model_config = load_model(model, weights_dtype, self.device)
        if adapter is not None:
            apply_adapter(transformer, adapter)
            self.model_config = adapted_config(self.model_config, adapter)
        self.model = pack_for_inference(transformer, bits)
        length = options.read_length(max_model_len, self.model_config)
        mask_token_id = options.read_mask_token_id(mask_token_id, self.model_config, self.tokenizer)
        config = EngineConfig(
            vocab_size=self.model_config.vocab_size,
            mask_token_id=mask_token_id,
            end_token_ids=self.model_config.eos_token_ids,
            max_model_len=length,
            default_decoding=options.read_decoding(decoding),
            default_window_size=wedlm_window_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunk_step_ratio=ratio,
            capture_chunks=captures,
        )
        self.engine = build_engine(
            self.model,
            config,
            self.tokenizer,
            page_size=page_size,
            kv_cache_bytes=kv_cache_bytes,
            gpu_memory_utilization=utilization,
            cuda_graphs=cuda_graphs,
        )
        # Reentrant, since a stream may be closed by garbage collection in a thread that is inside the engine.
        self._lock = threading.RLock()
        self._busy = False
        self._abandoned: list[Request] = []
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[GenerationOutput]:
        """Complete prompts (strings or lists of token ids); results come in the order of the prompts.

        ``params``: one for all, or one per prompt. A prompt that cannot run comes back with ``error`` set, and a
        warning, while the others run; ValueError if none can. ``progress`` None: a bar on a terminal for 8 or more.
        """
        prompt_list = _prompt_list(prompts)
        param_list = _param_list(params, len(prompt_list))
        outputs: dict[int, GenerationOutput] = {}
        requests: dict[int, Request] = {}
        try:
            for index, (prompt, one) in enumerate(zip(prompt_list, param_list, strict=True)):
                try:
                    requests[index] = self._add(prompt, one, streamed=False)
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

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **template_kwargs: Any,
    ) -> list[GenerationOutput]:
        """Answer one conversation, or several, through the tokenizer's chat template (ValueError if it has none)."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several else [messages]
        prompts = [self.chat_prompt(conversation, **template_kwargs) for conversation in conversations]
        return self.generate(prompts, params, progress=progress)

    def chat_prompt(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """Token ids of a conversation up to where the answer begins."""
        if not messages:
            raise ValueError("messages is empty; expected at least one message")
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **template_kwargs)
        return self._encode(text, add_special_tokens=False)

    def generate_stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[StreamPiece]:
        """Yield text as it becomes final. Closing the iterator aborts the request."""
        request = self._add(prompt, _param_list(params, 1)[0])
        stream = self._stream(request)
        next(stream)  # into its try: closing an iterator that nobody read must abort, too
        return stream

    def abort(self) -> None:
        """End every request; streams give their last piece, with what they have and ``finish_reason`` "abort"."""
        with self._lock:
            self._abort(list(self.engine.requests.values()))

    def _stream(self, request: Request) -> Iterator[StreamPiece]:
        """An empty piece first, then those of the request."""
        assert request.text is not None
        shown = told = 0
        output = None
        try:
            yield StreamPiece("", [], -1, None)
            while output is None:
                with self._engine_alone():  # another thread's step must not change the request while it is read
                    self._step(request)
                    output = None if request.finish_reason is None else GenerationOutput.of(request)
                    end = request.text.stable if output is None else len(request.text.text)
                    piece = StreamPiece(
                        request.text.text[shown:end], request.output_token_ids[told:], request.num_forwards - 1, output
                    )
                shown, told = max(shown, end), told + len(piece.token_ids)
                if piece.token_ids or output is not None:
                    yield piece
        finally:
            self._abort([request])

    def _add(self, prompt: Prompt, params: SamplingParams, streamed: bool = True) -> Request:
        if not isinstance(prompt, str | list):
            raise ValueError(f"the prompt is {prompt!r}; expected a string or a list of token ids")
        warning = self.window_warning(params)
        if warning is not None:
            warnings.warn(warning, stacklevel=3)
        ids = self._encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        with self._engine_alone():
            request = self.engine.add(f"request-{next(self._ids)}", ids, params)
            request.streamed = streamed
            return request

    def window_warning(self, params: SamplingParams) -> str | None:
        """A sentence if these parameters' window meets distances that the checkpoint was not trained for."""
        block = self.model_config.block_size
        window = params.wedlm_window_size or self.engine.config.default_window_size
        decoding = params.decoding or self.engine.config.default_decoding
        if block is None or window <= block or decoding not in ("streaming", "block", "auto_streaming"):
            return None
        return (
            f"the window of {window} is wider than the noise block of {block} that this checkpoint was trained with: "
            "it meets distances it never saw"
        )

    def _encode(self, prompt: str, add_special_tokens: bool) -> list[int]:
        try:
            prompt.encode()  # the tokenizer's own message for a lone surrogate tells nobody anything
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is no Unicode text ({error.reason}); expected valid characters") from error
        return self.tokenizer.encode(prompt, add_special_tokens)

    @contextmanager
    def _engine_alone(self) -> Iterator[None]:
        """No other thread uses the engine meanwhile, and it is in no half-done state before or after."""
        with self._lock:
            self._busy = True
            try:
                yield
            finally:
                while self._abandoned:
                    self.engine.abort(self._abandoned.pop().request_id)
                self._busy = False

    def _step(self, request: Request) -> None:
        """Advance the engine, for everybody, unless another thread has finished the request meanwhile."""
        if request.finish_reason is None:
            with interrupts_deferred():
                self.engine.step()

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


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and all(isinstance(token, int) for token in prompts)):
        return [prompts if isinstance(prompts, str) else list(prompts)]  # type: ignore[arg-type]
    return list(prompts)  # type: ignore[arg-type]


def _param_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
        raise ValueError(f"params is {params!r}; expected SamplingParams or a list of them")
    if len(params) != count:
        raise ValueError(f"params has {len(params)} entries; expected one, or one for each of the {count} prompts")
    return list(params)
