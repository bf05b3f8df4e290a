# SPDX-License-Identifier: Apache-2.0
"""One step of decoding windows and prompt chunks as device code alone: no size depends on data, nothing waits, a CUDA
graph can hold it.

The twin is ``Runner.run``. Whatever a step needs lies in tensors by slot: windows, parameters, pages.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wedlm.algorithm.reorder import pack_rows, topological_order
from wedlm.algorithm.sample import SamplingBatch, ban_tokens, choose_tokens, entropy_and_logsumexp
from wedlm.algorithm.verify import row_layout
from wedlm.algorithm.window import RowResults, WindowState, extend, num_drafts, update_windows
from wedlm.attention.base import KVCache
from wedlm.attention.paged import PagedAttend
from wedlm.engine.execution.sampling_tensors import BatchFlags, BatchParams
from wedlm.kernels.attention import PagedRows
from wedlm.kernels.logits import greedy_rows
from wedlm.kernels.step_output import empty_results
from wedlm.kernels.window_streaming import streaming_rows, update_streaming
from wedlm.kernels.window_verified import update_verified, verified_rows
from wedlm.model.inference.triton_transformer import FusedTransformer


@dataclass(frozen=True)
class StepShape:
    """All that a captured step depends on: S windows with at most so many rows in all and each, L logits; T rows with
    those of chunks. No window: the step has chunks alone."""

    num_sequences: int
    num_rows: int
    num_wanted: int
    max_rows: int
    flags: BatchFlags
    num_window_rows: int
    num_chunks: int = 0

    @classmethod
    def of_windows(
        cls, num_sequences: int, num_rows: int, num_wanted: int, max_rows: int, flags: BatchFlags
    ) -> "StepShape":
        """Of a step without chunks."""
        return cls(num_sequences, num_rows, num_wanted, max_rows, flags, num_rows)


@dataclass(frozen=True)
class ChunkRows:
    """Chunks of N prompts, the last of T rows; the rows before theirs are as padding. On the device, overwritten before
    each step. Chunks without rows start at T, and their pages are nobody's."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    row_start: Tensor
    num_rows: Tensor
    cached: Tensor
    table_row: Tensor

    @classmethod
    def views(cls, numbers: Tensor, num_rows: int, num_chunks: int) -> "ChunkRows":
        """Of int64 [3 T + 4 N], the fields one after the other."""
        return cls(*numbers.split([*[num_rows] * 3, *[num_chunks] * 4]))


@dataclass
class Slots:
    """What persists between steps, by slot; the last slot is nobody's: its window is empty, its page is trash.

    ``row_budget`` and ``max_drafts`` are those of ``params`` as ``limit`` last lowered them.
    """

    state: WindowState
    params: BatchParams
    page_table: Tensor
    row_budget: Tensor
    max_drafts: Tensor

    def limit(self, row_budget: int) -> None:
        """Let auto decoding lay out at most so many rows from the next launch on."""
        limited = self.params.limited(row_budget)
        self.row_budget.copy_(limited.row_budget)
        self.max_drafts.copy_(limited.max_drafts)

    @property
    def nobody(self) -> int:
        return len(self.state.width) - 1


