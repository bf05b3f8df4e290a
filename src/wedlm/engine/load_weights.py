# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint as the model that an engine runs: choose the bits of its weights and what it runs on."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wedlm.engine import resolve_options
from wedlm.engine.factory import block_obstacle, native_obstacle, native_threads, prepare_model
from wedlm.engine.options import EngineOptions
from wedlm.model import ModelConfig, Transformer
from wedlm.model.formats.checkpoint import Checkpoint, load_torch, open_checkpoint
from wedlm.model.formats.fp8_checkpoint import has_fp8
from wedlm.model.formats.resolve import DEMO_ADAPTER_NAME, DEMO_BASE_NAME, DEMO_NAME
from wedlm.model.inference.quantization import multiplies_fp8
from wedlm.model.lora.peft import adapted_config, apply_adapter, read_masked_adapter
from wedlm.model.packed_demo import packed_demo
from wedlm.model.sharding import Shard
from wedlm.native import NativeTransformer
from wedlm.native.weights import native_from_checkpoint, set_masked_lora, unsupported_type

if TYPE_CHECKING:
    from wedlm.engine.ranks.processes import Ranks

# Whether weights of 16 bits run in eight on a CPU with the native forward, unless --quantization says otherwise.
INT8_IS_CPU_DEFAULT = True


@dataclass(frozen=True)
class LoadedWeights:
    """A model for ``plan_engine``, its config, and the options, which may now name the checkpoint's own type.

    ``note`` tells users what was decided against, and why; it is empty if nothing was. ``ranks``: all ranks that
    compute the model, if there are several; ``model`` is then the first rank's part.
    """

    model: Transformer | NativeTransformer
    config: ModelConfig
    options: EngineOptions
    note: str = ""
    ranks: "Ranks | None" = None


def load_weights(path_or_id: str | Path, options: EngineOptions, device: torch.device) -> LoadedWeights:
    """Load the model of a checkpoint, according to ``quantization``, ``dtype`` and ``adapter`` of ``options``.

    A native model has as many threads as torch has at this moment. Raises ValueError.
    """
    if options.adapter == DEMO_ADAPTER_NAME and path_or_id == DEMO_NAME:
        raise ValueError(
            f"adapter is {DEMO_ADAPTER_NAME!r}, made for the model before adaptation, and model is {DEMO_NAME!r}; "
            f"expected {DEMO_BASE_NAME!r}"
        )
    checkpoint = open_checkpoint(path_or_id)
    masked, wanted, note = None, None, ""
    if options.adapter is not None and device.type == "cpu":
        masked = read_masked_adapter(options.adapter, checkpoint.config)
    if options.adapter is None or masked is not None:  # any other adapter is merged, into wide weights
        wanted, note = _native_form(checkpoint, options, device)
    if wanted is not None:
        if checkpoint.deltas:
            checkpoint = packed_demo(checkpoint)
        native = native_from_checkpoint(checkpoint, None if wanted == "file" else wanted, threads=native_threads())
        config = checkpoint.config
        if options.adapter is not None and masked is not None:
            set_masked_lora(native, *masked)
            config = adapted_config(config, options.adapter)
        return LoadedWeights(native, config, options)
    model, config, options = load_transformer(checkpoint, options, device)
    return LoadedWeights(model, config, options, note)


def load_transformer(
    checkpoint: Checkpoint, options: EngineOptions, device: torch.device, shard: Shard | None = None
) -> tuple[Transformer | NativeTransformer, ModelConfig, EngineOptions]:
    """``load_weights`` with torch. With a ``shard`` it loads one rank's part; the config is still the checkpoint's."""
    # A checkpoint in FP8 stays so where it can be multiplied, unless another type is asked for or an adapter
    # changes its weights.
    by_itself = options.quantization == "auto" and options.dtype == "auto" and multiplies_fp8(device)
    keeps_fp8 = options.adapter is None and (by_itself or options.quantization == "fp8")
    dtype = resolve_options.read_dtype(options.dtype, device)
    transformer, config = load_torch(checkpoint, dtype, device, keeps_fp8=keeps_fp8, shard=shard), checkpoint.config
    if has_fp8(transformer):
        options = replace(options, quantization="fp8")
    if options.adapter is not None:
        apply_adapter(transformer, options.adapter, shard)
        config = adapted_config(config, options.adapter)
    return prepare_model(transformer, options.rounded_to, options.quantize_head), config, options


def _native_form(checkpoint: Checkpoint, options: EngineOptions, device: torch.device) -> tuple[str | None, str]:
    """What the native forward loads straight from the checkpoint ("file" or "int8"), or None and the reason if torch
    loads it."""
    asked = options.quantization
    if device.type != "cpu" or asked in ("none", "fp8"):
        return None, ""
    form = _form_of(checkpoint) if asked == "auto" and options.dtype == "auto" else None
    if asked == "int8":
        form = "int8"
    if form is None:
        return None, ""
    obstacle = native_obstacle() or block_obstacle(checkpoint.config)
    if obstacle is None and form == "file" and checkpoint.gguf is not None:
        obstacle = unsupported_type(checkpoint.gguf)
    if obstacle is None:
        return form, ""
    if asked == "int8":
        raise ValueError(f"quantization is 'int8', but {obstacle}; expected none on a CPU where it cannot run")
    return None, f"weights are widened and steps take several times as long, because {obstacle}"


def _form_of(checkpoint: Checkpoint) -> str | None:
    """What ``auto`` does with a checkpoint on a CPU: "file" keeps its bits, "int8" rounds it, and None widens the
    weights."""
    if (checkpoint.gguf is not None and not checkpoint.deltas) or checkpoint.is_int8:
        return "file"
    is_narrow = checkpoint.config.dtype in ("bfloat16", "float16")
    return "int8" if is_narrow and INT8_IS_CPU_DEFAULT else None
