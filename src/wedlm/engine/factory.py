# SPDX-License-Identifier: Apache-2.0
"""An engine around a model that is in memory: sizes the cache, chooses the runner."""

import math
from dataclasses import replace
from importlib.util import find_spec

import torch

from wedlm.attention.base import KVCache
from wedlm.engine import resolve_options
from wedlm.engine.engine import Engine, EngineConfig
from wedlm.engine.pages import PagePool
from wedlm.engine.runner import Runner
from wedlm.engine.text import Decoder
from wedlm.model import ModelConfig, Transformer

# Keeps tokens coming while prompts are read (docs/log.md). Where such steps are launched piece by piece, many short
# chunks would cost more than they spare.
_CAPTURED_CHUNK_STEP_RATIO = 1.8
_LEAST_CACHE_BYTES, _CACHE_TO_WEIGHTS = 2**28, 8


def build_engine(
    model: Transformer,
    config: EngineConfig,
    tokenizer: Decoder | None,
    *,
    page_size: int = 16,
    kv_cache_bytes: int | None = None,
    gpu_memory_utilization: float = 0.9,
    cuda_graphs: bool | None = None,
) -> Engine:
    """``model`` is packed and stays where it is. ``kv_cache_bytes`` and ``cuda_graphs`` as in ``LLM``, like the
    configuration's ``chunk_step_ratio`` and ``capture_chunks``."""
    shape, device = model.config, model.model.embed_tokens.weight.device
    dtype = model.model.embed_tokens.weight.dtype
    heads = (shape.num_kv_heads, shape.head_dim, dtype)
    per_token = KVCache.bytes_per_token(shape.num_layers, *heads)
    if kv_cache_bytes is None:
        wanted = 4 * (config.max_model_len + 2 * config.default_window_size) * per_token
        # A file can claim any length: without a word from the user it gets a cache in proportion to its weights.
        weights = sum(parameter.nbytes for parameter in model.parameters())
        wanted = min(wanted, max(_LEAST_CACHE_BYTES, _CACHE_TO_WEIGHTS * weights))
        kv_cache_bytes = resolve_options.default_cache_bytes(device, wanted, gpu_memory_utilization)
    num_pages = kv_cache_bytes // (per_token * page_size)
    if num_pages < 1:
        raise ValueError(f"kv_cache_bytes is {kv_cache_bytes}; expected at least {per_token * page_size}, one page")
    graphs = runs_as_graphs(cuda_graphs, device, shape)
    # Captured steps write the keys of padding to a page that is nobody's.
    cache = KVCache(shape.num_layers, num_pages + graphs, page_size, *heads, device)
    if config.chunk_step_ratio is None:
        captured = graphs and config.capture_chunks
        config = replace(config, chunk_step_ratio=_CAPTURED_CHUNK_STEP_RATIO if captured else math.inf)
    runner = _runner(model, cache, config, graphs)
    return Engine(config, runner, PagePool(num_pages, page_size), tokenizer)


def runs_as_graphs(asked: bool | None, device: torch.device, shape: ModelConfig) -> bool:
    """Whether steps run on the Triton kernels, as CUDA graphs. ValueError if that was asked for and cannot be."""
    reason = None
    if device.type != "cuda":
        reason = f"the device is {device}"
    elif find_spec("triton") is None:
        reason = "triton is not installed"
    elif shape.head_dim & (shape.head_dim - 1) or shape.head_dim < 16:
        reason = f"the head dimension is {shape.head_dim}, no power of two of at least 16"
    if asked and reason is not None:
        raise ValueError(f"cuda_graphs is True, but {reason}; expected a CUDA device, triton and common heads")
    return reason is None if asked is None else asked


def _runner(model: Transformer, cache: KVCache, config: EngineConfig, graphs: bool) -> Runner:
    if not graphs:
        return Runner(model, cache, config.mask_token_id, config.max_num_seqs)
    from wedlm.engine.graph_runner import GraphRunner  # imports triton
    from wedlm.model.inference.triton_transformer import FusedTransformer

    fused = FusedTransformer(model)
    limits = config.max_num_seqs, config.max_model_len
    return GraphRunner(fused, cache, config.mask_token_id, *limits, captures_chunks=config.capture_chunks)
