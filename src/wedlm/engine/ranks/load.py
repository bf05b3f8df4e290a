# SPDX-License-Identifier: Apache-2.0
"""Each rank loads its share of a checkpoint itself."""

from dataclasses import dataclass
from pathlib import Path

import torch

from wedlm.attention.base import KVCache
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine import resolve_options
from wedlm.engine.load_weights import load_transformer
from wedlm.engine.options import EngineOptions
from wedlm.engine.random_model import random_model
from wedlm.engine.ranks.cache_size import CacheSize
from wedlm.engine.ranks.choice import MOST_EXACT_ID
from wedlm.engine.ranks.group import Group
from wedlm.engine.ranks.rank import Rank
from wedlm.model import ModelConfig, Transformer
from wedlm.model.formats.checkpoint import open_checkpoint
from wedlm.model.inference.tensor_parallel import connect_ranks
from wedlm.model.sharding import Shard


@dataclass(frozen=True)
class LoadedShard:
    """One rank's part of a model, which computes with the others through ``group`` once that is connected.

    ``config`` is the whole model's; ``options`` may now name the checkpoint's own type.
    """

    model: Transformer
    shard: Shard
    config: ModelConfig
    options: EngineOptions
    group: Group

    @property
    def num_bytes(self) -> int:
        """The bytes of its weights."""
        return sum(parameter.nbytes for parameter in self.model.parameters())


def random_shard(config: ModelConfig, options: EngineOptions, device: torch.device, group: Group) -> LoadedShard:
    """A shard of a model of random weights, for measurements. Raises ValueError."""
    shard = Shard(config, group.rank, group.size)
    dtype = resolve_options.read_dtype(options.dtype, device) or torch.bfloat16
    model = random_model(shard.config, device, dtype, options.rounded_to, options.quantize_head)
    assert isinstance(model, Transformer), "ranks never have integers"
    return _connected(model, shard, config, options, group)


def load_shard(path_or_id: str | Path, options: EngineOptions, device: torch.device, group: Group) -> LoadedShard:
    """Load this rank's shard. Raises ValueError, also for a model that cannot be divided."""
    checkpoint = open_checkpoint(path_or_id)
    shard = Shard(checkpoint.config, group.rank, group.size)
    if checkpoint.config.vocab_size > MOST_EXACT_ID:
        raise ValueError(f"vocab_size is {checkpoint.config.vocab_size}; expected at most {MOST_EXACT_ID} with ranks")
    model, config, options = load_transformer(checkpoint, options, device, shard)
    assert isinstance(model, Transformer), "ranks never have integers"
    return _connected(model, shard, config, options, group)


def _connected(
    model: Transformer, shard: Shard, config: ModelConfig, options: EngineOptions, group: Group
) -> LoadedShard:
    group.rows_of = config.hidden_size, model.model.embed_tokens.weight.dtype
    connect_ranks(model, shard, group)
    return LoadedShard(model, shard, config, options, group)


def new_rank(loaded: LoadedShard, size: CacheSize) -> Rank:
    """A rank with an empty cache, on plain torch operations."""
    shape = loaded.shard.config
    device = loaded.model.model.embed_tokens.weight.device
    cache = KVCache(
        shape.num_layers, size.num_pages, size.page_size, shape.num_kv_heads, shape.head_dim, size.dtype, device
    )
    return Rank(loaded.model, PagedSdpa, cache, loaded.group, loaded.shard)
