# SPDX-License-Identifier: Apache-2.0
"""One step of decoding windows and prompt chunks as device code alone: no size depends on data and nothing waits, so a
CUDA graph can hold it.

The twin is ``EagerStep``. Everything that a step needs lies in tensors by request slot: windows, parameters, pages.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.window import extend, num_drafts, update_windows
from wedlm.attention.base import KVCache
from wedlm.attention.paged import PagedAttend
from wedlm.engine.execution.rows import RowChoices, choose_row_tokens, window_rows
from wedlm.engine.execution.sampling_tensors import BatchFlags, BatchParams
from wedlm.engine.execution.windows import Windows
from wedlm.kernels.attention import PagedRows
from wedlm.kernels.logits import greedy_rows
from wedlm.kernels.step_output import empty_results
from wedlm.kernels.window_streaming import streaming_rows, update_streaming
from wedlm.kernels.window_verified import VerifiedRows, update_verified, verified_rows


@dataclass(frozen=True)
class StepShape:
    """Everything that a captured step depends on: S windows, with upper bounds on their rows in all
    (``num_window_rows``), on the rows of each (``max_rows``) and on their logits; T rows in all, including those of
    chunks. Without windows a step has only chunks."""

    num_sequences: int
    num_rows: int
    num_logits: int
    max_rows: int
    flags: BatchFlags
    num_window_rows: int
    num_chunks: int = 0
    has_adapters: bool = False  # of some row

    @classmethod
    def of_windows(
        cls, num_sequences: int, num_rows: int, num_logits: int, max_rows: int, flags: BatchFlags
    ) -> "StepShape":
        """The shape of a step without chunks."""
        return cls(num_sequences, num_rows, num_logits, max_rows, flags, num_rows)


@dataclass(frozen=True)
class ChunkRows:
    """Chunks of N prompts, which are the last of T rows; the rows before theirs count as padding. They lie on the
    device and are overwritten before each step. Chunks without rows start at T and belong to the null slot."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    adapters: Tensor
    row_start: Tensor
    num_rows: Tensor
    cached: Tensor
    table_row: Tensor

    @classmethod
    def views(cls, numbers: Tensor, num_rows: int, num_chunks: int) -> "ChunkRows":
        """Views into int64 [4 T + 4 N], the fields one after the other."""
        return cls(*numbers.split([*[num_rows] * 4, *[num_chunks] * 4]))


class DeviceTables:
    """The tables that stay on the device between steps, by request slot: parameters, pages, adapter slots, row limits.

    The windows' null slot has an empty window, and its pages belong to no request. ``row_budget`` and ``max_drafts``
    are those of ``params``, as ``limit`` last lowered them.
    """

    def __init__(self, windows: Windows, num_pages: int, num_stop_tokens: int) -> None:
        num_slots = len(windows.state.width)
        params = BatchParams.stack([DecodeParams("autoregressive")] * num_slots, windows.device, num_stop_tokens)
        self.params = replace(params, flags=replace(params.flags, adaptive=True))
        self.page_table = torch.zeros(num_slots, num_pages, dtype=torch.long, device=windows.device)
        self.adapter = torch.zeros(num_slots, dtype=torch.long, device=windows.device)
        self.row_budget, self.max_drafts = params.window.row_budget.clone(), params.window.max_drafts.clone()

    def limit(self, row_budget: int, max_drafts: int) -> None:
        """Limit adaptive windows to ``row_budget`` rows and ``max_drafts`` drafts from the next launch on."""
        limited = self.params.limited(row_budget, max_drafts)
        self.row_budget.copy_(limited.row_budget)
        self.max_drafts.copy_(limited.max_drafts)


class DeviceModel(Protocol):
    """A ``FusedTransformer``, or one rank's part of it."""

    @property
    def has_masked_lora(self) -> bool: ...

    @property
    def deterministic(self) -> bool: ...

    @property
    def factors_version(self) -> int: ...

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: PagedAttend,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
        adapters: Tensor | None = None,
        /,
    ) -> Tensor: ...


# (logits, parameters by slot, slot [L], target [L], flags) -> one token a row
ChooseRows = Callable[[Tensor, BatchParams, Tensor, Tensor, BatchFlags], RowChoices]


