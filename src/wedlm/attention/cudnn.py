# SPDX-License-Identifier: Apache-2.0
"""A prompt's long chunk by cuDNN's attention, through torch: own rows in causal order, and the keys cached before them
without a mask, joined by the logarithms of their softmax's sums.

The twins are ``PagedSdpa`` and our own kernel. cuDNN plans each shape for itself, which takes the host tenths of a
second, and torch keeps the plan. So there are few shapes: numbers of rows are rounded up (nobody reads the rows too
many), and cached keys come in parts of few sizes. What does not fill the smallest part goes with the chunk's own keys,
in causal order, which needs as many more rows; nobody reads those, either.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wedlm.attention.base import KVCache
from wedlm.attention.sdpa import consecutive
from wedlm.kernels.join import join

MIN_ROWS = 1024  # a chunk of fewer rows occupies no large GPU, and our kernel splits its keys
_ROW_STEP = 256  # numbers of rows up to 4,096 are multiples of it
_SMALLEST_PART, _LARGEST_PART = 512, 8192  # keys; powers of two, between which there are parts of half as many more


@dataclass(frozen=True)
class ChunkCut:
    """Shapes of a chunk's calls: ``causal`` rows over as many keys, of which ``early`` cached keys and their rows come
    first; then ``rows`` rows over each of the ``parts`` of the other cached keys, from the first key on."""

    early: int
    causal: int
    rows: int
    parts: tuple[int, ...]


def cut_chunk(start: int, count: int) -> ChunkCut:
    """For ``count`` rows behind ``start`` cached keys."""
    early = start % _SMALLEST_PART
    parts, left = [], start - early
    while left:
        power = 1 << (left.bit_length() - 1)
        parts.append(min(_LARGEST_PART, power * 3 // 2 if power * 3 // 2 <= left else power))
        left -= parts[-1]
    return ChunkCut(early, _rounded(early + count), _rounded(count), tuple(parts))


def _rounded(count: int) -> int:
    """At most an eighth more, from eight steps on."""
    step = max(_ROW_STEP, (1 << (count - 1).bit_length()) // 16)
    return -(-count // step) * step


def takes_chunk(cache: KVCache, count: int) -> bool:
    """Whether a chunk of ``count`` rows in plain causal order is cuDNN's."""
    head_dim = cache.keys.shape[-1]
    fits = cache.keys.dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 128
    return fits and count >= MIN_ROWS and _is_faster(cache.keys.device)


@lru_cache
def _is_faster(device: torch.device) -> bool:
    """Where it was measured: on Hopper."""
    if device.type != "cuda" or not torch.backends.cudnn.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def cudnn_attention(
    q: Float[Tensor, "R H D"], k: Float[Tensor, "N K D"], v: Float[Tensor, "N K D"], causal: bool
) -> tuple[Float[Tensor, "R H D"], Float[Tensor, "H R"]]:
    """The output, and the natural logarithms of the softmax's sums. ``causal``: row i sees keys 0 .. i."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False)
    return out[0].transpose(0, 1), lse.flatten(2)[0]


class LongChunk:
    """Attention of rows ``first_row`` .. ``first_row + count - 1`` of a step, behind ``start`` cached keys of their
    sequence. ``slots``: of all its keys, the rows' own last; on the host."""

    def __init__(self, first_row: int, start: int, count: int, slots: Int[Tensor, " J"], device: torch.device) -> None:
        self.first_row, self.count, self.cut = first_row, count, cut_chunk(start, count)
        others, own = slots[: start - self.cut.early], slots[start - self.cut.early :]
        # A key too many repeats the last: no row before it sees it, and its value is a number.
        own = torch.cat([own, own[-1:].expand(self.cut.causal - len(own))])
        self.own_slots = _on(device, own)
        parts = others.split(self.cut.parts) if self.cut.parts else ()
        self.part_slots = [_on(device, part) for part in parts]

    def __call__(
        self,
        q: Float[Tensor, "T H D"],
        keys: Float[Tensor, "A K D"],
        values: Float[Tensor, "A K D"],
        out: Float[Tensor, "T H D"],
    ) -> None:
        """Write the rows' outputs over one layer's keys and values, those of the rows written already."""
        cut, real = self.cut, slice(self.cut.early, self.cut.early + self.count)
        into = out[self.first_row : self.first_row + self.count]
        rows = self._padded(q[self.first_row : self.first_row + self.count])
        sums, lse = cudnn_attention(rows[: cut.causal], keys[self.own_slots], values[self.own_slots], True)
        sums, lse = sums[real], lse[:, real]
        if not self.part_slots:
            into.copy_(sums)
        rows = rows[cut.early : cut.early + cut.rows]
        for i, slots in enumerate(self.part_slots, 1):
            part, part_lse = cudnn_attention(rows, keys[slots], values[slots], False)
            goal = into if i == len(self.part_slots) else sums
            join(sums, lse, part[: self.count], part_lse[:, : self.count], goal)

    def _padded(self, rows: Tensor) -> Tensor:
        cut = self.cut
        length = max(cut.causal, cut.early + cut.rows)
        if length == self.count:
            return rows
        padded = rows.new_zeros(length, *rows.shape[1:])
        padded[cut.early : cut.early + self.count] = rows
        return padded


def _on(device: torch.device, slots: Tensor) -> slice | Tensor:
    """What reads the slots: nothing is copied where they are consecutive."""
    return consecutive(slots) or slots.to(device)
