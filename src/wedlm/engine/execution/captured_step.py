# SPDX-License-Identifier: Apache-2.0
"""Steps as CUDA graphs: inputs go to the device without waiting, one replay runs the step, and the host reads the
results while the next step runs."""

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from wedlm.algorithm.params import DecodeParams
from wedlm.attention.base import KVCache
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.execution.device_step import ChunkRows, DeviceModel, DeviceStep, DeviceTables, StepShape
from wedlm.engine.execution.graphs import StepGraphs, step_shape
from wedlm.engine.execution.pending import DeviceStepResults, HostBuffer
from wedlm.engine.execution.rows import RowChoices
from wedlm.engine.execution.sampling_tensors import BatchFlags, BatchParams
from wedlm.engine.execution.transfer import scatter_rows, to_device_async
from wedlm.engine.execution.windows import Windows
from wedlm.engine.plan import ScheduledRequest, StepPlan
from wedlm.engine.request import Request

MAX_STOP_TOKENS = 8  # end tokens of a request; more need the host
_MOST_CHUNK_ROWS = 2048


class StepPeers(Protocol):
    """Other ranks that take part in each step, and are told about it before."""

    def announce(self, what: Literal["capture", "run"], shape: StepShape) -> None: ...

    def add_pages(self, rows: list[int], columns: list[int], pages: list[int]) -> None:
        """Pages that the table has got, by slot and by place."""
        ...

    def choose_rows(
        self, logits: Tensor, params: BatchParams, slot: Tensor, target: Tensor, flags: BatchFlags, /
    ) -> RowChoices: ...


