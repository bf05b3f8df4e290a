# SPDX-License-Identifier: Apache-2.0
"""Read a GGUF file (version 2 or 3, little-endian): metadata, and tensors dequantised one at a time.

We parse the header here because the ``gguf`` package's reader takes seconds for a vocabulary of 50,000 tokens; the
package still supplies the block formats and their dequantisation.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from wedlm.model.errors import CheckpointError
from wedlm.model.formats.cut import Cut

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# What messages name; the gguf package reads a few more.
USUAL_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# The longest arrays of strings are the merges of large vocabularies, some 600,000.
_MAX_STRINGS, _MAX_DIMENSIONS, _MAX_ALIGNMENT = 2**21, 4, 2**20
# The least bytes that an entry takes: a key's length, type and value; a name's length, dimensions, type and place.
_KEY_BYTES, _TENSOR_BYTES = 13, 24

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """The place of a tensor: ``shape`` in torch's order, ``ggml_type`` its block format, ``start`` in bytes."""

    shape: tuple[int, ...]
    ggml_type: int
    start: int


class GGUFFile:
    """``metadata`` (key -> number, string, list of strings or array of numbers) and ``tensors`` (name -> place).

    Raises CheckpointError if the file is not GGUF, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            start = file.read(24)
            if len(start) < 24 or not start.startswith(b"GGUF"):
                raise CheckpointError(f"{path} is not a GGUF file: it does not start with the signature")
            # Private, copy on write, because torch refuses read-only arrays; nothing is ever written.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        try:
            self.metadata, self.tensors = _Header(self._bytes).read()
        except (struct.error, UnicodeDecodeError, _MalformedError) as error:
            raise CheckpointError(f"{path} is a truncated or corrupt GGUF file: {error}") from error

    def required(self, key: str, kind: type[_T]) -> _T:
        """The metadata value of ``key``, which must have that type. Raises CheckpointError."""
        value = self.optional(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the metadata key {key}")
        return value

    def optional(self, key: str, kind: type[_T]) -> _T | None:
        """``required``, or None where the key is absent."""
        value = self.metadata.get(key)
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise CheckpointError(f"{self.path}: {key} is a {type(value).__name__}; expected {kind.__name__}")
        return value

    def check_places(self) -> None:
        """Raises CheckpointError unless every tensor lies within the file and overlaps no other."""
        places = sorted((place.start, self._num_bytes(name), name) for name, place in self.tensors.items())
        for (start, size, name), (next_start, _, following) in pairwise(places):
            if start + size > next_start:
                raise CheckpointError(f"{self.path}: the tensors {name} and {following} lie over each other")
        if places and places[-1][0] + places[-1][1] > len(self._bytes):
            raise CheckpointError(f"{self.path} is truncated: tensor {places[-1][2]} ends past the end of the file")

    def _num_bytes(self, name: str) -> int:
        block_elements, block_bytes = self._block(name)
        num_elements = math.prod(self.tensors[name].shape)
        if num_elements % block_elements:
            raise CheckpointError(
                f"{self.path}: tensor {name} has {num_elements} elements; expected a multiple of {block_elements}"
            )
        return num_elements // block_elements * block_bytes

    def _block(self, name: str) -> tuple[int, int]:
        """Elements and bytes of a block of the tensor's type."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = self.tensors[name].ggml_type
        try:
            return GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has an unknown type {kind}; expected one of {', '.join(USUAL_TYPES)}"
            ) from error

    def blocks(self, name: str) -> np.ndarray:
        """Tensor ``name`` as it lies in the file: uint8 [rows, bytes of a row]. Raises CheckpointError."""
        place, num_bytes, (block_elements, _) = self.tensors[name], self._num_bytes(name), self._block(name)
        if place.shape[-1] % block_elements:
            raise CheckpointError(
                f"{self.path}: tensor {name} has rows of {place.shape[-1]}; expected a multiple of {block_elements}"
            )
        if place.start + num_bytes > len(self._bytes):
            raise CheckpointError(f"{self.path} is truncated: tensor {name} ends past the end of the file")
        return self._bytes[place.start : place.start + num_bytes].reshape(math.prod(place.shape[:-1]), -1)

    def release(self) -> None:
        """Give back the memory of the pages that were read, which counts as the process's; they are read again if
        needed. Reading a whole file would otherwise hold it in memory twice."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def type_name(self, name: str) -> str:
        """The block format of tensor ``name``, in GGUF's words. Raises CheckpointError for an unknown one."""
        from gguf import GGMLQuantizationType

        self._block(name)
        return GGMLQuantizationType(self.tensors[name].ggml_type).name

    def tensor(self, name: str, part: Cut | None = None) -> Tensor:
        """Tensor ``name``, dequantised to float32 on the CPU; it may share memory with the mapped file. For a matrix
        only blocks that contain some of ``part`` are read."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        place = self.tensors[name]
        num_bytes, (block_elements, block_bytes) = self._num_bytes(name), self._block(name)
        quantisation = GGMLQuantizationType(place.ggml_type)
        if place.start + num_bytes > len(self._bytes):
            raise CheckpointError(f"{self.path} is truncated: tensor {name} ends past the end of the file")
        if part is None or len(place.shape) == 1:
            data = self._bytes[place.start : place.start + num_bytes]
            # Blocks know nothing of rows, and dequantize works on 16 rows at a time: long rows make it faster.
            rows = next(rows for rows in (256, 64, 1) if num_bytes // block_bytes % rows == 0)
            data = data.reshape(rows, -1)
        else:
            first, stop, _ = part.columns.indices(place.shape[1])
            skipped, end = first // block_elements, -(-stop // block_elements)
            data = self.blocks(name)[part.rows, skipped * block_bytes : end * block_bytes]
        try:
            values = torch.from_numpy(np.asarray(dequantize(data, quantisation), dtype=np.float32))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has the unsupported type {quantisation.name}; expected one of "
                f"{', '.join(USUAL_TYPES)}"
            ) from error
        if part is None:
            return values.reshape(place.shape)
        if len(place.shape) == 1:
            return part.of(values.reshape(place.shape))
        return values[:, first - skipped * block_elements : stop - skipped * block_elements]


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
        self._expect(num_keys * _KEY_BYTES + num_tensors * _TENSOR_BYTES, "its list of keys and tensors")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise _MalformedError(f"the metadata key {key} comes twice")
            metadata[key] = self._value(self._scalar("<I"))
        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in places:
                raise _MalformedError(f"tensor {name} comes twice")
            num_dimensions = self._scalar("<I")
            if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
                raise _MalformedError(f"tensor {name} has {num_dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}")
            dimensions = [self._scalar("<Q") for _ in range(num_dimensions)]
            if not all(dimensions):
                raise _MalformedError(f"tensor {name} has the dimensions {dimensions}; expected each at least 1")
            # GGUF lists the fastest-varying dimension first.
            places[name] = tuple(reversed(dimensions)), self._scalar("<I"), self._scalar("<Q")
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT:
            raise _MalformedError(f"general.alignment is {alignment!r}; expected 1 to {_MAX_ALIGNMENT}")
        data_start = -(-self._at // alignment) * alignment
        return metadata, {name: GGUFTensor(shape, kind, data_start + at) for name, (shape, kind, at) in places.items()}

    def _expect(self, num_bytes: int, what: str) -> None:
        if self._at + num_bytes > len(self._data):
            raise _MalformedError(f"{what} ends past the end of the file")

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        self._expect(length, "a string")
        self._at += length
        return str(self._data[self._at - length : self._at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._scalar("<I"), self._scalar("<Q"))
        if kind not in _SCALARS:
            raise _MalformedError(f"value type {kind} is unknown")
        return self._scalar(_SCALARS[kind])

    def _array(self, element: int, length: int) -> Any:
        """A list of strings, or numbers in the file's own type."""
        if element == _STRING:
            if length > _MAX_STRINGS:
                raise _MalformedError(f"an array has {length} strings; expected at most {_MAX_STRINGS}")
            self._expect(length * 8, "an array")
            return [self._string() for _ in range(length)]
        if element not in _SCALARS:
            raise _MalformedError(f"an array has elements of type {element}; expected numbers or strings")
        size = struct.calcsize(_SCALARS[element])
        self._expect(length * size, "an array")
        start, self._at = self._at, self._at + length * size
        return np.frombuffer(self._data[start : self._at], dtype=np.dtype(_SCALARS[element]))
