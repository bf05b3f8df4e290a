# SPDX-License-Identifier: Apache-2.0
"""Which masked positions to fill (paper section 3.3: entropy threshold with a distance penalty)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def select_fill(
    entropy: Float[Tensor, "S C"],
    masked: Bool[Tensor, "S C"],
    threshold: Float[Tensor, " S"],
    penalty: Float[Tensor, " S"],
    causal: Bool[Tensor, " S"],
) -> Bool[Tensor, "S C"]:
    """Columns to fill: H + λ·d < τ, or the single smallest (leftmost among equals) if there is none.

    d counts columns from the sequence's first masked one, which is filled whatever its entropy where ``causal``.
    τ = -inf fills exactly one. No masked column: none is chosen.
    """
    column = torch.arange(masked.shape[1], device=masked.device)
    first = torch.where(masked, column, masked.shape[1]).amin(dim=1, keepdim=True)
    adjusted = entropy.double() + penalty.double()[:, None] * (column - first)
    # nan (logits that overflowed) counts as least certain: a step must fill something, or decoding would never end.
    adjusted = torch.where(masked, adjusted, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
    adjusted = adjusted.masked_fill(masked & causal[:, None] & (column == first), -torch.inf)
    below = adjusted < threshold.double()[:, None]
    smallest = masked & (adjusted == adjusted.amin(dim=1, keepdim=True))
    leftmost = smallest & (smallest.cumsum(dim=1) == 1)
    return torch.where(below.any(dim=1, keepdim=True), below, leftmost)