class DeviceStep:
    """``step(shape, index)`` moves the windows at slots ``index`` [S] (padded with ``slots.nobody``) one step on."""

    def __init__(self, model: FusedTransformer, cache: KVCache, slots: Slots, mask_token_id: int) -> None:
        self.model, self.cache, self.slots, self.mask_token_id = model, cache, slots, mask_token_id
        self.trash_slot = cache.keys.shape[1] - cache.page_size  # of the page that no pool hands out
        self._window = replace(slots.params.window, row_budget=slots.row_budget, max_drafts=slots.max_drafts)
        self.max_keys = slots.page_table.shape[1] * cache.page_size

    @torch.inference_mode()
    def __call__(self, shape: StepShape, index: Tensor, chunks: ChunkRows | None = None) -> Tensor:
        """Results as ``wedlm.kernels.step_output`` has them. ``chunks``: N of ``shape.num_chunks`` prompts, beside the
        windows."""
        assert (chunks is not None) == (shape.num_chunks > 0)
        if not shape.num_sequences:
            assert chunks is not None
            return self._chunks(shape, chunks)
        if not shape.flags.streams:
            return self._verified(shape, index, chunks)
        # The kernels know neither windows whose size adapts nor flags of masked rows.
        if shape.flags.verifies or shape.flags.adapts or self.model.has_masked_lora:
            return self._any(shape, index, chunks)
        return self._streaming(shape, index, chunks)

    def _chunks(self, shape: StepShape, chunks: ChunkRows) -> Tensor:
        attend = PagedAttend(self.cache, [self._plan_chunks(shape, chunks)], chunks.slots)
        self.model(chunks.tokens, chunks.positions, attend, chunks.slots[:0])
        results, _ = empty_results(0, self.slots.state.tokens.shape[1], chunks.slots.device)
        return results

    def _plan_chunks(self, shape: StepShape, chunks: ChunkRows) -> PagedRows:
        return PagedRows(
            chunks.row_start, chunks.num_rows, chunks.cached, chunks.table_row, self.slots.page_table,
            self.cache.page_size, shape.num_rows, self.max_keys,
        )  # fmt: skip

    def _forward(
        self, shape: StepShape, tokens: Tensor, positions: Tensor, slots: Tensor, plan: PagedRows,
        wanted: Tensor | None, chunks: ChunkRows | None, masked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of the rows ``wanted`` (None: the first L), those of the chunks having taken the last places.
        ``masked``: flags of masked rows, where the model has factors for them; rows of chunks have none."""
        groups = [plan]
        if chunks is not None:
            row = torch.arange(shape.num_rows, device=tokens.device)
            own = row >= chunks.row_start[0]
            tokens, positions, slots = (
                torch.where(own, theirs, ours)
                for theirs, ours in ((chunks.tokens, tokens), (chunks.positions, positions), (chunks.slots, slots))
            )
            groups = [replace(plan, within=shape.num_window_rows), self._plan_chunks(shape, chunks)]
            wanted = row[: shape.num_wanted] if wanted is None else wanted
        return self.model(tokens, positions, PagedAttend(self.cache, groups, slots), wanted, masked)

    def _verified(self, shape: StepShape, index: Tensor, chunks: ChunkRows | None) -> Tensor:
        slots, page_size = self.slots, self.cache.page_size
        rows = verified_rows(
            slots.state, index, slots.page_table, page_size, shape.num_rows, self.mask_token_id, self.trash_slot
        )
        plan = PagedRows(
            rows.row_start, rows.num_rows, rows.cached, index, slots.page_table, page_size,
            shape.max_rows, self.max_keys,
            rows.shared if shape.flags.groups else None, rows.own_start if shape.flags.groups else None,
        )  # fmt: skip
        masked = rows.shared > 0 if self.model.has_masked_lora and shape.flags.groups else None
        logits = self._forward(shape, rows.tokens, rows.positions, rows.slots, plan, None, chunks, masked)
        last = shape.num_wanted
        chosen = self._choose(logits, index, rows.sequence[:last], rows.target[:last], shape.flags)
        return update_verified(slots.state, self._window, index, rows, *chosen)

    def _streaming(self, shape: StepShape, index: Tensor, chunks: ChunkRows | None) -> Tensor:
        slots, page_size = self.slots, self.cache.page_size
        rows = streaming_rows(
            slots.state, slots.params.window, index, slots.page_table, page_size,
            shape.num_rows, shape.num_wanted, self.mask_token_id, self.trash_slot,
        )  # fmt: skip
        plan = PagedRows(
            rows.row_start, rows.num_rows, rows.cached, index, slots.page_table, page_size,
            shape.max_rows, self.max_keys,
        )  # fmt: skip
        logits = self._forward(shape, rows.tokens, rows.positions, rows.slots, plan, rows.logits_indices, chunks)
        chosen = self._choose(logits, index, rows.sequence, rows.target, shape.flags)
        return update_streaming(slots.state, slots.params.window, index, rows, *chosen)

    def _any(self, shape: StepShape, index: Tensor, chunks: ChunkRows | None) -> Tensor:
        """Streaming and verified windows side by side, in plain tensor operations: the twin of the other two."""
        slots, page_size = self.slots, self.cache.page_size
        params = slots.params.take(index, shape.flags)
        state, run = extend(slots.state.take(index), params.window)
        num_rows = state.width
        drafts = num_drafts(state, params.window)
        packed = pack_rows(num_rows, shape.num_rows)
        sequence = packed.sequence
        column = topological_order(state.filled, state.width)[sequence, packed.row]
        filled = state.filled[sequence, column] & packed.real
        layout = row_layout(state.filled, state.width, params.window.verifies)
        offset, shared, own_start = (
            part[sequence, column].where(packed.real, 0) for part in (layout.offset, layout.shared, layout.own_start)
        )
        tokens = state.tokens[sequence, column].where(filled, self.mask_token_id)
        positions = (state.cached[sequence] + offset).where(packed.real, 0)
        key = (state.cached[sequence] + packed.row).where(packed.real, 0)
        page = slots.page_table[index[sequence], key // page_size]
        key_slots = (page * page_size + key % page_size).where(packed.real, self.trash_slot)
        plan = PagedRows(
            num_rows.cumsum(0) - num_rows, num_rows, state.cached, index, slots.page_table, page_size,
            shape.max_rows, self.max_keys,
            shared if shape.flags.groups else None, own_start if shape.flags.groups else None,
        )  # fmt: skip
        # Streaming reads nothing from a filled row; verification reads all.
        wanted = packed.real & (~filled | params.window.verifies[sequence])
        pick = torch.argsort(~wanted, stable=True)[: shape.num_wanted]
        masked = ~filled & packed.real if self.model.has_masked_lora else None
        logits = self._forward(shape, tokens, positions, key_slots, plan, pick, chunks, masked)
        chosen = self._choose(logits, index, sequence[pick], (positions + filled)[pick], shape.flags)
        # Rows that nobody wanted write to a sequence that does not exist.
        at = (sequence[pick].where(wanted[pick], len(index)), column[pick])
        choice, entropy, logprobs = (
            value.new_zeros(len(index) + 1, state.tokens.shape[1]).index_put_(at, value)[:-1] for value in chosen
        )
        limited = replace(params.window, row_budget=slots.row_budget[index], max_drafts=slots.max_drafts[index])
        state, emitted = update_windows(state, run, RowResults(choice, entropy, logprobs), limited)
        slots.state.put(index, state)
        figures = torch.stack((emitted.count, num_rows, state.cached, drafts), dim=1)
        return torch.cat((figures, emitted.tokens, emitted.logprobs.contiguous().view(torch.long)), dim=1)

    def _choose(
        self, logits: Tensor, index: Tensor, sequence: Tensor, target: Tensor, flags: BatchFlags
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(choice, entropy, log-probability) of each row of logits [L, V], which belongs to slot index[sequence]."""
        params = self.slots.params
        if not flags.sampled and not flags.eos_banned:
            return greedy_rows(logits, self.mask_token_id)
        slot = index[sequence]
        if not flags.sampled:
            return greedy_rows(logits, self.mask_token_id, (target, slot, params.min_eos_position, params.stop_tokens))
        raw = logits.float()
        entropy, logsumexp = entropy_and_logsumexp(raw)
        stop_tokens = params.stop_tokens[slot][:, : None if flags.eos_banned else 0]
        allowed = ban_tokens(raw.clone(), self.mask_token_id, stop_tokens, target < params.min_eos_position[slot])
        sampling = SamplingBatch(
            temperature=params.temperature[slot],
            top_k=params.top_k[slot],
            top_p=params.top_p[slot],
            seed=params.seed[slot],
            position=target,
            any_sampled=True,
            any_truncated=flags.truncated,
        )
        choice = choose_tokens(allowed, sampling)
        return choice, entropy, raw.gather(1, choice[:, None])[:, 0] - logsumexp
