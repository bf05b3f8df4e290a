# SPDX-License-Identifier: Apache-2.0
"""Topological reordering (paper section 3.2): observed positions first, then masked ones, and packing into rows."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def leading_run(flags: Bool[Tensor, "S C"]) -> Int[Tensor, " S"]:
    """The number of True columns from the left before the first False."""
    return flags.long().cumprod(dim=1).sum(dim=1)


def topological_order(filled: Bool[Tensor, "S C"], width: Int[Tensor, " S"]) -> Int[Tensor, "S C"]:
    """``order[s, r]`` is the window column that row r of sequence s holds: filled ascending, then masked ascending.

    Columns at or past ``width`` come last; a sequence has ``width`` rows.
    """
    column = torch.arange(filled.shape[1], device=filled.device)
    group = torch.where(column < width[:, None], (~filled).long(), 2)
    return torch.argsort(group, dim=1, stable=True)


@dataclass(frozen=True)
class PackedRows:
    """Rows of several sequences, one after the other, padded at the end to a capacity T.

    ``sequence`` and ``row`` (index within the sequence) describe each packed row. ``real`` is False for padding, whose
    other fields hold some valid index so that they can be gathered with.
    """

    sequence: Int[Tensor, " T"]
    row: Int[Tensor, " T"]
    real: Bool[Tensor, " T"]


def pack_rows(num_rows: Int[Tensor, " S"], capacity: int) -> PackedRows:
    """Pack ``num_rows[s]`` rows of each sequence; ``capacity`` is at least their sum."""
    ends = num_rows.cumsum(dim=0)
    index = torch.arange(capacity, device=num_rows.device)
    sequence = torch.searchsorted(ends, index, right=True).clamp(max=len(num_rows) - 1)
    real = index < ends[-1]
    row = torch.where(real, index - (ends - num_rows)[sequence], 0)
    return PackedRows(sequence, row, real)
