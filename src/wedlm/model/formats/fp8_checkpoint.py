# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in FP8 (e4m3): those of compressed-tensors, and those with ``weight_scale_inv`` by blocks, such as
Qwen3-8B-FP8.

A weight [O, C] in e4m3 comes with a scale, ``weight_scale`` or ``weight_scale_inv``, by which it is multiplied: one for
the tensor, one for each output, or one for each block of 128 outputs and 128 inputs. Scales of inputs and of the cache
that a checkpoint records are not used, because inputs are scaled row by row as they come.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wedlm.model.errors import CheckpointError
from wedlm.model.formats.cut import Cut, CutByName

FP8 = torch.float8_e4m3fn
BLOCK = 128
SCALE = "weight_scale"  # the buffer of a linear layer whose weight is still in FP8
_SUFFIXES = (".weight_scale", ".weight_scale_inv")
_UNUSED = (".input_scale", ".k_scale", ".v_scale", ".output_scale")


def check_quantization_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless ``quantization_config`` of a config.json says that weights are in e4m3, in a known
    layout."""
    name = "quantization_config"
    method = config.get("quant_method")
    if method == "fp8":
        block = config.get("weight_block_size")
        if config.get("fmt", "e4m3") != "e4m3":
            raise ValueError(f"{name} fmt is {config['fmt']!r}; expected 'e4m3'")
        if block is not None and block != [BLOCK, BLOCK]:
            raise ValueError(f"{name} weight_block_size is {block!r}; expected [{BLOCK}, {BLOCK}], or none")
        return
    if method != "compressed-tensors":
        raise ValueError(
            f"{name} quant_method is {method!r}; expected 'fp8' or 'compressed-tensors' in FP8, or a checkpoint that "
            "is not quantised"
        )
    groups = config.get("config_groups")
    if config.get("format") != "float-quantized" or not isinstance(groups, Mapping):
        raise ValueError(f"{name} format is {config.get('format')!r}; expected 'float-quantized', which is FP8")
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        kind = None if not isinstance(weights, Mapping) else (weights.get("type"), weights.get("num_bits"))
        if kind != ("float", 8):
            raise ValueError(f"{name} has weights {weights!r}; expected floats of 8 bits")


def is_scale(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to a weight in FP8, and is not one of the model's."""
    return name.endswith(_SUFFIXES)


def is_unused(name: str) -> bool:
    """Whether a checkpoint's tensor is a scale of inputs or of the cache."""
    return name.endswith(_UNUSED)


def with_scales(
    tensors: Iterable[tuple[str, Tensor]], scales: Mapping[str, Tensor], keeps: bool, cut: CutByName | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with weights in FP8 widened to float32. ``keeps``: weights of layers whose outputs have a scale each
    stay in FP8, and that scale [O] (float32) comes right before each, under its module's ``SCALE``. ``scales``: all of
    the checkpoint's, by name. ``cut``: which part of the named weight its tensor is. Raises CheckpointError for a scale
    that is missing, has another shape or is not above 0."""
    used: set[str] = set()
    for name, tensor in tensors:
        if tensor.dtype != FP8:
            yield name, tensor
            continue
        found = [name.removesuffix(".weight") + suffix for suffix in _SUFFIXES]
        found = [one for one in found if one in scales]
        if not found or tensor.ndim != 2:
            raise CheckpointError(
                f"tensor {name} is in FP8 and has no scale; expected {name}_scale or {name}_scale_inv"
            )
        used.add(found[0])
        part = (None if cut is None else cut(name)) or Cut(tuple(tensor.shape))
        scale = _checked_scale(found[0], scales[found[0]], part.shape)
        if scale.ndim == 2:
            rows, columns = (torch.arange(size) // BLOCK for size in part.shape)
            yield name, tensor.float() * scale[rows[part.rows]][:, columns[part.columns]]
        elif keeps and ".layers." in name:
            yield name.removesuffix("weight") + SCALE, scale[part.rows]
            yield name, tensor
        else:
            yield name, widened(tensor, scale[part.rows])
    for name in scales:
        if name not in used:
            raise CheckpointError(f"the tensor {name} belongs to no weight in FP8")


def _checked_scale(name: str, scale: Tensor, shape: Sequence[int]) -> Tensor:
    """The scale in float32: [O], one for each output, or [O / 128, C / 128], rounded up, one for each block."""
    outputs, inputs = shape
    blocks = (-(-outputs // BLOCK), -(-inputs // BLOCK))
    if not scale.is_floating_point() or scale.dtype == FP8:
        raise CheckpointError(f"tensor {name} has dtype {scale.dtype}; expected float32, bfloat16 or float16")
    scale = scale.float()
    if not ((scale > 0) & scale.isfinite()).all():
        raise CheckpointError(f"tensor {name} holds a scale that is not above 0; expected finite positive numbers")
    if scale.numel() == 1:
        return scale.reshape(1).expand(outputs).contiguous()
    if scale.shape in ((outputs,), (outputs, 1)):
        return scale.reshape(outputs)
    if scale.shape != blocks:
        raise CheckpointError(
            f"tensor {name} has shape {list(scale.shape)}; expected one scale, {outputs} (one for each output) or "
            f"{list(blocks)} (one for each block of {BLOCK} x {BLOCK})"
        )
    return scale


def widened(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight [O, C] in float32 that values in e4m3 and the scale [O] of its outputs stand for."""
    return weight.float() * scale[:, None]


def has_fp8(model: nn.Module) -> bool:
    """Whether layers of the model hold weights in FP8, which only ``pack_for_inference`` uses."""
    return any(name.endswith(SCALE) for name, _ in model.named_buffers())
