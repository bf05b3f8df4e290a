# SPDX-License-Identifier: Apache-2.0
"""What cannot decode by streaming in vLLM is refused before it starts: options of a server when it is configured,
parameters of a request where vLLM checks them, so that no other request is harmed."""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from wedlm_vllm.settings import SETTINGS_KEY, StreamingSettings

log = logging.getLogger("vllm.wedlm")


class StreamingModelConfig:
    """vLLM calls this for a configuration of one of our architectures, before it decides anything by it: first for
    the model's, then for the whole."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Raises ValueError for a checkpoint that was not converted."""
        StreamingSettings.from_hf(model_config.hf_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Give vLLM the number of rows. Raises ValueError for options that cannot be right."""
        from vllm.config.diffusion import DiffusionConfig

        settings = StreamingSettings.from_hf(vllm_config.model_config.hf_config)
        refuse_options(vllm_config, settings)
        fit_options(vllm_config, settings)
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=settings.num_rows)


def refuse_options(vllm_config: Any, settings: StreamingSettings) -> None:
    """Raises ValueError naming an option, its value and what is expected."""
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    for name in ("speculative_config", "lora_config", "kv_transfer_config"):
        if getattr(vllm_config, name) is not None:
            raise ValueError(f"{name} is set; expected none: a WeDLM checkpoint decodes by streaming and cannot use it")
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) != 1:
            raise ValueError(f"{name} is {getattr(parallel, name)}; expected 1 for a WeDLM checkpoint")
    if not vllm_config.use_v2_model_runner:
        raise ValueError("VLLM_USE_V2_MODEL_RUNNER is 0; expected 1 or nothing: only runner v2 can run windows")
    variable = "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"
    if os.environ.get(variable, "0") != "0":
        raise ValueError(
            f"{variable} is {os.environ[variable]!r:.80}; expected nothing: windows are kept by name, and a client "
            "could ask for another's"
        )
    given = vllm_config.diffusion_config
    if given is not None and given.canvas_length != settings.num_rows:
        raise ValueError(
            f"diffusion_config has canvas_length {given.canvas_length}; expected none, or the checkpoint's "
            f"{settings.num_rows}"
        )
    threshold = scheduler.long_prefill_token_threshold
    if 0 < threshold < settings.num_rows:
        raise ValueError(
            f"long_prefill_token_threshold is {threshold}; expected 0, or at least the {settings.num_rows} rows of a "
            "request's step, which it would cut"
        )
    if _budget(scheduler) < settings.num_rows:
        raise ValueError(
            f"max_num_batched_tokens is {_budget(scheduler)}; expected at least the {settings.num_rows} rows of one "
            "request's step"
        )


def _budget(scheduler: Any) -> int:
    """The most rows that vLLM schedules for a step."""
    return scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens


def fit_options(vllm_config: Any, settings: StreamingSettings) -> None:
    """Change what follows from streaming, and say so."""
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    most = _budget(scheduler) // settings.num_rows
    if scheduler.max_num_seqs > most:
        log.warning(
            "max_num_seqs is %d and becomes %d: each request runs %d rows a step, and max_num_batched_tokens is %d",
            scheduler.max_num_seqs, most, settings.num_rows, _budget(scheduler),
        )  # fmt: skip
        scheduler.max_num_seqs = most
    if settings.is_causal and cache.enable_prefix_caching:
        log.warning(
            "enable_prefix_caching is off: with next_token 'causal' the keys of an answer's last token are never "
            "computed, and a cached block could hold their place"
        )
        cache.enable_prefix_caching = False


# A request's fields that the sampler does not read, and the values that ask for nothing.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "min_tokens": (0,),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
}


def check_request(params: Any) -> None:
    """Raises ValueError naming a field that would change nothing."""
    for name, neutral in _UNUSED.items():
        value = getattr(params, name, None)
        if value is not None and value not in neutral:
            raise ValueError(
                f"{name} is {value!r:.80}; expected {neutral[0]}: the vLLM plug-in of WeDLM reads temperature, top_k, "
                "top_p, seed and what ends a text"
            )
    ours = [name for name in getattr(params, "extra_args", None) or () if name.startswith("wedlm_")]
    if ours:
        raise ValueError(
            f"extra_args has {ours[0]}; expected none: in vLLM streaming is set for all requests by "
            "`python -m wedlm_vllm.convert`"
        )


def checked_verify(verify: Callable[..., None]) -> Callable[..., None]:
    """vLLM's check of a request's parameters, followed by ours where the model is WeDLM's."""
    if getattr(verify, "is_wedlm", False):
        return verify

    @functools.wraps(verify)
    def checked(params: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        verify(params, model_config, *args, **kwargs)
        if getattr(model_config.hf_config, SETTINGS_KEY, None) is not None:
            check_request(params)

    checked.is_wedlm = True  # type: ignore[attr-defined]
    return checked
