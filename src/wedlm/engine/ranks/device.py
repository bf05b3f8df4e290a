# SPDX-License-Identifier: Apache-2.0
"""Steps on our kernels over several ranks: one CUDA graph on each, with the exchanges between them inside.

Rank 0's graph makes the rows, as on one GPU, and sends them to the others at the start of the forward; all compute
their part; the tokens are chosen from a few numbers a row. On the host the others are told the step's shape, from which
follow the sizes of all that they get, and new pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wedlm.algorithm.sample import SamplingBatch
from wedlm.attention.paged import PagedAttend
from wedlm.engine.execution.device_step import ChunkRows, StepShape
from wedlm.engine.execution.rows import RowChoices, choose_row_tokens
from wedlm.engine.execution.sampling_tensors import BatchFlags, BatchParams
from wedlm.engine.ranks.choice import ChoiceRows, choose_over_ranks, combine
from wedlm.engine.ranks.group import Group
from wedlm.engine.ranks.messages import Kind
from wedlm.engine.ranks.processes import Ranks
from wedlm.engine.ranks.rank import Rank
from wedlm.kernels.attention import PagedRows
from wedlm.kernels.logits import greedy_rows
from wedlm.model.inference.triton_transformer import FusedTransformer

_FLAGS = tuple(BatchFlags.__dataclass_fields__)


def shape_array(shape: StepShape) -> np.ndarray:
    """The shape as a message; ``read_shape`` undoes this."""
    sizes = [shape.num_sequences, shape.num_rows, shape.num_logits, shape.max_rows, shape.num_window_rows]
    flags = [getattr(shape.flags, name) for name in _FLAGS]
    return np.array([*sizes, shape.num_chunks, *flags], dtype=np.int64)


def read_shape(numbers: np.ndarray) -> StepShape:
    sequences, rows, logits, most, window_rows, chunks, *flags = numbers.tolist()
    return StepShape(sequences, rows, logits, most, BatchFlags(*map(bool, flags)), window_rows, chunks)


@dataclass(frozen=True)
class RowsLayout:
    """Which parts of a forward of this shape go to the other ranks: the sizes of its tensors, one after the other, 0
    for a missing one. ``picks``: whether only some rows have logits."""

    shape: StepShape
    has_masked_lora: bool

    @property
    def has_visibility(self) -> bool:
        flags = self.shape.flags
        is_streaming = flags.streaming and not (flags.verified or self.has_masked_lora)
        return self.shape.num_sequences > 0 and flags.groups and not is_streaming

    @property
    def picks(self) -> bool:
        return self.shape.flags.streaming or self.shape.num_chunks > 0

    @property
    def has_masked(self) -> bool:
        flags = self.shape.flags
        return self.has_masked_lora and self.shape.num_sequences > 0 and (flags.streaming or flags.groups)

    @property
    def sizes(self) -> list[int]:
        shape = self.shape
        visible, masked = shape.num_rows * self.has_visibility, shape.num_rows * self.has_masked
        groups = [shape.num_sequences] * 4 + [shape.num_chunks] * 4
        return [shape.num_rows] * 3 + groups + [visible, visible, shape.num_logits * self.picks, masked]


def pack_rows_of(
    tokens: Tensor,
    positions: Tensor,
    attend: PagedAttend,
    rows: Tensor | None,
    masked: Tensor | None,
    layout: RowsLayout,
) -> Tensor:
    """Pack a forward's arguments into one int64 tensor."""
    groups = list(attend.groups)
    of_windows = groups.pop(0) if layout.shape.num_sequences else None
    of_chunks = groups.pop(0) if groups else None
    visibility = (None, None) if of_windows is None else (of_windows.shared, of_windows.own_start)
    parts = [tokens, positions, attend.slots, *_four(of_windows), *_four(of_chunks), *visibility, rows, masked]
    found = [0 if part is None else len(part) for part in parts]
    assert found == layout.sizes, f"the forward has tensors of sizes {found}; its shape says {layout.sizes}"
    return torch.cat([part.long() for part in parts if part is not None])


