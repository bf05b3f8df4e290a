# SPDX-License-Identifier: Apache-2.0
"""Which masked positions to fill: by entropy with a distance penalty (paper section 3.3), or by the probability of
their tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def select_fill(
    uncertainty: Float[Tensor, "S C"],
    masked: Bool[Tensor, "S C"],
    threshold: Float[Tensor, " S"],
    penalty: Float[Tensor, " S"],
    causal: Bool[Tensor, " S"],
    least: Int[Tensor, " S"] | None = None,
) -> Bool[Tensor, "S C"]:
    """The columns to fill: H + λ·d < τ, or the ``least`` smallest (leftmost among equals) if there are fewer.

    H is the ``uncertainty`` in nats, and d counts columns from the sequence's first masked one. ``least`` None means
    one for each sequence; with τ = -inf exactly this many are filled. Where ``causal``, the first masked column is
    filled whatever its H, and the others up to the first masked column, this one included, with H + λ·d >= τ. A window
    without a masked column gets none.
    """
    column = torch.arange(masked.shape[1], device=masked.device)
    first = torch.where(masked, column, masked.shape[1]).amin(dim=1, keepdim=True)
    adjusted = uncertainty.double() + penalty.double()[:, None] * (column - first)
    # nan (logits that overflowed) counts as least certain: a step must fill something, or decoding would never end.
    adjusted = torch.where(masked, adjusted, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
    below = adjusted < threshold.double()[:, None]
    run = masked & (((masked & ~below).cumsum(dim=1) == 0) | (column == first))
    if least is None:
        smallest = masked & (adjusted == adjusted.amin(dim=1, keepdim=True))
        leftmost = smallest & (smallest.cumsum(dim=1) == 1)
        return torch.where(causal[:, None], run, torch.where(below.any(dim=1, keepdim=True), below, leftmost))
    # Masked columns before all others, even those whose uncertainty is not a number.
    finite = adjusted.clamp(max=torch.finfo(adjusted.dtype).max)
    rank = torch.where(masked, finite, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    enough = below.sum(dim=1) >= least
    chosen = torch.where(enough[:, None], below, masked & (rank < least[:, None]))
    return torch.where(causal[:, None], run, chosen)
