# SPDX-License-Identifier: Apache-2.0
"""Matrices in eight bits with one scale for each output, and safetensors files that hold them.

A matrix NAME [O, C] is stored as int8 values under NAME and float32 scales [O] under NAME_scale; everything else is
stored as in any checkpoint. ``quantization_config`` in ``config.json`` names the format, so that a reader who does not
know it refuses.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wedlm.model.errors import CheckpointError
from wedlm.model.formats.save import write_whole

SCALE = "_scale"
_LARGEST = 127
_CHUNK_ELEMENTS = 2**22  # what is rounded at a time, so that a matrix never stands in float32 as a whole
_SAFETENSORS_TYPES = {torch.int8: "I8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Int8Rows:
    """``values`` [O, C], int8 in -127..127; each row is to be multiplied by its ``scale`` [O] (float32)."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def widened(self) -> Tensor:
        """The matrix [O, C] in float32."""
        return self.values.float() * self.scale[:, None]


def round_rows(weight: Tensor) -> Int8Rows:
    """The matrix [O, C] in eight bits; each row's largest number becomes 127."""
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.float32)
    size = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        exact = weight[rows].detach().float()
        scale[rows] = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        values[rows] = (exact / scale[rows, None]).round().to(torch.int8)
    return Int8Rows(values, scale)


def join_scale(origin: Path, name: str, values: Tensor, scales: Mapping[str, Tensor]) -> Int8Rows:
    """Join a matrix of a file with its scale from ``scales``. Raises CheckpointError if that is missing or does not
    fit."""
    scale = scales.get(name + SCALE)
    if scale is None:
        raise CheckpointError(f"{origin} lacks the tensor {name}{SCALE}, the scales of {name}, which is int8")
    if scale.shape != values.shape[:1] or scale.dtype != torch.float32:
        raise CheckpointError(
            f"{origin}: tensor {name}{SCALE} is {scale.dtype} of shape {list(scale.shape)}; expected torch.float32 "
            f"[{values.shape[0]}], a scale for each row of {name}"
        )
    return Int8Rows(values, scale)


def write_int8(
    path: Path,
    tensors: Iterable[tuple[str, Tensor | Int8Rows]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write safetensors of ``tensors`` with each matrix in eight bits and each vector in ``dtype``, one at a time.

    ``shapes``: of all tensors, by name. The places in the file follow from them before the first tensor is made. The
    file appears complete or not at all.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    places: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        parts = {name: (torch.int8, shape), name + SCALE: (torch.float32, shape[:1])}
        for part, (kind, size) in (parts if len(shape) == 2 else {name: (dtype, shape)}).items():
            places[part], start = end, end
            end += kind.itemsize * torch.Size(size).numel()
            header[part] = {"dtype": _SAFETENSORS_TYPES[kind], "shape": list(size), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    missing = set(places)
    with write_whole(path) as temporary:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            for name, tensor in tensors:
                for part, data in _parts(name, tensor, dtype):
                    file.seek(8 + len(head) + places[part])
                    file.write(data.contiguous().view(torch.uint8).numpy().data)
                    missing.remove(part)
            file.truncate(8 + len(head) + end)
        if missing:
            raise CheckpointError(f"{path} lacks the tensor {min(missing)}")
        temporary.chmod(path.parent.stat().st_mode & 0o666)


def _parts(name: str, tensor: Tensor | Int8Rows, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tensor, Tensor) and tensor.ndim == 1:
        yield name, tensor.to(dtype)
        return
    rows = tensor if isinstance(tensor, Int8Rows) else round_rows(tensor)
    yield name, rows.values
    yield name + SCALE, rows.scale