class CapturedStep:
    """The ``StepExecutor`` for steps that do not need the host. No pool may contain the cache's last page, and
    ``windows`` must have a null slot.

    ``capture_chunks``: also run steps with prompt chunks. ``peers``: set if other ranks take part in each step.
    """

    runs_ahead = True
    has_padded_costs = True

    def __init__(
        self,
        model: DeviceModel,
        cache: KVCache,
        windows: Windows,
        mask_token_id: int,
        max_model_len: int,
        capture_chunks: bool,
        peers: StepPeers | None = None,
    ) -> None:
        self.cache, self.windows, self.mask_token_id = cache, windows, mask_token_id
        self.device, self.capture_chunks = windows.device, capture_chunks
        self.tables = DeviceTables(windows, -(-max_model_len // cache.page_size), MAX_STOP_TOKENS)
        self.peers = peers
        choose_rows, announce = (None, None) if peers is None else (peers.choose_rows, peers.announce)
        self.step = DeviceStep(model, cache, windows, self.tables, mask_token_id, choose_rows)
        self.graphs = StepGraphs(self.step, announce)
        self._state = windows.state  # whose tensors the captured steps hold
        self._factors = model.factors_version  # which, too
        self._budget = 1, 0  # rows and drafts
        self._flags: tuple[list[DecodeParams], BatchFlags] = [], BatchFlags.of([])  # of the latest windows
        self._num_pages_sent: dict[str, int] = {}  # by request: pages that the device's table has
        self._index: dict[int, tuple[list[int], Tensor]] = {}  # by number of sequences: what it holds, static tensor
        self._chunks: dict[tuple[int, int], Tensor] = {}  # by rows and chunks: static tensor of ``ChunkRows``
        self._free_buffers: dict[tuple[int, ...], list[HostBuffer]] = {}  # by shape of the results

    def measure_costs(self, costs: StepCosts, most_rows: int) -> None:
        null = torch.full((1,), self.windows.null_slot, dtype=torch.long, device=self.device)
        self.graphs.measure_costs(costs, most_rows, null)

    def unload(self, request: Request) -> None:
        self._num_pages_sent.pop(request.request_id, None)

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step can run without the host."""
        most = _MOST_CHUNK_ROWS if self.capture_chunks else 0
        for one in plan.scheduled:
            if not one.is_window:  # windows come first
                return sum(one.count for one in plan.scheduled) <= most
            if one.request.needs_host or len(one.request.decode.stop_token_ids) > MAX_STOP_TOKENS:
                return False
        return bool(plan.scheduled)

    def launch(self, plan: StepPlan) -> DeviceStepResults:
        """Start the step and return at once."""
        self._load(plan)
        windows = [one for one in plan.scheduled if one.is_window]
        chunks = plan.scheduled[len(windows) :]
        shape = step_shape(windows, chunks, self._flags_of(windows))
        if self.graphs.lacks(shape):
            self.graphs.add(shape, self._set_index(shape.num_sequences, []), self._set_chunks(shape, []))
        slots = self.windows.slots
        index = self._set_index(shape.num_sequences, [slots[one.request.request_id] for one in windows])
        results = self.graphs.run(shape, index, self._set_chunks(shape, chunks))
        free_buffers = self._free_buffers.setdefault(tuple(results.shape), [])
        return DeviceStepResults(len(windows), len(chunks), results, free_buffers)

    def _load(self, plan: StepPlan) -> None:
        """Bring the device's tables up to date for the step."""
        new = [one.request for one in plan.scheduled if one.request.request_id not in self._num_pages_sent]
        if new:
            self.windows.load(new)
            self._send_params([request for request in new if len(request.decode.stop_token_ids) <= MAX_STOP_TOKENS])
        factors = self.step.model.factors_version
        if self.windows.state is not self._state or factors != self._factors:  # a wider window or an adapter came
            self._state, self._factors = self.windows.state, factors
            self.graphs.clear()
        self.windows.propose(plan)
        budget = plan.row_budget, plan.max_drafts
        if new or budget != self._budget:
            self._budget = budget
            self.tables.limit(*budget)
        self._send_pages(plan.scheduled)

    def _flags_of(self, windows: list[ScheduledRequest]) -> BatchFlags:
        params = [one.request.decode for one in windows]
        if params != self._flags[0]:
            self._flags = params, BatchFlags.of(params)
        return self._flags[1]

    def _set_index(self, size: int, slots: list[int]) -> Tensor:
        slots = [*slots, *[self.windows.null_slot] * (size - len(slots))]
        held, index = self._index.get(size, ([], None))
        if index is None:
            index = torch.empty(size, dtype=torch.long, device=self.device)
        if held != slots:
            index.copy_(self._to_device(slots), non_blocking=True)
            self._index[size] = (slots, index)
        return index

    def _set_chunks(self, shape: StepShape, chunks: list[ScheduledRequest]) -> ChunkRows | None:
        if not shape.num_chunks:
            return None
        size, page_size = shape.num_rows, self.cache.page_size
        numbers = np.empty(4 * size + 4 * shape.num_chunks, np.int64)
        rows, sequences = numbers[: 4 * size].reshape(4, -1), numbers[4 * size :].reshape(4, -1)
        # Tokens, positions, slots and adapters of padding.
        rows[:] = [[self.mask_token_id], [0], [self.step.trash_slot], [0]]
        sequences[:] = [[size], [0], [0], [self.windows.null_slot]]
        first = size - sum(one.count for one in chunks)
        for i, one in enumerate(chunks):
            stop, first_page = one.start + one.count, one.start // page_size
            slot = np.arange(one.start, stop)
            pages = np.array(one.pages[first_page : -(-stop // page_size)])
            own = rows[:, first : first + one.count]
            own[0], own[1] = one.request.output.tokens[one.start : stop], one.request.decode.positions(one.start, stop)
            own[2] = pages[slot // page_size - first_page] * page_size + slot % page_size
            own[3] = one.request.adapter_slot
            sequences[:, i] = first, one.count, one.start, self.windows.slots[one.request.request_id]
            first += one.count
        key = size, shape.num_chunks
        if key not in self._chunks:
            self._chunks[key] = torch.empty(len(numbers), dtype=torch.long, device=self.device)
        self._chunks[key].copy_(to_device_async(torch.from_numpy(numbers), self.device), non_blocking=True)
        return ChunkRows.views(self._chunks[key], *key)

    def _send_params(self, requests: list[Request]) -> None:
        if requests:
            params = BatchParams.stack([request.decode for request in requests], torch.device("cpu"), MAX_STOP_TOKENS)
            slots = [self.windows.slots[request.request_id] for request in requests]
            adapters = torch.tensor([request.adapter_slot for request in requests])
            scatter_rows(slots, [*self.tables.params.pairs(params), (self.tables.adapter, adapters)])

    def _send_pages(self, scheduled: list[ScheduledRequest]) -> None:
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for one in scheduled:
            request_id, table = one.request.request_id, one.pages
            sent = self._num_pages_sent.get(request_id, 0)
            if sent < len(table):
                rows += [self.windows.slots[request_id]] * (len(table) - sent)
                columns += range(sent, len(table))
                pages += table[sent:]
                self._num_pages_sent[request_id] = len(table)
        if rows:
            row, column, page = self._to_device([rows, columns, pages])
            self.tables.page_table[row, column] = page
            if self.peers is not None:
                self.peers.add_pages(rows, columns, pages)

    def _to_device(self, values: list) -> Tensor:
        return to_device_async(torch.tensor(values, dtype=torch.long), self.device)
