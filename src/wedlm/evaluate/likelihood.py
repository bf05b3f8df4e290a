# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of continuations by the AR head, with every shared token computed once.

A context and all its continuations form one sequence of rows: the context's rows in plain order, then each
continuation's rows, which see the context and themselves (``RowVisibility``). Contexts that begin alike, such as those
with the same few-shot examples, share the pages of their beginning through the engine's prefix cache; contexts are
taken in sorted order, so that they are neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wedlm.attention.base import ExtendBatch, RowVisibility

if TYPE_CHECKING:
    from wedlm.engine.llm import LLM

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of a continuation, neither empty

# Rows of a sequence with its own visibility must fit into one block of the attention backend.
_MAX_TREE_ROWS = 256
# A batch is cut short if the next context could then reuse this many more tokens.
_WORTH_WAITING_FOR = 64


@dataclass(frozen=True)
class Score:
    """The score of one pair. ``logprob``: the continuation's log-probability, in nats. ``greedy``: whether each of its
    tokens is the most probable."""

    logprob: float
    greedy: bool


@dataclass
class LikelihoodStats:
    """The number of rows run, and the number of further rows that scoring every pair separately would have run."""

    num_computed_tokens: int = 0
    num_reused_tokens: int = 0


@dataclass(eq=False)
class _Item:
    """A context, its continuations, and what is known of their scores so far."""

    context: list[int]
    pairs: list[int]
    continuations: list[list[int]]
    name: str
    cached: int = 0
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)


@dataclass
class _Rows:
    """Rows of one sequence for one forward, and what their logits score.

    Row i of a branch sees rows below ``shared[i]`` and those from ``own_start[i]`` to itself. ``wanted``: row, index of
    the continuation, target token.
    """

    pages: list[int]
    start: int
    item: _Item
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    own_start: list[int] = field(default_factory=list)
    wanted: list[tuple[int, int, int]] = field(default_factory=list)

    def add_context(self, start: int) -> None:
        """The context's tokens from ``start``; the last row scores the first token of every continuation."""
        self._add(self.item.context[start:], start, 0, 0)
        last = len(self.tokens) - 1
        self.wanted += [(last, index, tokens[0]) for index, tokens in enumerate(self.item.continuations)]

    def add_branch(self, index: int, num_shared: int) -> None:
        """Add a continuation's tokens except the last, after ``num_shared`` rows of context; each scores the next
        token."""
        tokens, own = self.item.continuations[index], len(self.tokens)
        alone = own == num_shared  # directly after what it sees: plain order, which needs no block of its own
        self._add(tokens[:-1], len(self.item.context), *((0, 0) if alone else (num_shared, own)))
        self.wanted += [(own + i, index, token) for i, token in enumerate(tokens[1:])]

    def _add(self, tokens: list[int], position: int, shared: int, own_start: int) -> None:
        count = len(tokens)
        self.tokens += tokens
        self.positions += range(position, position + count)
        self.shared += [shared] * count
        self.own_start += [own_start] * count


