# SPDX-License-Identifier: Apache-2.0
"""Which part of a checkpoint's tensor is read."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """``rows`` and ``columns`` of a whole tensor of that ``shape``; a vector only has rows. ``counts``: whether this
    rank keeps the numbers. The bias of a sum over ranks belongs to one rank, and is zero on the others."""

    shape: tuple[int, ...]
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))
    counts: bool = True

    def of(self, tensor: Tensor) -> Tensor:
        """The part of the whole tensor, or of anything that can be indexed like it."""
        part = tensor[self.rows] if len(self.shape) == 1 else tensor[self.rows, self.columns]
        return part if self.counts else torch.zeros_like(part)


CutByName = Callable[[str], Cut | None]  # None: the tensor is wanted whole


def part_of(tensor: Tensor, cut: Cut | None) -> Tensor:
    """The part of the whole tensor that is wanted."""
    return tensor if cut is None else cut.of(tensor)
