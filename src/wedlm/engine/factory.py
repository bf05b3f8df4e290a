# SPDX-License-Identifier: Apache-2.0
"""The only place that builds an engine. It sizes the cache, chooses how steps run, and says what it chose and why."""

import gc
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch

from wedlm.attention.base import FP8, KVCache
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine import resolve_options
from wedlm.engine.adapters import Adapters, FactorSlots
from wedlm.engine.engine import Engine
from wedlm.engine.execution.base import PlanAttention, RowsModel, StepExecutor
from wedlm.engine.execution.eager_step import EagerStep
from wedlm.engine.execution.native_step import NativeStep
from wedlm.engine.execution.runner import Runner
from wedlm.engine.execution.windows import Windows
from wedlm.engine.options import EngineConfig
from wedlm.engine.pages import PagePool
from wedlm.engine.text import EngineTokenizer
from wedlm.model import ModelConfig, Transformer, pack_for_inference
from wedlm.model.inference.adapter_bank import AdapterBank
from wedlm.model.inference.quantization import Quantization, multiplies_fp8
from wedlm.native import NativeAttend, NativeTransformer, is_available
from wedlm.native.library import PATH_VARIABLE, PORTABLE, chosen_path, paths
from wedlm.native.weights import NativeAdapters, format_names, native_from_torch, rounds_inputs

if TYPE_CHECKING:
    from wedlm.attention.flash import Flash
    from wedlm.engine.ranks.processes import Ranks

log = logging.getLogger(__name__)

# Keeps tokens coming while prompts are read (docs/log.md). Where such steps are launched piece by piece, many short
# chunks would cost more than they spare.
_CAPTURED_CHUNK_STEP_RATIO = 1.8
# Small pages share more of equal prefixes. Our attention copies keys in tiles of 64, which a page must hold whole.
PAGE_SIZE, _PAGE_SIZE_ON_KERNELS = 16, 64
# Rows of auto's windows, at most, where steps are CUDA graphs: there further rows of few sequences cost little.
_WIDE_WINDOW = 64
# For users of a checkpoint that was never adapted.
WITHOUT_MASK = "drafts come from the text alone: the checkpoint names no mask token (--mask-token-id names one)"
_LEAST_CACHE_BYTES, _CACHE_TO_WEIGHTS = 2**28, 8


