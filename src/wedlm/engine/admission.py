# SPDX-License-Identifier: Apache-2.0
"""Turn what a caller asks for into a ``Request``: all checks that need no queue, and all defaults."""

import dataclasses
import secrets
from collections.abc import Sequence

from wedlm.algorithm.params import DecodeParams, Remasking
from wedlm.engine.adapters import LoadedAdapter
from wedlm.engine.constraints.rules import build_constraint
from wedlm.engine.options import EngineConfig
from wedlm.engine.request import (
    Request,
    RequestCounters,
    RequestLimits,
    RequestOutput,
    RequestProgress,
    WindowSnapshot,
)
from wedlm.engine.sampling_params import SamplingParams
from wedlm.engine.text import EngineTokenizer, TextStream


def make_request(  # noqa: PLR0913 - each is a fact of the request or of the engine
    config: EngineConfig,
    tokenizer: EngineTokenizer | None,
    request_id: str,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    order: tuple[int, int, int],
    arrival_time: float,
    streamed: bool,
    watched: bool,
    adapter: LoadedAdapter | None = None,
) -> Request:
    """Make a request that is not queued yet. Raises ValueError if this engine could never run it."""
    prefix, suffix = list(prompt_token_ids), params.suffix_token_ids or ()
    prompt = [*prefix, *suffix]
    _check_prompt(config, prompt, "the prompt and its suffix have" if suffix else "the prompt has")
    if suffix:
        _check_gap(config, prefix, params)
    if params.stop and tokenizer is None:
        raise ValueError("stop is set but the engine has no tokenizer; expected stop_token_ids instead")
    decode = decode_params(config, len(prefix), params, adapter is not None and adapter.has_masked_rows)
    text = None
    if tokenizer is not None:
        # Text does not show special tokens, so a stop string that names one is found by its id.
        named = [tokenizer.special_token_id(stop) for stop in params.stop or ()]
        ends = dict.fromkeys([*decode.stop_token_ids, *(one for one in named if one is not None)])
        decode = dataclasses.replace(decode, stop_token_ids=tuple(ends))
        before = prefix[-1:] if tokenizer.drops_first_space else ()
        text = TextStream(tokenizer, params.stop or (), before, keep_stop=params.include_stop_str_in_output)
    known = (config.mask_token_id, config.vocab_size, tokenizer)
    constraint = build_constraint(params, decode.stop_token_ids, *known, prompt)
    return Request(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=params,
        decode=decode,
        max_tokens=min(params.max_tokens, config.max_model_len - len(prompt)),
        order=order,
        streamed=streamed,
        watched=watched,
        output=RequestOutput(tokens=list(prompt), text=text, constraint=constraint),
        counters=RequestCounters(arrival_time),
        progress=RequestProgress(WindowSnapshot.initial(prompt, decode)),
        limits=RequestLimits(decode.row_budget if decode.is_verified else decode.max_rows),
        adapter=adapter,
    )


def decode_params(
    config: EngineConfig, num_prompt_tokens: int, params: SamplingParams, adapted: bool = False
) -> DecodeParams:
    """The parameters that the text depends on. ``adapted``: the request's adapter predicts in masked rows. Raises
    ValueError for an end token that the model does not have."""
    has_masked_rows = config.has_masked_rows or adapted
    ends = tuple(params.stop_token_ids or ()) + (() if params.ignore_eos else config.eos_token_ids)
    if any(token >= config.vocab_size for token in ends):
        given = list(params.stop_token_ids or ())
        raise ValueError(f"stop_token_ids is {given}; expected ids below {config.vocab_size}")
    suffix_length = len(params.suffix_token_ids or ())
    decoding = params.decoding_of(config.decoding)
    window_size = params.wedlm_window_size or config.window_size(decoding)
    if config.block_length is not None:
        window_size = _check_block(decoding, params.wedlm_window_size, config.block_length)
    threshold = params.wedlm_entropy_threshold
    asked = params.wedlm_lookup_drafts
    lookup_drafts = config.options.wedlm_lookup_drafts if asked is None else asked
    if lookup_drafts is None:  # verified takes some where it would have none otherwise
        lookup_drafts = window_size if decoding == "auto" or not has_masked_rows else 0
    default: Remasking = "entropy" if config.block_length is None else "low_confidence_dynamic"  # as SDAR's own code
    remasking = params.remasking_strategy or default
    return DecodeParams(
        decoding=decoding,
        remasking=remasking if decoding == "block" else "entropy",
        confidence_threshold=params.confidence_threshold,
        denoising_steps=params.denoising_steps,
        block_length=config.block_length or 1,
        window_size=window_size,
        lookup_drafts=lookup_drafts,
        has_masked_rows=has_masked_rows,
        entropy_threshold=config.entropy_threshold if threshold == "auto" else threshold,
        pos_penalty=params.wedlm_pos_penalty_factor,
        next_token=params.wedlm_next_token or config.next_token,
        draft_entropy=params.wedlm_draft_entropy,
        temperature=params.temperature,
        top_k=max(0, params.top_k),
        top_p=params.top_p,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        mask_token_id=config.mask_token_id,
        stop_token_ids=tuple(dict.fromkeys(ends)),
        min_eos_position=num_prompt_tokens + params.min_tokens if params.min_tokens else 0,
        max_positions=num_prompt_tokens + params.max_tokens + suffix_length if suffix_length else config.max_model_len,
        prefix_length=num_prompt_tokens if suffix_length else 0,
        suffix_length=suffix_length,
    )


def _check_gap(config: EngineConfig, prefix: list[int], params: SamplingParams) -> None:
    suffix = params.suffix_token_ids or ()
    if not config.has_masked_rows:
        raise ValueError(
            f"suffix has {len(suffix)} tokens, and this checkpoint was never adapted to predict masked positions; "
            "expected no suffix"
        )
    if config.block_length is not None:
        raise ValueError(
            f"suffix has {len(suffix)} tokens, and this model sees by blocks of {config.block_length}; expected "
            "no suffix"
        )
    room = config.max_model_len - len(prefix) - len(suffix)
    if params.max_tokens > room:
        raise ValueError(
            f"max_tokens is {params.max_tokens}, the length of a gap between {len(prefix)} and {len(suffix)} tokens; "
            f"expected at most {room} (max_model_len is {config.max_model_len})"
        )


def _check_block(decoding: str, window_size: int | None, block_length: int) -> int:
    """Check the window of a model that sees by blocks. Raises ValueError if the request asks for another one."""
    if decoding != "block":
        raise ValueError(
            f"decoding is {decoding!r} and the model sees by blocks of {block_length}; expected 'block': no row of "
            "such a model predicts the token after it, and windows that slide would not be its blocks"
        )
    if window_size not in (None, block_length):
        raise ValueError(
            f"wedlm_window_size is {window_size} and the model sees by blocks of {block_length}; expected that, or "
            "another block_length of the engine"
        )
    return block_length


def _check_prompt(config: EngineConfig, prompt: list[int], it_has: str) -> None:
    if not prompt:
        raise ValueError(f"{it_has} 0 tokens; expected at least 1")
    if len(prompt) >= config.max_model_len:
        raise ValueError(
            f"{it_has} {len(prompt)} tokens; expected at most {config.max_model_len - 1} "
            "(max_model_len less one for the answer)"
        )
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise ValueError(f"the prompt contains {token!r}; expected ids from 0 to {config.vocab_size - 1}")