def _four(group: PagedRows | None) -> list[Tensor | None]:
    return [None] * 4 if group is None else [group.row_start, group.num_rows, group.cached, group.table_row]


class DeviceRank:
    """One rank's share of such steps. ``model`` is its part, on our kernels."""

    def __init__(self, model: FusedTransformer, rank: Rank, mask_token_id: int) -> None:
        self.model, self.rank, self.mask_token_id = model, rank, mask_token_id
        self.group: Group = rank.group
        self.first = rank.shard.vocabulary.start

    def choose(self, logits: Tensor, rows: ChoiceRows) -> RowChoices:
        """Choose one token per row from this rank's logits [L, V of the rank]."""
        if rows.sampling.any_sampled:
            return RowChoices(*choose_over_ranks(self.group, logits.float(), self.first, rows))
        count = torch.arange(len(logits), device=logits.device)
        ends = None
        if rows.stop_tokens.shape[1]:
            banned = rows.eos_banned.long()
            ends = (torch.zeros_like(banned), count, banned, (rows.stop_tokens - self.first).contiguous())
        choice, entropy, logprob = greedy_rows(logits, self.mask_token_id - self.first, ends)
        best = logits.gather(1, choice[:, None])[:, 0].float()
        own = torch.stack((best, (choice + self.first).float(), best - logprob, entropy))
        return RowChoices(*combine(self.group, own, logits, self.first, rows.sampling))


class FirstDeviceRank(DeviceRank):
    """Rank 0's share: called as the model of a ``DeviceStep``, and as ``StepPeers`` of its ``CapturedStep``."""

    def __init__(self, model: FusedTransformer, rank: Rank, mask_token_id: int, ranks: Ranks) -> None:
        super().__init__(model, rank, mask_token_id)
        self.ranks = ranks
        self._shape: StepShape | None = None  # of the step that is being computed or captured

    def announce(self, what: Literal["capture", "run"], shape: StepShape) -> None:
        """Tell the other ranks."""
        self._shape = shape
        self.ranks.tell(Kind.CAPTURE if what == "capture" else Kind.RUN, [shape_array(shape)])

    def add_pages(self, rows: list[int], columns: list[int], pages: list[int]) -> None:
        """Tell the other ranks."""
        self.ranks.tell(Kind.PAGES, [np.array(numbers, dtype=np.int64) for numbers in (rows, columns, pages)])

    @property
    def has_masked_lora(self) -> bool:
        return self.model.has_masked_lora

    @property
    def factors_version(self) -> int:
        return self.model.factors_version

    @property
    def deterministic(self) -> bool:
        return self.model.deterministic

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: PagedAttend,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
        adapters: Tensor | None = None,
    ) -> Tensor:
        """Logits [L, V of this rank]."""
        assert self._shape is not None, "no step was announced"
        assert adapters is None, "ranks have no adapters by name"
        layout = RowsLayout(self._shape, self.has_masked_lora)
        self.group.broadcast(pack_rows_of(tokens, positions, attend, logits_rows, masked, layout))
        return self.model(tokens, positions, attend, logits_rows, masked)

    def choose_rows(
        self, logits: Tensor, params: BatchParams, slot: Tensor, target: Tensor, flags: BatchFlags
    ) -> RowChoices:
        """One token for each row, which belongs to the window at that slot."""
        if flags.truncated:
            self.rank.logits = logits
            whole = self.rank.whole_logits()
            assert whole is not None, "rank 0 gathers"
            return choose_row_tokens(whole.float(), params, slot, target, flags, self.mask_token_id, report="choice")
        rows = ChoiceRows(
            sampling=params.sampling(slot, target, flags),
            stop_tokens=params.stop_tokens[slot][:, : None if flags.eos_banned else 0],
            eos_banned=target < params.min_eos_position[slot],
            mask_token_id=self.mask_token_id,
            wants_entropy=True,
        )
        if flags.sampled or flags.eos_banned:
            self.group.broadcast(_pack_choice(rows))
        return self.choose(logits, rows)


