# SPDX-License-Identifier: Apache-2.0
"""Self-verified decoding: accept drafts that equal AR's own choices (docs/algorithm.md, "Verified decoding")."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wedlm.algorithm.reorder import leading_run


def accepted_drafts(
    tokens: Int[Tensor, "S C"], filled: Bool[Tensor, "S C"], choice: Int[Tensor, "S C"]
) -> Int[Tensor, " S"]:
    """The number a of leading drafts that equal AR decoding's choices.

    Column 0 is the anchor and columns 1..k are drafts (the filled ones); ``choice[:, i]`` of a filled column i is AR's
    token for the position after it.
    """
    return leading_run(filled[:, 1:] & (tokens[:, 1:] == choice[:, :-1]))


@dataclass(frozen=True)
class RowLayout:
    """Where window rows stand and what they see of each other, by column. When verifying, a window's rows are its
    columns in order; otherwise filled columns come before masked ones.

    ``offset`` is the column's position minus the first one's. A row sees the rows of its step before ``shared``, and
    those from ``own_start`` up to itself; (0, 0) is plain causal order.
    """

    offset: Int[Tensor, "S C"]
    shared: Int[Tensor, "S C"]
    own_start: Int[Tensor, "S C"]


@dataclass(frozen=True)
class _Groups:
    """``width`` - 1 - k masked rows divided among k + 1 groups; if they do not divide evenly, the last groups get one
    more."""

    first: Int[Tensor, " S"]  # column of the first masked row: k + 1
    small: Int[Tensor, " S"]  # groups without the extra row
    size: Int[Tensor, " S"]  # rows of those

    @classmethod
    def of(cls, num_drafts: Int[Tensor, " S"], width: Int[Tensor, " S"]) -> "_Groups":
        groups = num_drafts.clamp(min=0) + 1  # a window of no columns has no anchor either
        masked = (width - groups).clamp(min=0)
        return cls(groups, groups - masked % groups, masked // groups)

    def start(self, group: Int[Tensor, "S C"]) -> Int[Tensor, "S C"]:
        """Column at which each group begins."""
        extra = (group - self.small[:, None]).clamp(min=0)
        return self.first[:, None] + group * self.size[:, None] + extra

    def of_column(self, column: Int[Tensor, " C"]) -> Int[Tensor, "S C"]:
        """The group of a masked column; meaningless where the column is not masked."""
        place = (column - self.first[:, None]).clamp(min=0)
        in_small = self.small * self.size
        after = (place - in_small[:, None]).clamp(min=0)
        group = place // self.size[:, None].clamp(min=1)
        return torch.where(place < in_small[:, None], group, self.small[:, None] + after // (self.size[:, None] + 1))


def row_layout(filled: Bool[Tensor, "S C"], width: Int[Tensor, " S"], is_verified: Bool[Tensor, " S"]) -> RowLayout:
    """The layout of each window. When verifying: the anchor and k drafts, then for each i in 0..k a group of masked
    rows at the positions after i accepted drafts, which sees the anchor, those i drafts and itself."""
    column = torch.arange(filled.shape[1], device=filled.device)
    groups = _Groups.of(filled.sum(dim=1) - 1, width)
    group = groups.of_column(column)
    start = groups.start(group)
    grouped = is_verified[:, None] & ~filled & (column < width[:, None])
    return RowLayout(
        offset=torch.where(grouped, column - start + group + 1, column),
        shared=torch.where(grouped, group + 1, 0),
        own_start=torch.where(grouped, start, 0),
    )


def next_drafts(
    choice: Int[Tensor, "S C"],
    entropy: Float[Tensor, "S C"],
    filled: Bool[Tensor, "S C"],
    width: Int[Tensor, " S"],
    accepted: Int[Tensor, " S"],
    draft_entropy: Float[Tensor, " S"],
) -> tuple[Int[Tensor, "S C"], Int[Tensor, " S"]]:
    """(tokens, count): what the group that foresaw ``accepted`` drafts predicts after AR's token, from column 1 on, for
    as long as its entropies stay below the limit. Column 0 holds the group's guess at AR's token itself."""
    groups = _Groups.of(filled.sum(dim=1) - 1, width)
    start = groups.start(accepted[:, None])
    end = groups.start(accepted[:, None] + 1)
    source = start + torch.arange(choice.shape[1], device=choice.device)
    inside = source < end
    source = torch.where(inside, source, 0)
    sure = inside & (entropy.gather(1, source) < draft_entropy[:, None])
    return choice.gather(1, source), leading_run(sure[:, 1:])


def verified_width(
    num_drafts: Int[Tensor, " S"], row_budget: Int[Tensor, " S"], max_drafts: Int[Tensor, " S"], room: Int[Tensor, " S"]
) -> Int[Tensor, " S"]:
    """``DecodeParams.width`` for verified windows."""
    groups = num_drafts + 1
    masked = torch.where(max_drafts > 0, groups * (max_drafts + 1), 0)
    masked = torch.minimum(torch.minimum(row_budget, room) - groups, masked)
    return torch.minimum(groups + torch.where(masked > groups, masked, 0), room).clamp(min=0)