class CacheShape(Protocol):
    """The part of a model's shape that the cache needs."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True)
class NumberFormats:
    """The formats in which numbers are kept, in words for users. ``products``: what inputs of matrix products are
    rounded to; None: they stay as activations are."""

    weights: str
    activations: str
    products: str | None
    cache: str


@dataclass(frozen=True)
class Blueprint:
    """Everything that an engine is built from, with every choice made. ``model`` computes rows with attention through
    ``Attend``, or is native. ``packed`` is the same model as steps on our kernels need it, or None if they do not run.

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
    note: str = ""  # what was decided against when the weights were loaded, and why
    adapters: Adapters | None = None  # those that the model has by name; they outlive an engine
    ranks: "Ranks | None" = None  # all that compute the model, whose first rank's part ``model`` is

    def build(self, cache: KVCache | None = None, clock: Callable[[], float] = time.perf_counter) -> Engine:
        """Build a new, empty engine. ``cache`` is the memory of a former one, to use again."""
        cache = self._new_cache() if cache is None else cache
        if self.ranks is not None:
            runner = self._runner_over_ranks(self.ranks, cache)
        elif self.packed is None:
            windows, mask = Windows(self.config.options.max_num_seqs, self.device), self.config.mask_token_id
            plan_attention: PlanAttention[Any] = PagedSdpa
            preferred: list[StepExecutor] = []
            if isinstance(self.model, NativeTransformer):
                plan_attention = NativeAttend
                preferred = [NativeStep(self.model, cache, windows, mask, self.config.max_model_len)]
            eager = EagerStep(self.model, plan_attention, cache, windows, mask, self._block_length)
            runner = Runner(windows, eager, preferred)
        else:
            runner = self._runner_on_kernels(self.packed, cache)
        pool = PagePool(self.num_pages, self.page_size, block_length=self._block_length)
        return Engine(self.config, runner, pool, self.tokenizer, clock, self.adapters)

    def rebuild(self, broken: Engine) -> Engine:
        """Build a new engine in place of one that failed, over the same weights and the same amount of cache. Other
        ranks restart and read their weights again."""
        if self.ranks is not None:
            self.ranks.start()
            self.ranks.connect()
        if self.device.type == "cpu":
            return self.build()
        cache = broken.runner.cache  # there is no room for a second one; zeros, because a fault may have left nan
        cache.clear()
        return self.build(cache)

    @property
    def _block_length(self) -> int:
        return self.config.block_length or 1

    @property
    def formats(self) -> NumberFormats:
        """The number formats of weights, activations and cache."""
        activations = _name_of(_device_and_dtype(self.model)[1])
        weights, products = activations, None
        if isinstance(self.model, NativeTransformer):
            weights = format_names(self.model)
            products = "int8" if rounds_inputs(self.model) else None
        elif self.config.options.quantization == "fp8":
            weights = products = "fp8"
        return NumberFormats(weights, activations, products, _name_of(self.dtype))

    def describe(self) -> str:
        """One line for users: device, number formats, the cache's size, how steps run and why."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        flash = self._find_flash()
        if isinstance(self.model, NativeTransformer):
            steps = f"native C++ forward ({self.model.path}), threads: {self.model.threads}"
        elif self.packed is None:
            steps = "plain torch operations"
        else:
            chunks = "with" if self.config.options.capture_chunks else "without"
            kernels = "deterministic Triton kernels" if self.config.options.deterministic else "Triton kernels"
            if flash is not None and flash.call is not None:
                kernels += ", FlashAttention-3 for the attention of long prompt chunks,"
            steps = f"{kernels} in CUDA graphs, {chunks} prompt chunks"
        on_torch = self.packed is None and not isinstance(self.model, NativeTransformer)
        reasons = [one for one in (on_torch and self.eager_reason, self.note) if one]
        if flash is not None and flash.fault:
            reasons.append(f"FlashAttention-3 is installed, but cannot be used: {flash.fault}")
        if reasons:
            steps += f" ({'; '.join(reasons)})"
        if self.ranks is not None:
            device += f" and {self.ranks.size - 1} more"
            steps += f", over {self.ranks.size} ranks"
        tokens = self.num_pages * self.page_size
        megabytes = tokens * self._bytes_per_token() / 1e6
        formats = self.formats
        rounded = "" if formats.products is None else f", rounded to {formats.products} for matrix products"
        numbers = f"weights: {formats.weights}; activations: {formats.activations}{rounded}; cache: {formats.cache}"
        more = "" if self.config.has_masked_rows else f"; {WITHOUT_MASK}"
        if self.config.block_length is not None:
            more += f"; sees and decodes by blocks of {self.config.block_length}"
        elif self.config.model_decoding != "auto":
            more += f"; decoding: {self.config.decoding}, unless a request names another"
        return f"{device}; {numbers}, {tokens:,} tokens ({megabytes:,.0f} MB); steps: {steps}{more}"

    def _find_flash(self) -> "Flash | None":
        """FlashAttention-3, if steps could use it."""
        if self.packed is None or self.config.options.deterministic:
            return None
        from wedlm.attention.flash import find_flash  # which imports triton

        return find_flash(self.device, self.dtype, self.shape.num_kv_heads, self.shape.head_dim, self.page_size)

    def _bytes_per_token(self) -> int:
        shape = self.shape
        return KVCache.bytes_per_token(shape.num_layers, shape.num_kv_heads, shape.head_dim, self.dtype)

    def _new_cache(self) -> KVCache:
        # Captured steps write the keys of padding to a page of their own, the last.
        num_pages, shape = self.num_pages + (self.packed is not None), self.shape
        heads = (shape.num_kv_heads, shape.head_dim, self.dtype)
        return KVCache(shape.num_layers, num_pages, self.page_size, *heads, self.device)

    def _runner_over_ranks(self, ranks: "Ranks", cache: KVCache) -> Runner:
        """The runner of rank 0; the other ranks get caches of the same size."""
        from wedlm.engine.ranks.build import first_runner, tell_cache  # which a single rank does not need

        tell_cache(ranks, cache, self.config, self.packed is not None)
        return first_runner(ranks, cache, self.model, self.packed, self.config)

    def _runner_on_kernels(self, packed: Transformer, cache: KVCache) -> Runner:
        from wedlm.attention.paged import plan_paged  # these import triton
        from wedlm.engine.execution.captured_step import CapturedStep
        from wedlm.model.inference.triton_transformer import FusedTransformer

        mask, options = self.config.mask_token_id, self.config.options
        fused = FusedTransformer(packed, deterministic=options.deterministic)
        plan_attention = partial(plan_paged, fixed=options.deterministic)
        windows = Windows(options.max_num_seqs, self.device, capacity=_WIDE_WINDOW, has_null_slot=True)
        captured = CapturedStep(fused, cache, windows, mask, self.config.max_model_len, options.capture_chunks)
        return Runner(windows, EagerStep(fused, plan_attention, cache, windows, mask), [captured])


def release_memory() -> None:
    """Give back memory that no engine, model or trainer needs any more, before the next one is built. It may still be
    held by objects that refer to each other, and by torch, which keeps a GPU's memory for itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepare_model(
    model: Transformer, quantization: Quantization | None, quantize_head: bool = False
) -> Transformer | NativeTransformer:
    """Make the model as ``plan_engine`` needs it: native for int8 on a CPU (ValueError if that is impossible),
    otherwise packed in place. ``quantize_head``: FP8 for the output projection, too. A native model has separate
    weights, and as many threads as torch has at this moment."""
    if quantize_head and quantization != "fp8":
        raise ValueError(f"quantize_head is True and quantization is {quantization!r}; expected 'fp8'")
    if quantization != "int8" or model.model.embed_tokens.weight.device.type != "cpu":
        return pack_for_inference(model, quantization, quantize_head)
    obstacle = native_obstacle() or block_obstacle(model.config)
    if obstacle is not None:
        raise ValueError(f"quantization is 'int8', but {obstacle}; expected none on a CPU where it cannot run")
    return native_from_torch(model, quantization, threads=native_threads())