class DeviceStep:
    """``step(shape, index)`` advances the windows at slots ``index`` [S] (padded with the null slot) by one step.

    ``choose_rows`` chooses the tokens if ranks share the model, whose logits then cover a part of the vocabulary.

    ``force_choice`` is for benchmarks: it replaces the tokens [T] chosen for the rows of verified windows.
    """

    def __init__(
        self,
        model: DeviceModel,
        cache: KVCache,
        windows: Windows,
        tables: DeviceTables,
        mask_token_id: int,
        choose_rows: ChooseRows | None = None,
    ) -> None:
        self.model, self.cache, self.mask_token_id = model, cache, mask_token_id
        self._choose_rows = choose_rows
        self.device = windows.device
        self.windows, self.tables = windows, tables
        self.force_choice: Callable[[VerifiedRows, Tensor], Tensor] | None = None
        self.trash_slot = cache.keys.shape[1] - cache.page_size  # of the page that no pool hands out
        self._window = replace(tables.params.window, row_budget=tables.row_budget, max_drafts=tables.max_drafts)
        self.max_keys = tables.page_table.shape[1] * cache.page_size

    @torch.inference_mode()
    def __call__(self, shape: StepShape, index: Tensor, chunks: ChunkRows | None = None) -> Tensor:
        """Run the step; results are laid out as in ``wedlm.kernels.step_output``. ``chunks``: the N of
        ``shape.num_chunks`` prompts, next to the windows."""
        assert (chunks is not None) == (shape.num_chunks > 0)
        if not shape.num_sequences:
            assert chunks is not None
            return self._chunks(shape, chunks)
        if not shape.flags.streaming:
            return self._verified(shape, index, chunks)
        # The kernels know no flags of masked rows and no sequence of each, and fill by entropy alone.
        special = shape.flags.by_confidence or shape.has_adapters
        if shape.flags.verified or special or self.model.has_masked_lora:
            return self._any(shape, index, chunks)
        return self._streaming(shape, index, chunks)

    def _chunks(self, shape: StepShape, chunks: ChunkRows) -> Tensor:
        attend = self._attend([self._plan_chunks(shape, chunks)], chunks.slots)
        adapters = chunks.adapters if shape.has_adapters else None
        self.model(chunks.tokens, chunks.positions, attend, chunks.slots[:0], None, adapters)
        results, _ = empty_results(0, self.windows.state.tokens.shape[1], chunks.slots.device)
        return results

    def _plan_chunks(self, shape: StepShape, chunks: ChunkRows) -> PagedRows:
        return PagedRows(
            chunks.row_start, chunks.num_rows, chunks.cached, chunks.table_row, self.tables.page_table,
            self.cache.page_size, shape.num_rows, self.max_keys,
        )  # fmt: skip

    def _forward(
        self, shape: StepShape, tokens: Tensor, positions: Tensor, slots: Tensor, plan: PagedRows,
        logits_indices: Tensor | None, chunks: ChunkRows | None, kinds: tuple[Tensor | None, ...] = (None, None),
    ) -> Tensor:  # fmt: skip
        """Logits of the rows ``logits_indices`` (None: the first L); the chunks' rows take the last places. ``kinds``:
        flags of masked rows, if some factors are for them, and the slots of the adapters of windows' rows, if there are
        any."""
        groups = [plan]
        masked, adapters = kinds
        if chunks is not None:
            row = torch.arange(shape.num_rows, device=tokens.device)
            own = row >= chunks.row_start[0]
            tokens, positions, slots = (
                torch.where(own, theirs, ours)
                for theirs, ours in ((chunks.tokens, tokens), (chunks.positions, positions), (chunks.slots, slots))
            )
            if adapters is not None:
                adapters = torch.where(own, chunks.adapters, adapters)
            groups = [replace(plan, within=shape.num_window_rows), self._plan_chunks(shape, chunks)]
            logits_indices = row[: shape.num_logits] if logits_indices is None else logits_indices
        return self.model(tokens, positions, self._attend(groups, slots), logits_indices, masked, adapters)

    def _kinds(
        self, shape: StepShape, index: Tensor, sequence: Tensor, masked: Callable[[], Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """``kinds`` for ``_forward``, for rows of the windows ``sequence`` [T]; calls ``masked`` only if it matters."""
        adapters = self.tables.adapter[index[sequence]] if shape.has_adapters else None
        return masked() if shape.has_adapters or self.model.has_masked_lora else None, adapters

    def _attend(self, groups: list[PagedRows], slots: Tensor) -> PagedAttend:
        return PagedAttend(self.cache, groups, slots, self.model.deterministic)

    def _verified(self, shape: StepShape, index: Tensor, chunks: ChunkRows | None) -> Tensor:
        state, tables, page_size = self.windows.state, self.tables, self.cache.page_size
        rows = verified_rows(
            state, index, tables.page_table, page_size, shape.num_rows, self.mask_token_id, self.trash_slot
        )
        plan = PagedRows(
            rows.row_start, rows.num_rows, rows.cached, index, tables.page_table, page_size,
            shape.max_rows, self.max_keys,
            rows.shared if shape.flags.groups else None, rows.own_start if shape.flags.groups else None,
        )  # fmt: skip
        kinds = self._kinds(shape, index, rows.sequence, lambda: rows.shared > 0 if shape.flags.groups else None)
        logits = self._forward(shape, rows.tokens, rows.positions, rows.slots, plan, None, chunks, kinds)
        last = shape.num_logits
        chosen = self._choose(logits, index, rows.sequence[:last], rows.target[:last], shape.flags)
        choice = chosen.choice if self.force_choice is None else self.force_choice(rows, chosen.choice)
        return update_verified(state, self._window, index, rows, choice, chosen.entropy, chosen.logprobs)

    def _streaming(self, shape: StepShape, index: Tensor, chunks: ChunkRows | None) -> Tensor:
        state, tables, page_size = self.windows.state, self.tables, self.cache.page_size
        rows = streaming_rows(
            state, tables.params.window, index, tables.page_table, page_size,
            shape.num_rows, shape.num_logits, self.mask_token_id, self.trash_slot,
        )  # fmt: skip
        plan = PagedRows(
            rows.row_start, rows.num_rows, rows.cached, index, tables.page_table, page_size,
            shape.max_rows, self.max_keys,
        )  # fmt: skip
        logits = self._forward(shape, rows.tokens, rows.positions, rows.slots, plan, rows.logits_indices, chunks)
        chosen = self._choose(logits, index, rows.sequence, rows.target, shape.flags)
        return update_streaming(
            state, tables.params.window, index, rows, chosen.choice, chosen.entropy, chosen.logprobs
        )

    def _any(self, shape: StepShape, index: Tensor, chunks: ChunkRows | None) -> Tensor:
        """Run streaming and verified windows together in plain tensor operations: the twin of the other two."""
        tables, page_size = self.tables, self.cache.page_size
        params = tables.params.take(index, shape.flags)
        state, run = extend(self.windows.state.take(index), params.window)
        num_rows = state.width
        drafts = num_drafts(state, params.window)
        rows = window_rows(state, params.window, shape.num_rows, self.mask_token_id, padded=True)
        sequence, real = rows.packed.sequence, rows.packed.real
        key = (state.cached[sequence] + rows.packed.row).where(real, 0)
        page = tables.page_table[index[sequence], key // page_size]
        key_slots = (page * page_size + key % page_size).where(real, self.trash_slot)
        plan = PagedRows(
            num_rows.cumsum(0) - num_rows, num_rows, state.cached, index, tables.page_table, page_size,
            shape.max_rows, self.max_keys,
            rows.visibility.shared if shape.flags.groups else None,
            rows.visibility.own_start if shape.flags.groups else None,
        )  # fmt: skip
        pick = torch.argsort(~rows.needs_logits, stable=True)[: shape.num_logits]
        kinds = self._kinds(shape, index, sequence, lambda: ~rows.filled & real)
        logits = self._forward(shape, rows.tokens, rows.positions, key_slots, plan, pick, chunks, kinds)
        own, column = sequence[pick], rows.target_column[pick]
        chosen = self._choose(logits, index, own, rows.target[pick], shape.flags)
        results = chosen.by_column(own, column, state.tokens.shape, rows.is_next[pick], rows.needs_logits[pick])
        limited = replace(params.window, row_budget=tables.row_budget[index], max_drafts=tables.max_drafts[index])
        state, emitted = update_windows(state, run, results, limited)
        self.windows.state.put(index, state)
        counts = torch.stack((emitted.count, num_rows, state.cached, drafts), dim=1)
        return torch.cat((counts, emitted.tokens, emitted.logprobs.contiguous().view(torch.long)), dim=1)

    def _choose(self, logits: Tensor, index: Tensor, sequence: Tensor, target: Tensor, flags: BatchFlags) -> RowChoices:
        """One token for each row of logits [L, V], which belongs to slot index[sequence]."""
        params = self.tables.params
        if self._choose_rows is not None:
            return self._choose_rows(logits, params, index[sequence], target, flags)
        if not flags.sampled:
            ends = (target, index[sequence], params.min_eos_position, params.stop_tokens) if flags.eos_banned else None
            return RowChoices(*greedy_rows(logits, self.mask_token_id, ends))
        slot = index[sequence]
        return choose_row_tokens(logits.float(), params, slot, target, flags, self.mask_token_id, report="choice")
