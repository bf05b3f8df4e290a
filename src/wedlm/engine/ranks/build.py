# SPDX-License-Identifier: Apache-2.0
"""What runs the steps of an engine over several ranks: rank 0's runner, and what the others obey with."""

from functools import partial
from typing import Any

from wedlm.attention.base import KVCache
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine.execution.base import RowsModel
from wedlm.engine.execution.eager_step import EagerStep
from wedlm.engine.execution.runner import Runner
from wedlm.engine.execution.windows import Windows
from wedlm.engine.options import EngineConfig
from wedlm.engine.ranks.cache_size import CacheSize, cache_arrays
from wedlm.engine.ranks.first_rank import FirstRank
from wedlm.engine.ranks.messages import Kind
from wedlm.engine.ranks.processes import Ranks
from wedlm.engine.ranks.rank import Rank
from wedlm.model import Transformer


def tell_cache(ranks: Ranks, cache: KVCache, config: EngineConfig, on_kernels: bool) -> None:
    """Tell the other ranks to make a cache like this one, in place of the one they had."""
    size = CacheSize(
        num_pages=cache.keys.shape[1] // cache.page_size,
        page_size=cache.page_size,
        dtype=cache.keys.dtype,
        on_kernels=on_kernels,
        num_slots=config.options.max_num_seqs + 1,  # with the null slot
        max_model_len=config.max_model_len,
        mask_token_id=config.mask_token_id,
    )
    with ranks.together(Kind.CACHE, cache_arrays(size)):
        pass


def first_runner(
    ranks: Ranks, cache: KVCache, model: RowsModel[Any], packed: Transformer | None, config: EngineConfig
) -> Runner:
    """Rank 0's, on our kernels if there is a ``packed`` model."""
    mask, options, device = config.mask_token_id, config.options, cache.keys.device
    if packed is None:
        windows = Windows(options.max_num_seqs, device)
        first = FirstRank(Rank(model, PagedSdpa, cache, ranks.group, ranks.shard), ranks)
        return Runner(windows, _eager(first, cache, windows, mask))
    from wedlm.attention.paged import plan_paged  # these import triton
    from wedlm.engine.ranks.device import FirstDeviceRank
    from wedlm.engine.ranks.watched_step import WatchedStep
    from wedlm.model.inference.triton_transformer import FusedTransformer

    windows = Windows(options.max_num_seqs, device, capacity=64, has_null_slot=True)
    fused = FusedTransformer(packed, deterministic=options.deterministic)
    rank = Rank(fused, partial(plan_paged, fixed=options.deterministic), cache, ranks.group, ranks.shard)
    peers = FirstDeviceRank(fused, rank, mask, ranks)
    captured = WatchedStep(peers, cache, windows, mask, config.max_model_len, options.capture_chunks, peers)
    captured.ranks = ranks
    ranks.group.captured.add(captured.graphs)
    return Runner(windows, _eager(FirstRank(rank, ranks), cache, windows, mask), [captured])


def _eager(first: FirstRank, cache: KVCache, windows: Windows, mask_token_id: int) -> EagerStep[Any]:
    return EagerStep(
        first, first.plan, cache, windows, mask_token_id, local_model=first.local_logits, choose=first.choose
    )
