# SPDX-License-Identifier: Apache-2.0
"""One rank's share of a forward and of the choice that follows, for rank 0 and the others alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.execution.base import PlanAttention, RowsModel
from wedlm.engine.ranks.choice import ChoiceRows, choose_over_ranks
from wedlm.engine.ranks.group import Group
from wedlm.model.sharding import Shard


class Rank:
    """``model`` is this rank's part, connected with the others through ``group``."""

    def __init__(
        self, model: RowsModel[Any], plan_attention: PlanAttention[Any], cache: KVCache, group: Group, shard: Shard
    ) -> None:
        self.model, self.plan_attention, self.cache = model, plan_attention, cache
        self.group, self.shard = group, shard
        self.logits = torch.zeros(0)  # of the latest forward: [L, V of the rank]

    @property
    def device(self) -> torch.device:
        return self.cache.keys.device

    def forward(
        self, tokens: Tensor, positions: Tensor, batch: ExtendBatch | None, rows: Tensor | None, masked: Tensor | None
    ) -> Tensor:
        """Logits [L, V of the rank]. ``batch`` None: plain causal attention among the rows, without the cache."""
        attend = CausalAttend() if batch is None else self.plan_attention(self.cache, batch)
        self.logits = self.model(tokens, positions, attend, rows, masked)
        return self.logits

    def choose(self, rows: ChoiceRows) -> tuple[Tensor, Tensor, Tensor]:
        """Run ``choose_over_ranks`` on the latest forward's logits."""
        return choose_over_ranks(self.group, self.logits.float(), self.shard.vocabulary.start, rows)

    def whole_logits(self) -> Tensor | None:
        """The latest forward's logits [L, V], on rank 0."""
        padded = self.logits
        missing = self.shard.widest_vocabulary - padded.shape[1]
        if missing:
            padded = torch.nn.functional.pad(padded, (0, missing))
        parts = self.group.gather_to_first(padded)
        if parts is None:
            return None
        sizes = [Shard(self.shard.whole, rank, self.shard.size).config.vocab_size for rank in range(self.shard.size)]
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)


NewRank = Callable[[KVCache], Rank]
