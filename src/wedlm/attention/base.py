# SPDX-License-Identifier: Apache-2.0
"""The interface between the model and its keys: an ``Attend`` for the rows of one step, planned once.

Everything is an extend step: sequence s has ``starts[s]`` cached keys and brings ``counts[s]`` new rows; row i of it
writes its key to slot starts[s] + i and sees keys 0 .. starts[s] + i. A prompt's chunk, an AR step and a decoding
window are the same thing. There are two exceptions: a verified window hides some of its own rows from others
(``RowVisibility``), and models that see by blocks see to the end of a row's block.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:  # importing it needs Triton
    from wedlm.kernels.fp8 import Unscaled


FP8 = torch.float8_e4m3fn
LARGEST = {FP8: 448.0, torch.int8: 127.0}  # of the types whose numbers have scales


@runtime_checkable  # the tests check annotations when functions are called
class Attend(Protocol):
    """Attention over one forward's rows. Called once per layer, with RoPE applied to queries and keys."""

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "T K D"], v: Float[Tensor, "T K D"]
    ) -> Float[Tensor, "T H D"]: ...


Norms = tuple[Tensor, Tensor, float]  # weights of the query and the key norm, epsilon


class FusedAttend(Protocol):
    """``Attend`` on fused kernels: norm, RoPE, cache and attention of one forward's rows, given their q, k, v product
    [T, (H + 2 K) D] (or partial sums of it, or a product without its scales) and RoPE's cosines and sines [T, D]."""

    def __call__(
        self, layer: int, qkv: "Tensor | Unscaled", cos: Tensor, sin: Tensor, norms: Norms | None, /
    ) -> Float[Tensor, "T H D"]: ...


@dataclass(frozen=True)
class RowVisibility:
    """The new rows of its sequence that each packed row sees: rows j < ``shared``, and ``own_start`` <= j <= itself.
    All rows see all cached keys. (0, 0) is plain causal order."""

    shared: Int[Tensor, " T"]
    own_start: Int[Tensor, " T"]


@dataclass(frozen=True)
class ExtendBatch:
    """Rows of one step, packed sequence by sequence: ``counts[s]`` rows over ``starts[s]`` cached keys in ``pages[s]``.

    ``pages[s]`` lists the pages of sequence s in logical order and covers slots 0 .. starts[s] + counts[s] - 1.
    ``visibility`` None means plain causal order for all rows. ``block_length``: a row sees all existing keys up to the
    end of its own block of this many slots; 1 is causal order.
    """

    starts: list[int]
    counts: list[int]
    pages: list[list[int]]
    visibility: RowVisibility | None = None
    block_length: int = 1


class KVCache:
    """Keys and values of all layers, in pages of ``page_size`` slots; a slot is ``page * page_size + offset``.

    In FP8 (e4m3) and int8 each head of a slot is multiplied by ``key_scale`` or ``value_scale`` [layers, slots, heads]
    (float32), which comes from its own largest number, so nothing has to be known beforehand.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        shape = (num_layers, num_pages * page_size, num_kv_heads, head_dim)
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)
        self.key_scale: Tensor | None = None
        self.value_scale: Tensor | None = None
        if dtype in LARGEST:
            self.key_scale, self.value_scale = (_zeros(shape[:-1], torch.float32, device) for _ in range(2))

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The scales of a layer's keys and values, [slots, heads] each; None means that they have none."""
        if self.key_scale is None or self.value_scale is None:
            return None
        return self.key_scale[layer], self.value_scale[layer]

    def clear(self) -> None:
        """Set everything to zero, as at first."""
        for part in (self.keys, self.values, self.key_scale, self.value_scale):
            if part is not None:
                part.zero_()

    @staticmethod
    def bytes_per_token(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Memory that one slot takes in all layers."""
        scale = 4 if dtype in LARGEST else 0
        return 2 * num_layers * num_kv_heads * (head_dim * dtype.itemsize + scale)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not garbage, because masked keys are multiplied by a weight of exactly 0, and 0 · nan is nan.

    On the CPU they come from numpy, whose zero pages take memory only once they are written; torch writes all of its
    own at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
