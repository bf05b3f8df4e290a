# SPDX-License-Identifier: Apache-2.0
"""``generate`` of a model in transformers: this package's engine over the model's own weights."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from wedlm.algorithm.params import DecodeParams, Decoding
from wedlm.engine.factory import Blueprint
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.request import Request
from wedlm.engine.sampling_params import SamplingParams
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


def generate(  # noqa: PLR0913 - options of one call, as transformers' own generate takes them
    self: HfModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    decoding: Decoding | None = None,
    wedlm_window_size: int = DecodeParams.window_size,
    wedlm_entropy_threshold: float | None = DecodeParams.entropy_threshold,
    wedlm_pos_penalty_factor: float = DecodeParams.pos_penalty,
    wedlm_draft_entropy: float = DecodeParams.draft_entropy,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int = DecodeParams.top_k,
    top_p: float = DecodeParams.top_p,
    seed: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    mask_token_id: int | None = None,
    **unsupported: Any,
) -> Tensor:
    """``input_ids`` [N, R] and up to ``max_new_tokens`` new ones: [N, R + most new], padded on the right.

    The text is ``LLM``'s for the same weights and options, which ``SamplingParams`` explains. Prompts of different
    lengths are padded on the left, with ``attention_mask`` 0 there. ``temperature`` None is 0, or 1 if ``do_sample``.
    End tokens default to those of the generation config and the config, padding to the config's or the first end
    token, the mask token to the config's. All else in a ``generation_config.json`` is not used. Raises ValueError,
    also for options of transformers that have no meaning here.
    """
    for name, value in unsupported.items():
        raise ValueError(
            f"{name} is {value!r}, which this generate does not support; expected options of wedlm.SamplingParams "
            "(max_new_tokens and min_new_tokens for max_tokens and min_tokens)"
        )
    config = self.config.model_config()
    ends = _end_token_ids(self, eos_token_id)
    pad = next((one for one in (pad_token_id, self.config.pad_token_id, *ends) if one is not None), 0)
    mask = config.mask_token_id if mask_token_id is None else mask_token_id
    if mask is None:
        raise ValueError("the config has no mask_token_id; expected mask_token_id=..., an id that text never needs")
    params = SamplingParams(
        max_tokens=max_new_tokens,
        min_tokens=min_new_tokens,
        temperature=_temperature(do_sample, temperature),
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        wedlm_entropy_threshold=wedlm_entropy_threshold,
        wedlm_pos_penalty_factor=wedlm_pos_penalty_factor,
        wedlm_draft_entropy=wedlm_draft_entropy,
    )
    engine_config = EngineConfig(
        vocab_size=config.vocab_size,
        mask_token_id=mask,
        eos_token_ids=ends,
        max_model_len=config.max_length,
        options=EngineOptions(
            decoding=decoding,
            wedlm_window_size=wedlm_window_size,
            max_num_seqs=min(len(input_ids), _MAX_NUM_SEQS),
        ),
        model_decoding=config.default_decoding,
    )
    new = _decode(self, engine_config, _prompts(input_ids, attention_mask), params)
    longest = max(len(tokens) for tokens in new)
    rows = [tokens + [pad] * (longest - len(tokens)) for tokens in new]
    return torch.cat((input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)), dim=1)


def _decode(
    model: HfModel, engine_config: EngineConfig, prompts: Sequence[list[int]], params: SamplingParams
) -> list[list[int]]:
    """New tokens of each prompt, from an engine whose cache holds all of them to their ends."""
    config, embedding = model.config.model_config(), model.model.embed_tokens.weight
    window = 2 * engine_config.options.wedlm_window_size
    lengths = [min(len(prompt) + params.max_tokens + window, config.max_length) for prompt in prompts]
    page_size = engine_config.options.page_size
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
    requests: list[Request] = [engine.add(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    training = model.training
    model.eval()
    try:
        while engine.has_work:
            engine.step()
    finally:
        model.train(training)
    return [request.output_token_ids for request in requests]


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    real = real_rows(input_ids, attention_mask)
    if real is None:
        return input_ids.tolist()
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("attention_mask has padding behind tokens; expected it on the left (padding_side='left')")
    return [ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)]


def _end_token_ids(model: HfModel, given: int | list[int] | None) -> tuple[int, ...]:
    recorded = (model.generation_config.eos_token_id, model.config.eos_token_id)
    value = next((one for one in (given, *recorded) if one is not None), None)
    return read_token_ids("eos_token_id", value)


def _temperature(do_sample: bool | None, temperature: float | None) -> float:
    if temperature is None:
        return 1.0 if do_sample else 0.0
    if do_sample is not None and do_sample is not (temperature > 0):
        raise ValueError(
            f"do_sample is {do_sample!r} and temperature {temperature!r}; expected one that fits the other"
        )
    return temperature
