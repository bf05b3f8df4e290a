# SPDX-License-Identifier: Apache-2.0
"""What is measured: one engine around a checkpoint or random weights, and suitable prompts."""

from dataclasses import dataclass, replace

import torch

from wedlm.attention.base import FP8, KVCache
from wedlm.bench.prompts import Prompts
from wedlm.bench.settings import Settings
from wedlm.bench.shapes import MASK_TOKEN_ID, random_model, shape_config
from wedlm.engine import resolve_options
from wedlm.engine.engine import Engine
from wedlm.engine.factory import plan_engine
from wedlm.engine.llm import LLM
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.model import ModelConfig
from wedlm.native import NativeTransformer

_CACHE_SPARE_TOKENS = 2000  # for each sequence of the largest batch: what a measurement lets it write


@dataclass(frozen=True)
class Target:
    """One engine, and the prompts for it."""

    name: str
    engine: Engine
    config: ModelConfig
    prompts: Prompts

    @property
    def device(self) -> torch.device:
        return self.engine.runner.device

    @property
    def dtype(self) -> str:
        return str(self.engine.runner.cache.keys.dtype).removeprefix("torch.")


def load_target(settings: Settings) -> Target:
    """Load the engine that all parts share. Raises ValueError for impossible options."""
    device = resolve_options.read_device(settings.device)
    rows = max(2048, settings.most_rows)
    given = {"max_num_seqs": max(settings.workload.batches), "max_num_batched_tokens": rows, **settings.engine}
    if settings.shape is None:
        assert settings.model is not None
        llm = LLM(settings.model, adapter=settings.adapter, dtype=settings.dtype, device=settings.device, **given)
        prompts = Prompts(llm.tokenizer, llm.model_config.vocab_size, llm.engine.config.max_model_len)
        return Target(settings.model, llm.engine, llm.model_config, prompts)
    config = shape_config(settings.shape)
    dtype = resolve_options.read_dtype(settings.dtype, device) or torch.bfloat16
    engine_config = EngineConfig(
        vocab_size=config.vocab_size,
        mask_token_id=MASK_TOKEN_ID,
        eos_token_ids=config.eos_token_ids,
        max_model_len=resolve_options.read_length(given.get("max_model_len"), config),
        options=EngineOptions.of(given),
    )
    options, ranks, shape = engine_config.options, None, config
    if options.tensor_parallel_size > 1:
        from wedlm.engine.ranks.start import random_over_ranks  # which a single rank does not need

        loaded = random_over_ranks(config, replace(options, dtype=str(dtype).removeprefix("torch.")), device)
        model, ranks = loaded.model, loaded.ranks
        shape = model.config  # of one rank, as its cache is
    else:
        model = random_model(config, device, dtype, options.rounded_to, options.quantize_head)
    if engine_config.options.kv_cache_bytes is None:
        cache_dtype = torch.float32 if isinstance(model, NativeTransformer) else dtype
        cache_dtype = {"fp8": FP8, "int8": torch.int8}.get(engine_config.options.kv_cache_dtype, cache_dtype)
        cache_bytes = _cache_bytes(settings, engine_config, shape, cache_dtype, device)
        engine_config = replace(engine_config, options=replace(engine_config.options, kv_cache_bytes=cache_bytes))
    engine = plan_engine(model, engine_config, None, ranks=ranks).build()
    return Target(settings.shape, engine, config, Prompts(None, config.vocab_size, engine_config.max_model_len))


def _cache_bytes(
    settings: Settings, engine: EngineConfig, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """The bytes for the largest batch and the longest context, at most what the engine would take by itself."""
    assert settings.workload.prompt is not None
    tokens = engine.options.max_num_seqs * (settings.workload.prompt + _CACHE_SPARE_TOKENS) + 2 * engine.max_model_len
    wanted = tokens * KVCache.bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    return min(wanted, resolve_options.default_cache_bytes(device, wanted, 0.85))
