# SPDX-License-Identifier: Apache-2.0
"""The only place that builds an engine: it sizes the cache, chooses how steps run, and says what it chose and why."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from wedlm.attention.base import KVCache
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine import resolve_options
from wedlm.engine.engine import Engine
from wedlm.engine.execution.base import PlanAttention, RowsModel
from wedlm.engine.execution.eager_step import EagerStep
from wedlm.engine.execution.runner import Runner
from wedlm.engine.execution.windows import Windows
from wedlm.engine.options import EngineConfig
from wedlm.engine.pages import PagePool
from wedlm.engine.text import EngineTokenizer
from wedlm.model import ModelConfig, Transformer, pack_for_inference
from wedlm.model.inference.layers import Quantization
from wedlm.model.lora.masked_rows import has_masked_lora
from wedlm.native import NativeAttend, NativeTransformer, is_available
from wedlm.native.weights import native_from_torch

log = logging.getLogger(__name__)

# Keeps tokens coming while prompts are read (docs/log.md). Where such steps are launched piece by piece, many short
# chunks would cost more than they spare.
_CAPTURED_CHUNK_STEP_RATIO = 1.8
_LEAST_CACHE_BYTES, _CACHE_TO_WEIGHTS = 2**28, 8


class CacheShape(Protocol):
    """What the cache needs to know of a model."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class Blueprint:
    """All that an engine is built from, with every choice made. ``model`` computes rows with attention through
    ``Attend``, or is native; ``packed``, the same model as steps on our kernels need it, is None where they do not run.

    ``num_pages`` and ``page_size`` are those of the pool. ``dtype`` is the cache's.
    """

    model: RowsModel[Any]
    packed: Transformer | None
    shape: CacheShape
    dtype: torch.dtype
    device: torch.device
    config: EngineConfig
    num_pages: int
    page_size: int
    tokenizer: EngineTokenizer | None
    eager_reason: str | None = None  # why steps do not run on our kernels
    torch_reason: str | None = None  # why weights in eight bits do not run on the native forward of CPUs

    def build(self, cache: KVCache | None = None, clock: Callable[[], float] = time.perf_counter) -> Engine:
        """A new engine with nothing in it. ``cache``: memory of a former one to use again."""
        cache = self._new_cache() if cache is None else cache
        if self.packed is None:
            windows = Windows(self.config.options.max_num_seqs, self.device)
            plan_attention: PlanAttention[Any] = (
                NativeAttend if isinstance(self.model, NativeTransformer) else PagedSdpa
            )
            runner = Runner(windows, EagerStep(self.model, plan_attention, cache, windows, self.config.mask_token_id))
        else:
            runner = self._runner_on_kernels(self.packed, cache)
        return Engine(self.config, runner, PagePool(self.num_pages, self.page_size), self.tokenizer, clock)

    def rebuild(self, broken: Engine) -> Engine:
        """A new engine in place of one that failed, over the same weights and the same amount of cache."""
        if self.device.type == "cpu":
            return self.build()
        cache = broken.runner.cache  # there is no room for a second one; zeros, because a fault may have left nan
        cache.keys.zero_()
        cache.values.zero_()
        return self.build(cache)

    def describe(self) -> str:
        """One line for users: device, types, how steps run and why, and the cache's size."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        weights = str(self.dtype).removeprefix("torch.")
        if isinstance(self.model, NativeTransformer):
            steps = f"native C++ forward ({self.model.path}), int8 weights, threads: {self.model.threads}"
        elif self.packed is None:
            steps = f"plain torch operations ({self.eager_reason})" if self.eager_reason else "plain torch operations"
            if self.torch_reason is not None:
                steps += f", int8 slowly ({self.torch_reason})"
        else:
            chunks = "with" if self.config.options.capture_chunks else "without"
            steps = f"Triton kernels in CUDA graphs, {chunks} prompt chunks"
        tokens = self.num_pages * self.page_size
        megabytes = tokens * self._bytes_per_token() / 1e6
        return f"{device}, {weights}; steps: {steps}; cache: {tokens:,} tokens ({megabytes:,.0f} MB)"

    def _bytes_per_token(self) -> int:
        shape = self.shape
        return KVCache.bytes_per_token(shape.num_layers, shape.num_kv_heads, shape.head_dim, self.dtype)

    def _new_cache(self) -> KVCache:
        # Captured steps write the keys of padding to a page of their own, the last.
        num_pages, shape = self.num_pages + (self.packed is not None), self.shape
        heads = (shape.num_kv_heads, shape.head_dim, self.dtype)
        return KVCache(shape.num_layers, num_pages, self.page_size, *heads, self.device)

    def _runner_on_kernels(self, packed: Transformer, cache: KVCache) -> Runner:
        from wedlm.attention.paged import plan_paged  # these import triton
        from wedlm.engine.execution.captured_step import CapturedStep
        from wedlm.model.inference.triton_transformer import FusedTransformer

        fused, mask, options = FusedTransformer(packed), self.config.mask_token_id, self.config.options
        windows = Windows(options.max_num_seqs, self.device, capacity=64, has_null_slot=True)
        captured = CapturedStep(fused, cache, windows, mask, self.config.max_model_len, options.capture_chunks)
        return Runner(windows, EagerStep(fused, plan_paged, cache, windows, mask), [captured])


def prepare_model(model: Transformer, quantization: Quantization | None) -> Transformer | NativeTransformer:
    """The model as ``plan_engine`` wants it: native for weights in eight bits on a CPU, if nothing prevents it; else
    packed, in place. A native model has weights of its own, and as many threads as torch has at this moment."""
    if quantization != "int8" or model.model.embed_tokens.weight.device.type != "cpu" or native_obstacle(model):
        return pack_for_inference(model, quantization)
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)  # more than there are would only wait for each other
    return native_from_torch(model, quantization, threads=threads)


def native_obstacle(model: Transformer) -> str | None:
    """Why this model cannot run on the native forward of CPUs; None if it can."""
    if not is_available():
        return "the native library was not built: no C++ compiler"
    if has_masked_lora(model):
        return "the native library does not run adapters of masked rows"
    return None


def plan_engine(
    model: Transformer | NativeTransformer, config: EngineConfig, tokenizer: EngineTokenizer | None
) -> Blueprint:
    """Every choice for an engine around a model of ``prepare_model``, by ``config.options``; logs what was chosen.

    ValueError for options that cannot be.
    """
    shape, options = model.config, config.options
    device, dtype = _device_and_cache_dtype(model)
    per_token = KVCache.bytes_per_token(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)
    num_bytes = options.kv_cache_bytes
    if num_bytes is None:
        needed = 4 * (config.max_model_len + 2 * options.wedlm_window_size) * per_token
        # A file can claim any length: without a word from the user it gets a cache in proportion to its weights.
        weights = _weight_bytes(model)
        needed = min(needed, max(_LEAST_CACHE_BYTES, _CACHE_TO_WEIGHTS * weights))
        num_bytes = resolve_options.default_cache_bytes(device, needed, options.gpu_memory_utilization)
    num_pages = num_bytes // (per_token * options.page_size)
    if num_pages < 1:
        raise ValueError(f"kv_cache_bytes is {num_bytes}; expected at least {per_token * options.page_size}, one page")
    reason = eager_reason(options.cuda_graphs, device, shape)
    if options.chunk_step_ratio is None:
        captures_chunks = reason is None and options.capture_chunks
        ratio = _CAPTURED_CHUNK_STEP_RATIO if captures_chunks else math.inf
        config = replace(config, options=replace(options, chunk_step_ratio=ratio))
    packed = model if reason is None and isinstance(model, Transformer) else None
    torch_reason = None
    if isinstance(model, Transformer) and options.quantization == "int8" and device.type == "cpu":
        torch_reason = native_obstacle(model)
    sizes = num_pages, options.page_size
    blueprint = Blueprint(model, packed, shape, dtype, device, config, *sizes, tokenizer, reason, torch_reason)
    is_slow = torch_reason is not None or (reason is not None and device.type == "cuda")
    log.log(logging.WARNING if is_slow else logging.INFO, "engine: %s", blueprint.describe())
    return blueprint


def _weight_bytes(model: Transformer | NativeTransformer) -> int:
    if isinstance(model, NativeTransformer):
        return model.num_bytes
    return sum(parameter.nbytes for parameter in model.parameters())


def _device_and_cache_dtype(model: Transformer | NativeTransformer) -> tuple[torch.device, torch.dtype]:
    if isinstance(model, NativeTransformer):
        return torch.device("cpu"), torch.float32  # whatever type the weights came in
    weight = model.model.embed_tokens.weight
    return weight.device, weight.dtype


def eager_reason(asked: bool | None, device: torch.device, shape: ModelConfig) -> str | None:
    """Why steps do not run on the Triton kernels, as CUDA graphs; None if they do. ValueError if that was asked for and
    cannot be."""
    reason = None
    if device.type != "cuda":
        reason = f"the device is {device}"
    elif find_spec("triton") is None:
        reason = "triton is not installed"
    elif shape.head_dim & (shape.head_dim - 1) or shape.head_dim < 16:
        reason = f"the head dimension is {shape.head_dim}, not a power of two of at least 16"
    if asked and reason is not None:
        raise ValueError(f"cuda_graphs is True, but {reason}; expected a CUDA device, triton and common heads")
    return "cuda_graphs is False" if asked is False and reason is None else reason
