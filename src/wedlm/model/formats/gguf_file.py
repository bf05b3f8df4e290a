# SPDX-License-Identifier: Apache-2.0
"""Reading a GGUF file (version 2 or 3, little-endian): metadata, and tensors dequantised one at a time.

The header is parsed here because the ``gguf`` package's reader takes seconds for a vocabulary of 50,000 tokens; the
package still supplies the block formats and their dequantisation.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wedlm.model.errors import CheckpointError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies: ``shape`` in torch's order, ``ggml_type`` its block format, ``start`` in bytes."""

    shape: tuple[int, ...]
    ggml_type: int
    start: int


class GGUFFile:
    """``metadata`` (key -> number, string or list) and ``tensors`` (name -> place) of one file.

    Raises CheckpointError if the file is not GGUF, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            start = file.read(24)
        if len(start) < 24 or not start.startswith(b"GGUF"):
            raise CheckpointError(f"{path} is no GGUF file: it does not start with its signature")
        # Mode c (private, copy on write) because torch refuses read-only arrays; nothing is ever written.
        self._bytes = np.memmap(path, dtype=np.uint8, mode="c").view(np.ndarray)
        try:
            self.metadata, self.tensors = _Header(self._bytes).read()
        except (struct.error, UnicodeDecodeError, _MalformedError) as error:
            raise CheckpointError(f"{path} is a truncated or corrupt GGUF file: {error}") from error

    def required(self, key: str) -> Any:
        """The metadata value of ``key``."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path} lacks the metadata key {key}")
        return self.metadata[key]

    def tensor(self, name: str) -> Tensor:
        """Tensor ``name``, dequantised to float32 on the CPU; it may share memory with the mapped file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        place = self.tensors[name]
        try:
            quantisation = GGMLQuantizationType(place.ggml_type)
            block_elements, block_bytes = GGML_QUANT_SIZES[quantisation]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path}: tensor {name} has an unknown type {place.ggml_type}") from error
        num_bytes = math.prod(place.shape) // block_elements * block_bytes
        if place.start + num_bytes > len(self._bytes):
            raise CheckpointError(f"{self.path} is truncated: tensor {name} ends past the end of the file")
        data = self._bytes[place.start : place.start + num_bytes]
        # Blocks know nothing of rows, and dequantize works on 16 rows at a time: long rows make it faster.
        rows = next(rows for rows in (256, 64, 1) if num_bytes // block_bytes % rows == 0)
        try:
            values = dequantize(data.reshape(rows, -1), quantisation)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: tensor {name} has the unsupported type {quantisation.name}") from error
        return torch.from_numpy(np.asarray(values, dtype=np.float32)).reshape(place.shape)


class _MalformedError(Exception):
    pass


class _Header:
    """A cursor over the file's bytes; any read past the end raises."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = memoryview(data.data)
        self._at = 4

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise _MalformedError(f"version is {version}; expected 2 or 3")
        num_tensors, num_keys = self._scalar("<Q"), self._scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"))
        places = []
        for _ in range(num_tensors):
            name = self._string()
            dimensions = [self._scalar("<Q") for _ in range(self._scalar("<I"))]
            # GGUF lists the fastest-varying dimension first.
            places.append((name, tuple(reversed(dimensions)), self._scalar("<I"), self._scalar("<Q")))
        alignment = metadata.get("general.alignment", 32)
        data_start = -(-self._at // alignment) * alignment
        return metadata, {name: GGUFTensor(shape, kind, data_start + start) for name, shape, kind, start in places}

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        if self._at + length > len(self._data):
            raise _MalformedError("a string ends past the end of the file")
        self._at += length
        return str(self._data[self._at - length : self._at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, length = self._scalar("<I"), self._scalar("<Q")
            if length > len(self._data):
                raise _MalformedError("an array ends past the end of the file")
            return [self._value(element) for _ in range(length)]
        if kind not in _SCALARS:
            raise _MalformedError(f"value type {kind} is unknown")
        return self._scalar(_SCALARS[kind])
