# SPDX-License-Identifier: Apache-2.0
"""Self-verified decoding: accept drafts that equal AR's own choices (docs/algorithm.md, "Verified decoding")."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from wedlm.algorithm.reorder import leading_run


def accepted_drafts(
    tokens: Int[Tensor, "S C"], filled: Bool[Tensor, "S C"], choice: Int[Tensor, "S C"]
) -> Int[Tensor, " S"]:
    """a: how many leading drafts equal what AR decoding chooses there.

    Column 0 is the anchor and columns 1..k are drafts (the filled ones); ``choice[:, i]`` of a filled column i is AR's
    token for the position after it.
    """
    return leading_run(filled[:, 1:] & (tokens[:, 1:] == choice[:, :-1]))


def usable_drafts(
    entropy: Float[Tensor, "S C"],
    filled: Bool[Tensor, "S C"],
    inside: Bool[Tensor, "S C"],
    draft_entropy: Float[Tensor, " S"],
) -> Bool[Tensor, "S C"]:
    """Columns whose token may be drafted next: stale drafts, and masked rows with raw entropy below the limit."""
    return inside & (filled | (entropy < draft_entropy[:, None]))