def native_threads() -> int:
    """The threads of a native model made now: as many as torch has, but at most one per processor, since more would
    only wait for each other."""
    return min(torch.get_num_threads(), os.cpu_count() or 1)


def native_obstacle() -> str | None:
    """Why no model can run on the native forward of CPUs; None if they can."""
    if not is_available():
        return "the native library was not built: no C++ compiler"
    if chosen_path() == PORTABLE and not os.environ.get(PATH_VARIABLE):
        needs = "; or ".join(path.needs for path in paths() if path.name != PORTABLE)
        return f"this processor has none of the instruction sets that the native library needs ({needs})"
    return None


def block_obstacle(config: ModelConfig) -> str | None:
    """Why this model cannot run on our kernels or the native forward; None if it can."""
    if config.sees_by_block:
        return f"rows of {config.model_type} models see all of their block, and there is causal attention alone"
    return None


def plan_engine(
    model: Transformer | NativeTransformer,
    config: EngineConfig,
    tokenizer: EngineTokenizer | None,
    note: str = "",
    num_sharing: int = 1,
    ranks: "Ranks | None" = None,
) -> Blueprint:
    """Make every choice for an engine around a model from ``prepare_model``, by ``config.options``, and log what was
    chosen.

    ``note`` says what users should know about the choice of the model. ``num_sharing``: how many engines, planned
    before any of them is built, share the memory for caches. ``ranks`` is as in ``Blueprint``; memory is that of each
    rank. Raises ValueError for impossible options.
    """
    shape, options = model.config, config.options
    device, dtype = _device_and_dtype(model)
    if options.kv_cache_dtype == "fp8":
        check_fp8_cache(device)
        dtype = FP8
    elif options.kv_cache_dtype == "int8":
        _check_int8_cache(model)
        dtype = torch.int8
    per_token = KVCache.bytes_per_token(shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype)
    num_bytes = options.kv_cache_bytes
    if num_bytes is None:
        needed = 4 * (config.max_model_len + config.most_window_rows) * per_token
        # A file can claim any length: without a word from the user it gets a cache in proportion to its weights.
        weights = _weight_bytes(model)
        needed = min(needed, max(_LEAST_CACHE_BYTES, _CACHE_TO_WEIGHTS * weights))
        num_bytes = resolve_options.default_cache_bytes(device, needed, options.gpu_memory_utilization, num_sharing)
    else:
        resolve_options.check_cache_bytes(device, num_bytes)
        num_bytes //= num_sharing
    reason = eager_reason(options.cuda_graphs, device, shape)
    page_size = options.page_size or (PAGE_SIZE if reason is not None else _PAGE_SIZE_ON_KERNELS)
    num_pages = num_bytes // (per_token * page_size)
    if num_pages < 1:
        least = num_sharing * per_token * page_size
        each = " for each model" if num_sharing > 1 else ""
        raise ValueError(f"kv_cache_bytes is {num_sharing * num_bytes}; expected at least {least}, one page{each}")
    _check_deterministic(options.deterministic, model, reason)
    if options.chunk_step_ratio is None:
        captures_chunks = reason is None and options.capture_chunks
        ratio = _CAPTURED_CHUNK_STEP_RATIO if captures_chunks else math.inf
        config = replace(config, options=replace(options, chunk_step_ratio=ratio))
    if reason is None:
        config = replace(config, auto_window_size=min(_WIDE_WINDOW, options.max_num_batched_tokens))
    packed = model if reason is None and isinstance(model, Transformer) else None
    sizes = num_pages, page_size
    if ranks is not None and config.block_length is not None:
        raise ValueError(
            f"tensor_parallel_size is {ranks.size} and this model sees by blocks of {config.block_length}; expected 1"
        )
    adapters = Adapters(_factor_slots(model, options.max_adapters), options.max_adapters, options.max_adapter_rank)
    blueprint = Blueprint(model, packed, shape, dtype, device, config, *sizes, tokenizer, reason, note, adapters, ranks)
    flash = blueprint._find_flash()
    is_slow = bool(note) or (reason is not None and device.type == "cuda") or (flash is not None and bool(flash.fault))
    log.log(logging.WARNING if is_slow else logging.INFO, "engine: %s", blueprint.describe())
    return blueprint