class OtherDeviceRank(DeviceRank):
    """Another rank's step, with the signature of a ``DeviceStep``; it receives its input from rank 0 within
    the step."""

    def __init__(
        self, model: FusedTransformer, rank: Rank, mask_token_id: int, page_table: Tensor, num_stop_tokens: int
    ) -> None:
        super().__init__(model, rank, mask_token_id)
        self.page_table, self.num_stop_tokens = page_table, num_stop_tokens
        self.device = page_table.device

    @torch.inference_mode()
    def __call__(self, shape: StepShape, index: Tensor | None = None, chunks: ChunkRows | None = None) -> Tensor:
        layout = RowsLayout(shape, self.model.has_masked_lora)
        sizes = layout.sizes
        sent = torch.empty(sum(sizes), dtype=torch.long, device=self.device)
        self.group.broadcast(sent)
        tokens, positions, slots, *rest = sent.split(sizes)
        of_windows, of_chunks, (shared, own_start, rows, masked) = rest[:4], rest[4:8], rest[8:]
        cache = self.rank.cache
        max_keys = self.page_table.shape[1] * cache.page_size
        page_size, table = cache.page_size, self.page_table
        groups = []
        if shape.num_sequences:
            first, count, cached, row = of_windows
            groups.append(PagedRows(first, count, cached, row, table, page_size, shape.max_rows, max_keys))
            if layout.has_visibility:
                groups[0] = replace(groups[0], shared=shared, own_start=own_start)
            if shape.num_chunks:
                groups[0] = replace(groups[0], within=shape.num_window_rows)
        if shape.num_chunks:
            first, count, cached, row = of_chunks
            groups.append(PagedRows(first, count, cached, row, table, page_size, shape.num_rows, max_keys))
        logits = self.model(
            tokens,
            positions,
            PagedAttend(cache, groups, slots, self.model.deterministic),
            rows if layout.picks else None,
            masked.bool() if layout.has_masked else None,
        )
        if shape.num_sequences:
            self._choose(logits, shape.flags)
        return sent

    def _choose(self, logits: Tensor, flags: BatchFlags) -> None:
        if flags.truncated:
            self.rank.logits = logits
            self.rank.whole_logits()
            return
        count, stops = len(logits), self.num_stop_tokens if flags.eos_banned else 0
        sent = logits.new_zeros(count * (4 + stops), dtype=torch.long)
        if flags.sampled or flags.eos_banned:
            self.group.broadcast(sent)
        self.choose(logits, _unpack_choice(sent, count, stops, flags.sampled, self.mask_token_id))

    def add_pages(self, rows: Sequence[int], columns: Sequence[int], pages: Sequence[int]) -> None:
        """Enter new pages into the table."""
        numbers = torch.tensor([list(rows), list(columns), list(pages)], device=self.device)
        self.page_table[numbers[0], numbers[1]] = numbers[2]


def _pack_choice(rows: ChoiceRows) -> Tensor:
    sampling = rows.sampling
    bits = sampling.temperature.double().view(torch.long)
    return torch.cat((rows.eos_banned.long(), bits, sampling.seed, sampling.position, rows.stop_tokens.flatten()))


def _unpack_choice(sent: Tensor, count: int, stops: int, sampled: bool, mask_token_id: int) -> ChoiceRows:
    banned, bits, seed, position, stop_tokens = sent.split([count] * 4 + [count * stops])
    none = torch.zeros_like(seed)
    temperature = bits.contiguous().view(torch.double).float()
    sampling = SamplingBatch(temperature, none, none.double(), seed, position, sampled, any_truncated=False)
    return ChoiceRows(sampling, stop_tokens.view(count, stops), banned.bool(), mask_token_id, wants_entropy=True)
