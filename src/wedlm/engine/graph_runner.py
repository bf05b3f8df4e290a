# SPDX-License-Identifier: Apache-2.0
"""Runs steps of windows and prompt chunks as CUDA graphs, and lets the host read a step while the next one runs.

Steps of very many rows, or with a request that needs the host, run as ``Runner`` runs them, on the same slots.
"""

from bisect import bisect_left
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.window import WindowState
from wedlm.attention.base import KVCache
from wedlm.attention.paged import plan_paged
from wedlm.engine.adaptive.draft_budget import StepCosts
from wedlm.engine.device_step import ChunkRows, DeviceStep, Slots, StepShape
from wedlm.engine.execution.sampling_tensors import BatchFlags, BatchParams
from wedlm.engine.execution.transfer import put_rows, upload
from wedlm.engine.request import Request, StepPlan, WindowResult, Work
from wedlm.engine.runner import Runner
from wedlm.kernels.step_output import first_logprob
from wedlm.model.inference.triton_transformer import FusedTransformer

_MAX_STOP_TOKENS = 8  # end tokens of a request; more need the host
# Chunks come in few sizes, so that few steps are captured; a step of more rows keeps the GPU busy while it is launched.
_CHUNK_SIZES = [4, 16, 64, 256, 1024, 4096]
_FEWEST_CHUNK_ROWS, _MOST_CHUNK_ROWS = 128, 2048
_FEWEST_BESIDE = 64  # rows of windows there
_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]


class Landing:
    """Memory of the host, and an event, for the results of one flight at a time: both are slow to make."""

    def __init__(self, results: Tensor) -> None:
        on_gpu = results.is_cuda
        self.memory = torch.empty(results.shape, dtype=results.dtype, pin_memory=on_gpu and len(results) > 0)
        self.numbers = self.memory.numpy()
        self.done = torch.cuda.Event() if on_gpu else None


class GraphFlight:
    """``Flight`` whose results are on their way to the host's memory. ``landings``: those free for this shape; one that
    was read is free again."""

    def __init__(self, num_windows: int, num_chunks: int, results: Tensor, landings: list[Landing]) -> None:
        self.num_windows, self.num_chunks = num_windows, num_chunks
        self._landings = landings
        self._landing = landings.pop() if landings else Landing(results)
        self._landing.memory.copy_(results, non_blocking=True)
        if self._landing.done is not None:
            self._landing.done.record()

    def read(self) -> list[WindowResult | None]:
        if self._landing.done is not None:
            self._landing.done.synchronize()
        self._landings.append(self._landing)  # nobody lands there before this has returned
        if not self.num_windows:
            return [None] * self.num_chunks
        numbers = self._landing.numbers[: self.num_windows]
        figures = numbers[:, :4].T.tolist()
        widest = max(1, *figures[0])
        # In one list each: lists by the hundred keep the garbage collector busy.
        tokens = numbers[:, 4 : 4 + widest].ravel().tolist()
        logprobs = numbers[:, first_logprob(numbers.shape) :].view(np.float32)[:, :widest].ravel().tolist()
        results = [
            WindowResult(tokens[at : at + count], logprobs[at : at + count], (), rows, cached, drafts)
            for at, count, rows, cached, drafts in zip(range(0, len(tokens), widest), *figures, strict=True)
        ]
        return [*results, *[None] * self.num_chunks]


