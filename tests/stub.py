# SPDX-License-Identifier: Apache-2.0
"""A model of integers: its logits are an exact function of the set of (token, position) pairs that a row sees.

Attention with equal weights returns the mean of the visible values; times their number it is a sum of small integers,
rounded back exactly. So one wrong key, slot, position or visibility changes the logits, whatever the float order.
"""

import torch
from torch import Tensor, nn

from wedlm.attention.base import KVCache
from wedlm.attention.sdpa import CausalAttend


class BlockAttend:
    """Dense attention in which a row sees all whose block of ``block_length`` positions is its own or earlier."""

    def __init__(self, positions: Tensor, block_length: int) -> None:
        block = positions // block_length
        self.mask = block[None, :] <= block[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        scores = torch.einsum("rhd,jhd->hrj", q, k) / q.shape[2] ** 0.5
        return torch.einsum("hrj,jhd->rhd", scores.masked_fill(~self.mask, -torch.inf).softmax(dim=-1), v)


NUM_FEATURES = 8  # head_dim of the stub: feature 0 marks position 0 and so counts the visible rows


class StubModel(nn.Module):
    """``forward(tokens, positions, attend, logits_rows, masked)`` as the transformer's. ``agreement`` ties masked
    predictions to AR's: the larger, the more drafts are accepted and the lower the entropies. ``period``: of positions;
    with a short one texts repeat themselves. ``block_length``: rows see all of their block; 1: causal."""

    heads = (1, 1, NUM_FEATURES)  # layers, key heads, head dimension
    cache_dtype = torch.float32

    def __init__(
        self,
        vocab_size: int = 13,
        mask_token_id: int = 12,
        agreement: float = 4.0,
        seed: int = 0,
        period: int = 61,
        block_length: int = 1,
    ) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.vocab_size, self.mask_token_id, self.block_length = vocab_size, mask_token_id, block_length
        self.by_position = agreement * torch.randn(period, vocab_size, generator=rng)
        self.by_context = torch.randn(4093, vocab_size, generator=rng) * 2
        self.features = torch.randint(1, 60, (vocab_size, NUM_FEATURES), generator=rng).float()

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Tensor:
        v = self.values(tokens, positions)
        zeros = torch.zeros_like(v)
        mean = attend(0, zeros, zeros, v)[:, 0].double()
        sums = (mean / mean[:, :1]).round().long()[:, 1:]
        context = (sums * torch.tensor([1, 31, 961, 29791, 7, 217, 6727])).sum(-1)
        target = positions + 1
        if masked is not None:
            target[masked] -= 1
        logits = self.by_position[target % len(self.by_position)] + self.by_context[context % 4093]
        return logits if logits_rows is None else logits[logits_rows]

    def values(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the cache must hold for these tokens at these positions: [T, 1, NUM_FEATURES]."""
        v = (self.features[tokens] * (1 + positions[:, None] % 7))[:, None]
        v[..., 0] = (positions == 0)[:, None]
        return v

    @property
    def runs(self) -> "StubModel":
        """What an engine runs: itself."""
        return self

    def check_cache(self, cache: KVCache, slots: list[int], tokens: list[int]) -> None:
        """The slots must hold these tokens' keys."""
        expected = self.values(torch.tensor(tokens, dtype=torch.long), torch.arange(len(tokens)))
        assert torch.equal(cache.values[0, slots], expected)

    def rows_model(self, tokens: list[int], positions: list[int], num_masked: int = 0) -> Tensor:
        """The same model as reference.py wants it."""
        masked = torch.arange(len(tokens))[len(tokens) - num_masked :]
        at = torch.tensor(positions)
        attend = BlockAttend(at, self.block_length) if self.block_length > 1 else CausalAttend()
        return self(torch.tensor(tokens), at, attend, masked=masked)
