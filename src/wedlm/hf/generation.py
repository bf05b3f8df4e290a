# SPDX-License-Identifier: Apache-2.0
"""``generate`` of a model in transformers runs this package's engine over the model's own weights."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from wedlm.engine.factory import PAGE_SIZE, Blueprint
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import SamplingParams
from wedlm.hf.arguments import Arguments
from wedlm.hf.attend import real_rows
from wedlm.model.config import read_token_ids

_MAX_NUM_SEQS = 64


class HfModel(Protocol):
    """What ``generate`` needs of a model in transformers (``modeling.WeDLMForCausalLM``)."""

    config: Any
    generation_config: Any
    model: Any
    training: bool
    rows: Any

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...


def generate(
    self: HfModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generation_config: Any = None,
    stopping_criteria: Sequence[Any] | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    **options: Any,
) -> Tensor:
    """Continue ``input_ids`` [N, R] by up to ``max_new_tokens`` tokens: [N · num_return_sequences, R + most new],
    padded on the right.

    The text equals ``LLM``'s for the same weights and options. The options are the fields of ``Arguments``:
    transformers' names and the names of ``SamplingParams``; they may also come in a ``generation_config``.
    ``temperature`` None means 0, or 1 with ``do_sample``. ``max_length`` counts the R rows. ``stop_strings`` needs
    ``tokenizer``.

    Prompts of different lengths are padded on either side, with ``attention_mask`` 0 there; new tokens come after all
    of it. ``stopping_criteria`` are called as transformers calls them, with prompts and new tokens [N, R + 1], then
    [N, R + 2] and so on, and None for scores; tokens that a forward made beyond an end are dropped. ``streamer`` gets
    the prompt [1, R], then each token [1], and needs a single sequence. End tokens default to those of the model's
    generation config and its config, padding to the config's or the first end token, and the mask token to the
    config's. Nothing else in the model's own ``generation_config.json`` is used. Raises ValueError, also for options of
    transformers that would change the tokens or the form of the answer and are not supported.
    """
    arguments = Arguments.of(generation_config, options)
    prompts, several = _prompts(input_ids, attention_mask), arguments.num_return_sequences
    params = arguments.sampling_params(input_ids.shape[1])
    prompts = [prompt for prompt in prompts for _ in range(several)]
    config = self.config.model_config()
    ends = _end_token_ids(self, arguments.eos_token_id)
    pads = (arguments.pad_token_id, self.config.pad_token_id, *ends)
    pad, ids = next((one for one in pads if one is not None), 0), input_ids.repeat_interleave(several, dim=0)
    watch = _Watch(ids, pad, arguments.criteria(stopping_criteria, tokenizer), streamer)
    mask = config.mask_token_id if arguments.mask_token_id is None else arguments.mask_token_id
    if mask is None:
        raise ValueError("the config has no mask_token_id; expected mask_token_id=..., an id that text never needs")
    engine_config = EngineConfig(
        vocab_size=config.vocab_size,
        mask_token_id=mask,
        eos_token_ids=ends,
        max_model_len=config.max_length,
        options=EngineOptions(
            decoding=arguments.decoding,
            wedlm_window_size=arguments.wedlm_window_size,
            max_num_seqs=min(len(prompts), _MAX_NUM_SEQS),
        ),
        model_decoding=config.default_decoding,
        next_token=config.default_next_token,
        entropy_threshold=config.default_entropy_threshold,
    )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    found = _decode(self, engine_config, prompts, params, several, watch)
    if streamer is not None:
        streamer.end()
    longest = max(map(len, found))
    rows = [tokens + [pad] * (longest - len(tokens)) for tokens in found]
    return torch.cat((ids, torch.tensor(rows, dtype=ids.dtype, device=ids.device)), dim=1)


class _Watch:
    """Shows the sequences to streamers, and to criteria that may end some of them. All are shown at each length, as in
    transformers' own ``generate``. ``ids`` [N, R] are the prompts."""

    def __init__(self, ids: Tensor, pad: int, criteria: Sequence[Any], streamer: Any) -> None:
        if streamer is not None and len(ids) > 1:
            raise ValueError(f"streamer is given with {len(ids)} sequences; expected one sequence")
        for name in ("put", "end"):
            if streamer is not None and not callable(getattr(streamer, name, None)):
                raise ValueError(f"streamer is {streamer!r}; expected an object with put and end")
        self._ids, self._pad, self._criteria, self._streamer = ids, pad, criteria, streamer
        self._seen = 0

    def ended(self, found: list[list[int]], running: Collection[int]) -> set[int]:
        """Look at the new part of ``found``, the new tokens of each sequence, of which those ``running`` get more.
        Remove what lies after the ends that the criteria set, and return the sequences that have one."""
        if not self._criteria and self._streamer is None:
            return set()
        length = min((len(found[index]) for index in running), default=max(map(len, found)))
        ended: set[int] = set()
        for count in range(self._seen + 1, length + 1):
            column = [tokens[count - 1] if count <= len(tokens) else self._pad for tokens in found]
            new = torch.tensor(column, dtype=self._ids.dtype, device=self._ids.device)
            self._ids = torch.cat((self._ids, new[:, None]), dim=1)
            if self._streamer is not None:
                self._streamer.put(new.cpu())
            for one in self._criteria:
                done = torch.as_tensor(one(self._ids, None)).expand(len(found))
                ended.update(index for index, is_done in enumerate(done.tolist()) if is_done)
            for index in ended:
                del found[index][count:]
            if len(ended) == len(found):
                break
        self._seen = length
        return ended


def _decode(
    model: HfModel,
    engine_config: EngineConfig,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    several: int,
    watch: _Watch,
) -> list[list[int]]:
    """The new tokens of each prompt, from an engine whose cache holds all of them to their ends."""
    config, embedding = model.config.model_config(), model.model.embed_tokens.weight
    window = engine_config.most_window_rows
    lengths = [min(len(prompt) + params.max_tokens + window, config.max_length) for prompt in prompts]
    page_size = engine_config.options.page_size or PAGE_SIZE
    blueprint = Blueprint(
        model=model.rows,
        packed=None,
        shape=config,
        dtype=embedding.dtype,
        device=embedding.device,
        config=engine_config,
        num_pages=sum(-(-length // page_size) for length in lengths),
        page_size=page_size,
        tokenizer=None,
    )
    engine = blueprint.build()
    found: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, _of_choice(params, index % several))
    training = model.training
    model.eval()
    try:
        while engine.has_work:
            for request in engine.step():
                index = int(request.request_id)
                found[index] = request.output_token_ids
                if request.finish_reason is not None:
                    running.discard(index)
            for index in watch.ended(found, running):
                engine.abort(str(index))
                running.discard(index)
    finally:
        model.train(training)
    return found


def _of_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Give each further answer to a prompt a seed of its own; the first keeps the given one."""
    return params if params.seed is None or not choice else replace(params, seed=params.seed + choice)


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    real = real_rows(input_ids, attention_mask)
    if real is None:
        return input_ids.tolist()
    if bool(((real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0] > 1).any()):
        raise ValueError("attention_mask has padding between tokens; expected it on the left or on the right")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)]


def _end_token_ids(model: HfModel, given: int | list[int] | None) -> tuple[int, ...]:
    recorded = (model.generation_config.eos_token_id, model.config.eos_token_id)
    value = next((one for one in (given, *recorded) if one is not None), None)
    return read_token_ids("eos_token_id", value)