class GraphRunner(Runner):
    """``Runner`` whose steps need no host. The cache's last page must be no pool's.

    ``captures_chunks``: steps with prompt chunks are captured, too; otherwise they run as ``Runner`` runs them. Without
    a GPU the same device code runs directly, for the tests."""

    def __init__(
        self,
        model: FusedTransformer,
        cache: KVCache,
        mask_token_id: int,
        max_num_seqs: int,
        max_model_len: int,
        captures_chunks: bool = False,
    ) -> None:
        super().__init__(model, cache, mask_token_id, max_num_seqs, plan_paged)
        self._costs = StepCosts([] if self.device.type == "cuda" else [(1, 1.0), (2, 1.1)], padded=True)
        self._fused, self._max_model_len, self._captures_chunks = model, max_model_len, captures_chunks
        self.state = WindowState.empty(max_num_seqs + 1, 64, self.device)
        nobody = [DecodeParams("autoregressive")] * (max_num_seqs + 1)
        params = BatchParams.stack(nobody, self.device, _MAX_STOP_TOKENS)
        num_pages = -(-max_model_len // cache.page_size)
        table = torch.zeros(max_num_seqs + 1, num_pages, dtype=torch.long, device=self.device)
        params = replace(params, flags=replace(params.flags, adapts=True))
        budgets = params.window.row_budget.clone(), params.window.max_drafts.clone()
        self.slots = Slots(self.state, params, table, *budgets)
        self._row_budget = 1
        self.step = DeviceStep(model, cache, self.slots, mask_token_id)
        self._flags: tuple[list[DecodeParams], BatchFlags] = [], BatchFlags.of([])  # of the latest windows
        self._sent: dict[str, int] = {}  # pages of a request that the device's table has
        self._index: dict[int, tuple[list[int], Tensor]] = {}  # by number of sequences: what it holds, static tensor
        self._chunks: dict[tuple[int, int], Tensor] = {}  # by rows and chunks: static tensor of ``ChunkRows``
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._landings: dict[tuple[int, ...], list[Landing]] = {}  # by shape of the results
        self._latest: torch.cuda.CUDAGraph | None = None  # keeps alive the memory that all captured steps share

    def again(self, cache: KVCache) -> "GraphRunner":
        """A new one for the same model over ``cache``."""
        limits = self.slots.nobody, self._max_model_len
        return GraphRunner(self._fused, cache, self.mask_token_id, *limits, captures_chunks=self._captures_chunks)

    def forget_graphs(self) -> None:
        """Capture each step anew when it is next needed."""
        self._graphs.clear()

    def step_costs(self, most_rows: int) -> StepCosts:
        """The table with captured steps of padding alone, which read all weights and no keys; each is timed once."""
        if self.device.type != "cuda":  # interpreted kernels tell nothing: the table is made up
            return self._costs
        flags = BatchFlags.of([DecodeParams("verified")])
        index = torch.full((1,), self.slots.nobody, dtype=torch.long, device=self.device)
        for num_rows in [size for size in _SIZES if self._costs.most_rows < size <= _size(most_rows)]:
            graph, _ = self._captured(StepShape.of_windows(1, num_rows, num_rows, 16, flags), index, None)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()
            start.record()
            for _ in range(4):
                graph.replay()
            end.record()
            end.synchronize()
            self._costs.add(num_rows, start.elapsed_time(end) / 4e3)
        return self._costs

    def can_launch(self, plan: StepPlan) -> bool:
        """Whether nothing in the step needs the host."""
        most = _MOST_CHUNK_ROWS if self._captures_chunks else 0
        for work in plan.work:
            if not work.decodes:  # windows come first
                return sum(work.count for work in plan.work) <= most
            if work.request.needs_host or len(work.request.decode.stop_token_ids) > _MAX_STOP_TOKENS:
                return False
        return bool(plan.work)

    def launch(self, plan: StepPlan) -> GraphFlight:
        """Start the step and return at once."""
        self._load(plan.work)
        if plan.row_budget != self._row_budget:
            self._row_budget = plan.row_budget
            self.slots.limit(plan.row_budget)
        self._send_pages(plan.work)
        windows = [work for work in plan.work if work.decodes]
        chunks = plan.work[len(windows) :]
        shape = _shape(windows, chunks, self._flags_of(windows))
        if self.device.type == "cuda" and shape not in self._graphs:
            nothing = self._set_index(shape.num_sequences, []), self._set_chunks(shape, [])
            self._graphs[shape] = self._captured(shape, *nothing)
        index = self._set_index(shape.num_sequences, [self._slots[work.request.request_id] for work in windows])
        rows = self._set_chunks(shape, chunks)
        if self.device.type != "cuda":
            return self._flight(windows, chunks, self.step(shape, index, rows))
        graph, results = self._graphs[shape]
        graph.replay()
        return self._flight(windows, chunks, results)

    def _flight(self, windows: list[Work], chunks: list[Work], results: Tensor) -> GraphFlight:
        return GraphFlight(len(windows), len(chunks), results, self._landings.setdefault(tuple(results.shape), []))

    def _flags_of(self, windows: list[Work]) -> BatchFlags:
        params = [work.request.decode for work in windows]
        if params != self._flags[0]:
            self._flags = params, BatchFlags.of(params)
        return self._flags[1]

    def _set_index(self, size: int, slots: list[int]) -> Tensor:
        slots = [*slots, *[self.slots.nobody] * (size - len(slots))]
        held, index = self._index.get(size, ([], None))
        if index is None:
            index = torch.empty(size, dtype=torch.long, device=self.device)
        if held != slots:
            index.copy_(self._upload(slots), non_blocking=True)
            self._index[size] = (slots, index)
        return index

    def _set_chunks(self, shape: StepShape, chunks: list[Work]) -> ChunkRows | None:
        if not shape.num_chunks:
            return None
        size, page_size = shape.num_rows, self.cache.page_size
        numbers = np.empty(3 * size + 4 * shape.num_chunks, np.int64)
        rows, sequences = numbers[: 3 * size].reshape(3, -1), numbers[3 * size :].reshape(4, -1)
        rows[:] = [[self.mask_token_id], [0], [self.step.trash_slot]]  # tokens, positions, slots of padding
        sequences[:] = [[size], [0], [0], [self.slots.nobody]]
        first = size - sum(work.count for work in chunks)
        for i, work in enumerate(chunks):
            stop, first_page = work.start + work.count, work.start // page_size
            position = np.arange(work.start, stop)
            pages = np.array(work.pages[first_page : -(-stop // page_size)])
            own = rows[:, first : first + work.count]
            own[0], own[1] = work.request.tokens[work.start : stop], position
            own[2] = pages[position // page_size - first_page] * page_size + position % page_size
            sequences[:, i] = first, work.count, work.start, self._slots[work.request.request_id]
            first += work.count
        key = size, shape.num_chunks
        if key not in self._chunks:
            self._chunks[key] = torch.empty(len(numbers), dtype=torch.long, device=self.device)
        self._chunks[key].copy_(upload(torch.from_numpy(numbers), self.device), non_blocking=True)
        return ChunkRows.views(self._chunks[key], *key)

    def _send_pages(self, work: list[Work]) -> None:
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for one in work:
            request_id, table = one.request.request_id, one.pages
            sent = self._sent.get(request_id, 0)
            if sent < len(table):
                rows += [self._slots[request_id]] * (len(table) - sent)
                columns += range(sent, len(table))
                pages += table[sent:]
                self._sent[request_id] = len(table)
        if rows:
            row, column, page = self._upload([rows, columns, pages])
            self.slots.page_table[row, column] = page

    def _upload(self, values: list) -> Tensor:
        return upload(torch.tensor(values, dtype=torch.long), self.device)

    def _captured(
        self, shape: StepShape, index: Tensor, chunks: ChunkRows | None
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The step as a graph; ``index`` names the empty window meanwhile, which no step changes, chunks are empty."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step(shape, index, chunks)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=None if self._latest is None else self._latest.pool()):
            results = self.step(shape, index, chunks)
        self._latest = graph
        return graph, results

    def _load(self, work: list[Work]) -> list[Request]:
        new = super()._load(work)
        if self.state is not self.slots.state:  # a wider window came: captured steps hold the old tensors
            self.slots.state = self.state
            self.forget_graphs()
        few = [request for request in new if len(request.decode.stop_token_ids) <= _MAX_STOP_TOKENS]
        if few:
            params = BatchParams.stack([request.decode for request in few], torch.device("cpu"), _MAX_STOP_TOKENS)
            put_rows([self._slots[request.request_id] for request in few], self.slots.params.pairs(params))
            self.slots.limit(self._row_budget)
        return new

    def unload(self, request: Request) -> None:
        self._sent.pop(request.request_id, None)
        super().unload(request)


def _shape(windows: list[Work], chunks: list[Work], flags: BatchFlags) -> StepShape:
    """The captured step that holds these windows, whose flags are ``flags``, and chunks."""
    counts = [work.count for work in windows]
    num_rows, most = sum(counts), max(counts, default=0)
    # A captured step does the same with and without these; windows of a row each have no groups, so auto is as AR.
    flags = replace(flags, adapts=flags.adapts and flags.streams, entropy=False, groups=flags.groups and most > 1)
    streaming = num_rows
    if flags.streams:
        streaming = sum(w.count if w.request.decode.verifies else w.request.decode.window_size for w in windows)
    if not chunks:
        rows = _size(num_rows)
        return StepShape.of_windows(_size(len(windows)), rows, min(rows, _size(streaming)), _size(most), flags)
    rows = _size(max(_FEWEST_CHUNK_ROWS, num_rows + sum(work.count for work in chunks)))
    num_chunks = _chunk_size(len(chunks))
    if not windows:
        return StepShape(0, rows, 0, 0, flags, 0, num_chunks)
    window_rows = min(rows, _chunk_size(max(_FEWEST_BESIDE, num_rows)))
    wanted = min(window_rows, _chunk_size(max(_FEWEST_BESIDE, streaming)))
    most = _chunk_size(max(16, most))
    return StepShape(_chunk_size(len(windows)), rows, wanted, most, flags, window_rows, num_chunks)


def _size(number: int) -> int:
    """The smallest captured size that holds ``number``."""
    at = bisect_left(_SIZES, number)
    return _SIZES[at] if at < len(_SIZES) else -(-number // 1024) * 1024


def _chunk_size(number: int) -> int:
    """``_size`` where chunks share the step."""
    return next(size for size in _CHUNK_SIZES if size >= number)
