# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism, applied from outside to the one model, whose parameters are then one rank's part
(``sharding.py``).

A rank's layer computes its own heads and its own part of the feed-forward; the result of each is summed over the ranks.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wedlm.model.layers import DecoderLayer
from wedlm.model.sharding import Shard
from wedlm.model.transformer import Transformer


class SumOverRanks(Protocol):
    """All ranks call it alike, in the same order."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x`` [T, ...], the same bits on each; x may be changed."""
        ...

    def parts(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``sum``, or parts that still have to be added up over the first dimension: [N, T, C]. ``x`` is [T, C] in
        ``dtype``, or float32 partial sums [P, T, C]."""
        ...


def connect_ranks(model: Transformer, shard: Shard, ranks: SumOverRanks) -> None:
    """Connect the model of one rank, packed or not, with the others: after attention, after the feed-forward and after
    the embedding it adds up the results of all ranks. Its logits [L, V of the rank] are those of its own tokens."""
    model.model.embed_tokens = ShardedEmbedding(model.model.embed_tokens, shard, ranks)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(lambda _module, _inputs, out: ranks.sum(out))


class ShardedEmbedding(nn.Module):
    """The embedding of all tokens, of which this rank has the rows ``shard.vocabulary``."""

    def __init__(self, embedding: nn.Embedding, shard: Shard, ranks: SumOverRanks) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.first, self.ranks = shard.vocabulary.start, ranks

    def local(self, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        """(rows of ``weight``, 0 for what another rank has; which tokens [T, 1] another rank has)."""
        rows_T = tokens_T - self.first
        elsewhere_T = (rows_T < 0) | (rows_T >= len(self.weight))
        return rows_T.masked_fill(elsewhere_T, 0), elsewhere_T[:, None]

    def forward(self, tokens_T: Tensor) -> Tensor:
        rows_T, elsewhere = self.local(tokens_T)
        return self.ranks.sum(F.embedding(rows_T, self.weight).masked_fill_(elsewhere, 0.0))
