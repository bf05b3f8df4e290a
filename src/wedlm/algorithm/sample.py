# SPDX-License-Identifier: Apache-2.0
"""Choose one token per row of logits, reproducibly, whatever else is in the batch."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# splitmix64 (two multipliers, as signed 64-bit) for the key of a row; murmur3's 32-bit finaliser for the tokens in it.
_SPLITMIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_GOLDEN_64 = -0x61C8864680B583EB
_GOLDEN_32, _MURMUR_1, _MURMUR_2 = -0x61C88647, -0x7A143595, -0x3D4D51CB


@dataclass(frozen=True)
class SamplingBatch:
    """Per-row parameters of ``choose_tokens``, L rows.

    The host knows ``any_sampled`` and ``any_truncated``: whether any row has temperature > 0, and whether any of those
    uses top-k or top-p. They skip work for the whole batch and never change a result.
    """

    temperature: Float[Tensor, " L"]
    top_k: Int[Tensor, " L"]
    top_p: Float[Tensor, " L"]
    seed: Int[Tensor, " L"]
    position: Int[Tensor, " L"]
    any_sampled: bool
    any_truncated: bool

    def row(self, index: int) -> "SamplingBatch":
        """One row of the batch."""
        names = ("temperature", "top_k", "top_p", "seed", "position")
        return replace(self, **{name: getattr(self, name)[index : index + 1] for name in names})


def entropy_and_logsumexp(
    logits: Float[Tensor, "L V"],
) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
    """Shannon entropy (nats) of softmax(logits), and log Σ exp(logits): v has log-probability logits[v] minus that.

    Logits of -inf have probability 0 and add nothing.
    """
    logsumexp = torch.logsumexp(logits, dim=-1)
    log_probs = logits - logsumexp[:, None]  # not log Σ - Σ p · logits: a shift of all logits must cost no precision
    probs = torch.exp(log_probs)
    # 0 · (-inf) is nan: the floor is far below any log-probability that counts and is multiplied by exactly 0.
    return -torch.linalg.vecdot(probs, log_probs.clamp_(min=-1e30)).clamp_(max=0.0), logsumexp


def gumbel_noise(
    seed: Int[Tensor, " L"], position: Int[Tensor, " L"], tokens: Int[Tensor, " V"]
) -> Float[Tensor, "L V"]:
    """Standard Gumbel noise, a pure function of (seed, position, token id), so drafting and verifying see the same.

    It comes from a counter-based generator, which has no state to save and does not depend on the batch, the draft
    length or a preemption.
    """
    key = _splitmix(_splitmix(seed + _GOLDEN_64) ^ (position * _GOLDEN_64))
    key_low, key_high = key.to(torch.int32), (key >> 32).to(torch.int32)
    x = tokens.to(torch.int32) * _GOLDEN_32 + key_low[:, None]
    x ^= _shift_right(x, 16)
    x *= _MURMUR_1
    x ^= key_high[:, None]  # between the rounds: two rows are never shifted copies of one stream
    x ^= _shift_right(x, 13)
    x *= _MURMUR_2
    x ^= _shift_right(x, 16)
    # |x| keeps float32's resolution where u is small, which is where the noise is large: 31 bits of tail.
    u = x.float().abs_().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _splitmix(x: Int[Tensor, " L"]) -> Int[Tensor, " L"]:
    for shift, multiplier in zip((30, 27), _SPLITMIX, strict=True):
        x = (x ^ _shift_right(x, shift)) * multiplier
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed integer tensor."""
    width = torch.iinfo(x.dtype).bits
    return (x >> bits) & ((1 << (width - bits)) - 1)


def ban_tokens(
    logits: Float[Tensor, "L V"],
    mask_token_id: int,
    stop_tokens: Int[Tensor, "L E"],
    eos_banned: Bool[Tensor, " L"],
) -> Float[Tensor, "L V"]:
    """Remove the mask token from the logits (no mode ever emits it) and, in rows of ``eos_banned``, their stop tokens.

    ``stop_tokens`` is padded with -1. Works in place, so take the entropy of the raw logits before.
    """
    logits[:, mask_token_id] = -torch.inf
    if stop_tokens.shape[1]:
        ban_stop_tokens(logits, stop_tokens, eos_banned)
    return logits


def ban_stop_tokens(
    logits: Float[Tensor, "L V"], stop_tokens: Int[Tensor, "L E"], eos_banned: Bool[Tensor, " L"]
) -> None:
    """``ban_tokens`` for stop tokens only."""
    banned = (stop_tokens >= 0) & eos_banned[:, None]
    index = stop_tokens.clamp(min=0)
    # Every pad points at token 0, so the write must be a minimum, whose order does not matter.
    value = torch.full(index.shape, torch.inf, dtype=logits.dtype, device=logits.device)
    logits.scatter_reduce_(1, index, value.masked_fill(banned, -torch.inf), "amin")


def choose_tokens(logits: Float[Tensor, "L V"], batch: SamplingBatch) -> Int[Tensor, " L"]:
    """Take the arg max where temperature is 0; elsewhere top-k, then top-p, then temperature, then Gumbel arg max.

    ``top_k`` 0 and ``top_p`` 1 keep everything. Equal logits rank by token id, lowest first.
    """
    best, greedy = logits.max(dim=-1)
    if not batch.any_sampled:
        return greedy
    scores = scores_with_noise(logits, best, batch)
    if batch.any_truncated:
        scores.masked_fill_(~_kept(logits, batch), -torch.inf)
    return torch.where(batch.temperature > 0, scores.argmax(dim=-1), greedy)


def scores_with_noise(
    logits: Float[Tensor, "L V"], best: Float[Tensor, " L"], batch: SamplingBatch, first: int = 0
) -> Float[Tensor, "L V"]:
    """The scores whose arg max sampling takes. The logits belong to the token ids from ``first`` on; ``best`` is each
    row's largest logit of all."""
    scale = torch.where(batch.temperature > 0, batch.temperature, 1.0)
    # Differences to the best, so that a tiny temperature cannot overflow into a tie of infinities.
    scores = (logits - best[:, None]) / scale[:, None]
    tokens = torch.arange(first, first + logits.shape[1], device=logits.device)
    return scores.add_(gumbel_noise(batch.seed, batch.position, tokens))


def _kept(logits: Float[Tensor, "L V"], batch: SamplingBatch) -> Bool[Tensor, "L V"]:
    """The tokens that survive top-k and then top-p. The best token always does."""
    ranked, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    beyond_k = (batch.top_k[:, None] > 0) & (rank >= batch.top_k[:, None])
    probs = torch.softmax(ranked.masked_fill(beyond_k, -torch.inf), dim=-1).double()
    mass_before = probs.cumsum(dim=-1) - probs
    beyond_p = (mass_before >= batch.top_p[:, None].double()) & (batch.top_p[:, None] < 1) & (rank > 0)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, ~(beyond_k | beyond_p))
