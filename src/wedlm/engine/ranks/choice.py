# SPDX-License-Identifier: Apache-2.0
"""Token choice by ranks that each have the logits of a part of the vocabulary. They exchange only a few numbers per
row: their best token and its logit, the logarithm of their sum of e^logit, and their entropy.

The choice equals that of ``choose_tokens`` on whole logits, to the last bit; entropy and log-probability differ only by
rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wedlm.algorithm.sample import SamplingBatch, ban_stop_tokens, entropy_and_logsumexp, scores_with_noise
from wedlm.engine.ranks.group import Group

MOST_EXACT_ID = 2**24  # token ids travel as float32


@dataclass(frozen=True)
class ChoiceRows:
    """L rows whose tokens are chosen without top-k or top-p. ``stop_tokens`` [L, E], padded with -1, are ruled out in
    rows of ``eos_banned`` [L]. ``wants_entropy``: compute entropies and log-probabilities, which are meaningless
    otherwise."""

    sampling: SamplingBatch
    stop_tokens: Tensor
    eos_banned: Tensor
    mask_token_id: int
    wants_entropy: bool


def choose_over_ranks(group: Group, logits: Tensor, first: int, rows: ChoiceRows) -> tuple[Tensor, Tensor, Tensor]:
    """(choice, entropy, log-probability) [L] on every rank. ``logits`` [L, V of the rank] (float32) belong to the token
    ids from ``first`` on, and are changed."""
    entropy = logsumexp = logits.new_zeros(len(logits))
    if rows.wants_entropy:
        entropy, logsumexp = entropy_and_logsumexp(logits)
    size = logits.shape[1]
    if first <= rows.mask_token_id < first + size:
        logits[:, rows.mask_token_id - first] = -torch.inf
    if rows.stop_tokens.shape[1]:
        local = rows.stop_tokens - first
        elsewhere = (rows.stop_tokens < 0) | (local < 0) | (local >= size)
        ban_stop_tokens(logits, local.masked_fill(elsewhere, -1), rows.eos_banned)
    best, index = logits.max(dim=-1)
    return combine(
        group, torch.stack((best, (index + first).float(), logsumexp, entropy)), logits, first, rows.sampling
    )


def combine(
    group: Group, own: Tensor, logits: Tensor, first: int, sampling: SamplingBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine each rank's best allowed logit, its token, log Σ e^logit and entropy, ``own`` [4, L] in float32, for
    ``choose_over_ranks``. ``logits`` exclude what is ruled out."""
    parts = group.gather(own)
    value, choice = _best(parts[:, 0], parts[:, 1])
    logsumexp = torch.logsumexp(parts[:, 2], dim=0)
    share = (parts[:, 2] - logsumexp).exp()
    # Of a rank's entropy H_r and share w_r of the probability: Σ w_r (H_r - log w_r); a share of 0 adds nothing.
    within = (parts[:, 3] + logsumexp - parts[:, 2]).where(share > 0, 0.0)
    entropy = (share * within).sum(dim=0).clamp(min=0.0)
    if sampling.any_sampled:
        scores, index = scores_with_noise(logits, value, sampling, first).max(dim=-1)
        chosen = logits.gather(1, index[:, None])[:, 0]
        parts = group.gather(torch.stack((scores, (index + first).float(), chosen)))
        _, sampled, its_value = _best(*parts.unbind(1))
        is_sampled = sampling.temperature > 0
        choice, value = sampled.where(is_sampled, choice), its_value.where(is_sampled, value)
    return choice.long(), entropy, value - logsumexp


def _best(scores: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """The largest of the ranks' ``scores`` [N, L], the first among equals, and the values at the same places of
    ``others`` [N, L]."""
    best, *rest = scores[0], *(one[0] for one in values)
    for score, *its in zip(scores[1:], *(one[1:] for one in values), strict=True):
        better = score > best
        best, *rest = (new.where(better, old) for new, old in zip((score, *its), (best, *rest), strict=True))
    return best, *rest
