# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of a prompt's own tokens by the AR head, a chunk at a time between the engine's steps.

A chunk holds pages only while it runs. What it computed stays in the prefix cache, where the next chunk, and a request
that continues the prompt, find it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from wedlm.attention.base import ExtendBatch
from wedlm.engine.adapters import UnknownAdapter, key_root_of, slot_of
from wedlm.engine.engine import Engine
from wedlm.engine.execution.rows import with_adapters
from wedlm.engine.request import TopLogprobs

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """For each token of the prompt except the first, which nothing predicts: its log-probability in nats, its rank (1
    is the most probable), and the most probable tokens with theirs."""

    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)


class PromptScorer:
    """Scores one prompt on ``engine``, in the engine's thread. ``num_top``: how many of the most probable tokens to
    report. ``context``: this many tokens at the beginning are not scored; those that are not cached run at once."""

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        num_top: int,
        salt: str = "",
        adapter: str | None = None,
        *,
        context: int = 1,
    ) -> None:
        """Raises ValueError for a prompt that the engine could not run. ``adapter`` is as in ``Engine.add``."""
        config, pool = engine.config, engine.pool
        if config.block_length is not None:
            raise ValueError(
                f"log-probabilities of a prompt are asked for and the model sees by blocks of {config.block_length}; "
                "expected a causal model, whose rows predict the token after them"
            )
        if not 0 < len(prompt) <= config.max_model_len or pool.pages_for(len(prompt)) > pool.num_pages:
            most = min(config.max_model_len, pool.num_pages * pool.page_size)
            raise ValueError(f"the prompt has {len(prompt)} tokens; expected 1 to {most}")
        if any(not 0 <= token < config.vocab_size for token in prompt):
            raise ValueError(
                f"the prompt has an id that is not a token; expected ids from 0 to {config.vocab_size - 1}"
            )
        self._prompt, self._num_top, self._salt, self._context = list(prompt), num_top, salt, context
        self._adapter = None if adapter is None else engine.adapters.get(adapter)
        self.result = PromptLogprobs()

    @property
    def done(self) -> bool:
        return len(self.result.logprobs) == len(self._prompt) - self._context

    @torch.inference_mode()
    def advance(self, engine: Engine) -> bool:
        """Score another chunk. Returns False if there are no pages for it now; there are once nothing else runs. Raises
        UnknownAdapter if its adapter is gone."""
        adapter = self._adapter
        if adapter is not None and not engine.adapters.holds(adapter):
            raise UnknownAdapter(f"adapter is {adapter.name!r}, which was unloaded meanwhile")
        known = self._context - 1 + len(self.result.logprobs)
        end = min(known + _CHUNK, len(self._prompt) - 1)
        name = f"prompt logprobs {id(self)}"
        cached = engine.pool.allocate(name, self._prompt, known, self._salt, key_root_of(adapter))
        try:
            if not engine.pool.reserve(name, end):
                return False
            self._forward(engine, engine.pool.table(name), cached, known, end)
            engine.pool.commit(name, self._prompt, end)
        finally:
            engine.pool.free(name)
        return True

    def _forward(self, engine: Engine, pages: list[int], cached: int, known: int, end: int) -> None:
        """The rows of the tokens from ``cached`` to ``end``; those from ``known`` on predict the next token."""
        eager, cache = engine.runner.eager, engine.runner.cache
        device = cache.keys.device
        batch = ExtendBatch(starts=[cached], counts=[end - cached], pages=[pages], visibility=None)
        tokens = torch.tensor(self._prompt[cached:end], device=device)
        positions = torch.arange(cached, end, device=device)
        rows = torch.arange(known - cached, end - cached, device=device)
        attend = eager.plan_attention(cache, batch)
        slot = slot_of(self._adapter)
        logits = eager.model(
            tokens, positions, attend, rows, *with_adapters(None, [slot], batch.counts, device)
        ).float()
        targets = torch.tensor(self._prompt[known + 1 : end + 1], device=device)
        logprobs = torch.log_softmax(logits, dim=-1)
        own = logprobs.gather(1, targets[:, None])
        self.result.logprobs.extend(own[:, 0].tolist())
        self.result.ranks.extend((1 + (logprobs > own).sum(dim=-1)).tolist())
        best = torch.topk(logprobs, self._num_top, dim=-1) if self._num_top else None
        if best is None:
            self.result.top.extend([] for _ in range(end - known))
        else:
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            self.result.top.extend(list(zip(ids, values, strict=True)) for ids, values in pairs)