def _factor_slots(model: Transformer | NativeTransformer, count: int) -> FactorSlots:
    return NativeAdapters(model) if isinstance(model, NativeTransformer) else AdapterBank(model, count)


def _check_deterministic(asked: bool, model: Transformer | NativeTransformer, eager: str | None) -> None:
    """Raises ValueError if determinism is requested where sums depend on the number of rows."""
    if not asked or isinstance(model, NativeTransformer):
        return
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    if eager is not None or dtype == "float32":
        why = f"steps run as plain torch operations ({eager})" if eager is not None else f"the dtype is {dtype}"
        raise ValueError(
            f"deterministic is True, but {why}; expected bfloat16, float16 or FP8 on a GPU's kernels, or int8 on a CPU"
        )


def _weight_bytes(model: Transformer | NativeTransformer) -> int:
    if isinstance(model, NativeTransformer):
        return model.num_bytes
    return sum(parameter.nbytes for parameter in model.parameters())


def check_fp8_cache(device: torch.device) -> None:
    """Raises ValueError unless the device can hold keys and values in FP8."""
    if not multiplies_fp8(device):  # who cannot multiply such numbers cannot convert them at once either
        raise ValueError(
            f"kv_cache_dtype is 'fp8' and the device is {device}; expected an NVIDIA GPU that multiplies FP8"
        )


def _check_int8_cache(model: Transformer | NativeTransformer) -> None:
    """Raises ValueError unless the model reads keys and values in int8."""
    if not isinstance(model, NativeTransformer):
        device, dtype = _device_and_dtype(model)
        raise ValueError(
            f"kv_cache_dtype is 'int8' and the model is in {str(dtype).removeprefix('torch.')} on {device}; expected "
            "the native forward of CPUs, which quantization='int8' has"
        )


def _name_of(dtype: torch.dtype) -> str:
    return "fp8" if dtype == FP8 else str(dtype).removeprefix("torch.")


def _device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    """The device of the model, and the type in which it computes."""
    if isinstance(model, NativeTransformer):
        return torch.device("cpu"), torch.float32  # whatever type the weights came in
    weight = model.model.embed_tokens.weight
    return weight.device, weight.dtype


def eager_reason(asked: bool | None, device: torch.device, shape: ModelConfig) -> str | None:
    """Why steps do not run on the Triton kernels as CUDA graphs; None if they do. Raises ValueError if the user asked
    for that and it is impossible."""
    reason = None
    if device.type != "cuda":
        reason = f"the device is {device}"
    elif find_spec("triton") is None:
        reason = "triton is not installed"
    elif (obstacle := block_obstacle(shape)) is not None:
        reason = obstacle
    elif shape.head_dim & (shape.head_dim - 1) or shape.head_dim < 16:
        reason = f"the head dimension is {shape.head_dim}, not a power of two of at least 16"
    if asked and reason is not None:
        raise ValueError(f"cuda_graphs is True, but {reason}; expected a CUDA device, triton and common heads")
    return "cuda_graphs is False" if asked is False and reason is None else reason