class LikelihoodScorer:
    """Scores pairs with the forward, cache and pages of an idle ``LLM``. ``max_rows`` is the approximate number of rows
    of one forward."""

    def __init__(self, llm: "LLM", max_rows: int | None = None) -> None:
        runner, self.device = llm.engine.runner, llm.device
        self.model, self.plan_attention = runner.eager.model, runner.eager.plan_attention
        self.cache, self.pool = runner.cache, llm.engine.pool
        self.max_length = llm.engine.config.max_model_len
        self.max_rows = max_rows or (512 if self.device.type == "cpu" else 8192)
        self.stats = LikelihoodStats()

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """Yield the index and score of every pair as they become known. Contexts too long for the model lose their
        beginning.

        Raises ValueError for an empty context or continuation, for a pair that does not fit into the key/value cache,
        or for a model without an AR head.
        """
        if self.pool.block_length > 1:
            raise ValueError(
                f"this task compares likelihoods and the model sees by blocks of {self.pool.block_length}; expected a "
                "causal model, whose rows predict the token after them, or a task that generates"
            )
        batch: list[_Item] = []
        rows = 0
        try:
            for item in self._items(pairs):
                if batch and (rows >= self.max_rows or self._could_reuse_more(batch[-1], item)):
                    yield from self._run(batch)
                    rows = 0
                if not self._open(item):
                    yield from self._run(batch)
                    rows = 0
                    if not self._open(item):
                        raise ValueError(
                            f"a context of {len(item.context)} tokens and its continuations do not fit into the "
                            f"key/value cache of {self.pool.num_pages * self.pool.page_size} slots; expected a larger "
                            "kv_cache_bytes"
                        )
                batch.append(item)
                rows += len(item.context) - item.cached + sum(len(c) - 1 for c in item.continuations)
            yield from self._run(batch)
        finally:
            for item in batch:
                self.pool.free(item.name)

    def _items(self, pairs: Sequence[Pair]) -> list[_Item]:
        """Pairs grouped by context, in sorted order."""
        groups: dict[tuple[int, ...], _Item] = {}
        for index, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ValueError(f"pair {index} has an empty context or continuation; expected at least one token each")
            # The last token is never an input, so that the model's length and one more fit.
            room = self.max_length + 1 - len(continuation)
            kept = tuple(context[-room:] if room > 0 else context[-1:])
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"pair {index}'s continuation has {len(continuation)} tokens; expected at most {self.max_length}"
                )
            item = groups.setdefault(kept, _Item(list(kept), [], [], f"likelihood-{index}"))
            item.pairs.append(index)
            item.continuations.append(list(continuation))
        items = [groups[context] for context in sorted(groups)]
        for item in items:
            item.logprobs, item.greedy = [0.0] * len(item.pairs), [True] * len(item.pairs)
        return items

    def _could_reuse_more(self, before: _Item, item: _Item) -> bool:
        """Whether running ``before`` first would save ``item`` many rows that ``before`` has to run anyway."""
        same = 0
        for a, b in zip(before.context, item.context, strict=False):
            if a != b:
                break
            same += 1
        return same - before.cached >= _WORTH_WAITING_FOR

    def _open(self, item: _Item) -> bool:
        """Reserve pages for the item. Returns False, and changes nothing, if there are too few."""
        item.cached = self.pool.allocate(item.name, item.context, len(item.context) - 1)
        widest = max(self._chunk_rows(item, chunk) for chunk in self._chunks(item))
        if self.pool.reserve(item.name, len(item.context) + widest):
            return True
        self.pool.free(item.name)
        return False

    def _chunk_rows(self, item: _Item, chunk: list[int]) -> int:
        return sum(len(item.continuations[index]) - 1 for index in chunk)

    def _chunks(self, item: _Item) -> list[list[int]]:
        """Groups of continuations that have rows and fit together; the first group goes with the context."""
        rest = len(item.context) - item.cached
        chunks: list[list[int]] = [[]]
        rows = rest
        for index, tokens in enumerate(item.continuations):
            if len(tokens) == 1:
                continue
            if rows + len(tokens) - 1 > _MAX_TREE_ROWS:
                chunks.append([])
                rows = 0
            chunks[-1].append(index)
            rows += len(tokens) - 1
        return chunks

    def _run(self, batch: list[_Item]) -> list[tuple[int, Score]]:
        """Score the items, cache their contexts' pages, and empty ``batch``."""
        forwards: list[list[_Rows]] = []  # the n-th has the n-th chunks, whose scratch keys overwrite those before
        for item in batch:
            chunks, pages = self._chunks(item), self.pool.table(item.name)
            for number, chunk in enumerate(chunks):
                start = item.cached if number == 0 else len(item.context)
                rows = _Rows(pages, start, item)
                if number == 0:
                    rows.add_context(item.cached)
                num_shared = len(rows.tokens)
                for index in chunk:
                    rows.add_branch(index, num_shared)
                if number == len(forwards):
                    forwards.append([])
                forwards[number].append(rows)
        for sequences in forwards:
            self._forward(sequences)
        scores = []
        for item in batch:
            alone = [len(item.context) + len(tokens) - 1 for tokens in item.continuations]
            self.stats.num_reused_tokens += sum(alone)  # less what is computed, see _forward
            self.pool.commit(item.name, item.context, len(item.context))
            self.pool.free(item.name)
            for pair, logprob, greedy in zip(item.pairs, item.logprobs, item.greedy, strict=True):
                scores.append((pair, Score(logprob, greedy)))
        batch.clear()
        return scores

    def _forward(self, sequences: list[_Rows]) -> None:
        """Run one forward and add its logits to the scores of the items."""
        tokens = [token for rows in sequences for token in rows.tokens]
        self.stats.num_computed_tokens += len(tokens)
        self.stats.num_reused_tokens -= len(tokens)
        visibility = RowVisibility(
            self._tensor([n for rows in sequences for n in rows.shared]),
            self._tensor([n for rows in sequences for n in rows.own_start]),
        )
        plain = not any(n for rows in sequences for n in rows.own_start)
        batch = ExtendBatch(
            starts=[rows.start for rows in sequences],
            counts=[len(rows.tokens) for rows in sequences],
            pages=[rows.pages for rows in sequences],
            visibility=None if plain else visibility,
        )
        offset, row_of, where, targets, owners = 0, dict[int, int](), [], [], []
        for rows in sequences:
            for row, index, target in rows.wanted:
                packed = offset + row
                where.append(row_of.setdefault(packed, len(row_of)))
                targets.append(target)
                owners.append((rows.item, index))
            offset += len(rows.tokens)
        positions = self._tensor([position for rows in sequences for position in rows.positions])
        attend = self.plan_attention(self.cache, batch)
        logits = self.model(self._tensor(tokens), positions, attend, self._tensor(list(row_of))).float()
        at, target_ids = self._tensor(where), self._tensor(targets)
        logprobs = (logits[at, target_ids] - logits.logsumexp(dim=-1)[at]).tolist()
        greedy = (logits.argmax(dim=-1)[at] == target_ids).tolist()
        for (item, index), logprob, most_probable in zip(owners, logprobs, greedy, strict=True):
            item.logprobs[index] += logprob
            item.greedy[index] &= most_probable

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)
