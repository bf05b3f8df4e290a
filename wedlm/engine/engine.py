# SPDX-License-Identifier: Apache-2.0
"""The loop: requests in, one step at a time, finished requests out. Single-threaded; callers serialise access."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from wedlm.algorithm.params import DecodeParams, Decoding
from wedlm.engine.constraints import constraint_of
from wedlm.engine.pages import PagePool
from wedlm.engine.runner import Runner
from wedlm.engine.sampling_params import SamplingParams
from wedlm.engine.scheduler import Scheduler
from wedlm.engine.text import Decoder, TextStream
from wedlm.engine.types import FinishReason, Request, WindowResult, WindowSnapshot


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What all requests share. Lengths in tokens."""

    vocab_size: int
    mask_token_id: int
    end_token_ids: tuple[int, ...]
    max_model_len: int
    default_decoding: Decoding = "verified"
    default_window_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048


class Engine:
    """Admits, runs and finishes requests. The only place that decides that a request is finished."""

    def __init__(self, config: EngineConfig, runner: Runner, pool: PagePool, tokenizer: Decoder | None) -> None:
        self.config, self.runner, self.pool, self.tokenizer = config, runner, pool, tokenizer
        self.scheduler = Scheduler(pool, config.max_num_seqs, config.max_num_batched_tokens, runner.unload)
        self.requests: dict[str, Request] = {}
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def add(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue a request. ValueError, with nothing changed, if it is impossible."""
        if request_id in self.requests:
            raise ValueError(f"request_id is {request_id!r}, which is running; expected a new one")
        prompt = list(prompt_token_ids)
        self._check_prompt(prompt)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop is set but the engine has no tokenizer; expected stop_token_ids instead")
        max_tokens = min(params.max_tokens, self.config.max_model_len - len(prompt))
        decode = self._decode_params(prompt, params)
        config = self.config
        constraint = constraint_of(
            params, decode.end_token_ids, config.mask_token_id, config.vocab_size, self.tokenizer
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=params,
            decode=decode,
            max_tokens=max_tokens,
            window=WindowSnapshot.initial(prompt, decode),
            arrival=self._arrivals,
            tokens=list(prompt),
            text=None if self.tokenizer is None else TextStream(self.tokenizer, params.stop or ()),
            constraint=constraint,
        )
        self.scheduler.add(request)
        self._arrivals += 1
        self.requests[request_id] = request
        return request

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise ValueError("the prompt has 0 tokens; expected at least 1")
        if len(prompt) >= self.config.max_model_len:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; expected at most {self.config.max_model_len - 1} "
                "(max_model_len less one for the answer)"
            )
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.config.vocab_size:
                raise ValueError(f"the prompt contains {token!r}; expected ids from 0 to {self.config.vocab_size - 1}")

    def _decode_params(self, prompt: list[int], params: SamplingParams) -> DecodeParams:
        ends = tuple(params.stop_token_ids or ()) + (() if params.ignore_eos else self.config.end_token_ids)
        if any(token >= self.config.vocab_size for token in ends):
            raise ValueError(f"stop_token_ids is {ends}; expected ids below {self.config.vocab_size}")
        return DecodeParams(
            decoding=params.decoding or self.config.default_decoding,
            window_size=params.wedlm_window_size or self.config.default_window_size,
            entropy_threshold=params.wedlm_entropy_threshold,
            pos_penalty=params.wedlm_pos_penalty_factor,
            draft_entropy=params.wedlm_draft_entropy,
            temperature=params.temperature,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            mask_token_id=self.config.mask_token_id,
            end_token_ids=tuple(dict.fromkeys(ends)),
            first_free_end=len(prompt) + params.min_tokens if params.min_tokens else 0,
            max_positions=self.config.max_model_len,
        )

    def step(self) -> list[Request]:
        """One forward for as many requests as fit; those that got tokens or ended. Empty if there is no work."""
        plan = self.scheduler.schedule()
        if not plan.work:
            assert not self.requests, "requests wait, but nothing can run"
            return []
        results = self.runner.run(plan)
        changed = []
        for work, result in zip(plan.work, results, strict=True):
            request = work.request
            if result is None:
                self.scheduler.cached(request, request.num_cached + work.count)
                continue
            request.num_forwards += 1
            request.num_rows += result.num_rows
            self._deliver(request, result)
            self.scheduler.cached(request, min(result.num_cached, len(request.tokens)))
            if result.tokens:
                changed.append(request)
            if request.finish_reason is not None:
                self._remove(request)
        return changed

    def _deliver(self, request: Request, result: WindowResult) -> None:
        """Append emitted tokens up to the one that ends the request."""
        if result.tokens and request.first_token_time is None:
            request.first_token_time = time.perf_counter()
        for i, token in enumerate(result.tokens):
            if request.constraint is not None and not request.constraint.accept(token):
                request.finish_reason = (
                    "length"  # the grammar met its limits of work: the text is cut, but valid so far
                )
                return
            request.tokens.append(token)
            request.logprobs.append(result.logprobs[i])
            request.token_steps.append(request.num_forwards - 1)
            if result.alternatives:
                request.alternatives.append(result.alternatives[i])
            request.finish_reason = self._finish_reason(request, token)
            if request.finish_reason is not None:
                return

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        text = request.text
        if token in request.decode.end_token_ids:
            if text is not None:
                text.finish()  # the end token is reported as an id; it is no part of the text
            return "stop"
        may_stop = request.num_output_tokens >= request.params.min_tokens
        if text is not None and text.push(token, may_stop):
            return "stop"
        if request.constraint is not None and request.constraint.complete:
            if text is not None:
                text.finish()
            return "stop"
        return "length" if request.num_output_tokens == request.max_tokens else None

    def abort(self, request_id: str) -> Request | None:
        """End a request now; its tokens so far stay with it. None if it is not running (any more)."""
        request = self.requests.get(request_id)
        if request is not None:
            request.finish_reason = "abort"
            self._remove(request)
        return request

    def _remove(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.runner.unload(request)
        if request.text is not None and request.finish_reason != "stop":
            request.text.finish()
        del self.requests[request.request_id]
