# SPDX-License-Identifier: Apache-2.0
"""Runs the forward of a step: packs rows, calls the model, chooses tokens, moves the windows on. Knows no queues."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.reorder import PackedRows, pack_rows, topological_order
from wedlm.algorithm.sample import SamplingBatch, ban_tokens, choose_tokens, entropy_and_logsumexp
from wedlm.algorithm.verify import row_layout
from wedlm.algorithm.window import Emitted, RowResults, WindowState, extend, num_drafts, update_windows
from wedlm.attention.base import ExtendBatch, KVCache, RowVisibility
from wedlm.attention.sdpa import CausalAttend, PagedSdpa
from wedlm.engine.adaptive.draft_budget import StepCosts
from wedlm.engine.constraints.step import ConstrainedStep
from wedlm.engine.execution.sampling_tensors import BatchParams
from wedlm.engine.execution.transfer import put_rows
from wedlm.engine.request import Alternatives, Request, StepPlan, WindowResult, WindowSnapshot, Work
from wedlm.engine.sampling_params import MAX_LOGPROBS

_MEASURING_S = 0.7  # for the table of costs

RowsForward = Callable[..., Tensor]  # model(tokens_T, positions_T, attend, logits_rows, masked) -> logits [L, V]


class Flight(Protocol):
    """A launched step."""

    def read(self) -> list[WindowResult | None]:
        """Wait for the step, and for nothing launched after it: a result per work of its plan, None for chunks."""
        ...


class Runner:
    """Holds the model, the cache and one window per running request (a slot of ``WindowState``)."""

    def __init__(
        self,
        model: RowsForward,
        cache: KVCache,
        mask_token_id: int,
        max_num_seqs: int,
        plan_attention: Callable[[KVCache, ExtendBatch], Any] = PagedSdpa,
    ) -> None:
        self.model, self.cache, self.mask_token_id = model, cache, mask_token_id
        self.plan_attention = plan_attention
        self.device = cache.keys.device
        self.state = WindowState.empty(max_num_seqs, 32, self.device)
        self._slots: dict[str, int] = {}
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._alternatives: dict[str, dict[int, Alternatives]] = {}
        self._params: tuple[list[DecodeParams], BatchParams] | None = None
        self._costs, self._measured_s = StepCosts([], padded=False), 0.0

    def again(self, cache: KVCache) -> "Runner":
        """A new one for the same model over ``cache``."""
        return Runner(self.model, cache, self.mask_token_id, len(self.state.width), self.plan_attention)

    def _load(self, work: list[Work]) -> list[Request]:
        """Put the windows of requests that have no slot yet on the device; those requests."""
        new = [one.request for one in work if one.request.request_id not in self._slots]
        if not new:
            return new
        slots = [self._free_slots.pop() for _ in new]
        for request, slot in zip(new, slots, strict=True):
            self._slots[request.request_id] = slot
            self._alternatives[request.request_id] = dict(request.window.alternatives)
        # No window reaches past the model's length, whatever size was asked for; the state stays that wide for all.
        max_rows = max(min(request.decode.max_rows, request.decode.max_positions) for request in new)
        if max_rows > self.state.tokens.shape[1]:
            self.state = self.state.widened(1 << (max_rows - 1).bit_length())  # a power of two, as kernels like it
        windows = [request.window for request in new]
        rest = [[0] * (self.state.tokens.shape[1] - len(window.tokens)) for window in windows]
        both = list(zip(windows, rest, strict=True))
        put_rows(slots, [
            (self.state.cached, torch.tensor([window.cached for window in windows])),
            (self.state.width, torch.tensor([len(window.tokens) for window in windows])),
            (self.state.tokens, torch.tensor([[*(t or 0 for t in w.tokens), *none] for w, none in both])),
            (self.state.filled, torch.tensor([[*(t is not None for t in w.tokens), *none] for w, none in both])),
            (self.state.logprobs, torch.tensor([[*w.logprobs, *none] for w, none in both])),
        ])  # fmt: skip
        return new

    def unload(self, request: Request) -> None:
        """Free the request's slot, if it has one."""
        slot = self._slots.pop(request.request_id, None)
        if slot is not None:
            self._free_slots.append(slot)
            del self._alternatives[request.request_id]

    def suspend(self, request: Request) -> WindowSnapshot:
        """Free the request's slot; its window as it stands (the one it came with, if it never ran)."""
        window = self.snapshot(request)
        self.unload(request)
        return window

    def snapshot(self, request: Request) -> WindowSnapshot:
        """The request's window as it stands. Waits for the device: for preemption, and for who asked to watch."""
        slot = self._slots.get(request.request_id)
        if slot is None:
            return request.window
        width = int(self.state.width[slot])
        tokens, filled = self.state.tokens[slot, :width].tolist(), self.state.filled[slot, :width].tolist()
        return WindowSnapshot(
            cached=int(self.state.cached[slot]),
            tokens=tuple(t if f else None for t, f in zip(tokens, filled, strict=True)),
            logprobs=tuple(self.state.logprobs[slot, :width].tolist()),
            alternatives=dict(self._alternatives[request.request_id]),
        )

    def step_costs(self, most_rows: int) -> StepCosts:
        """The table of costs, always the same, with what it lacks up to ``most_rows``: about a second's work in all."""
        with torch.inference_mode():
            while (num_rows := 2 * self._costs.most_rows or 1) <= most_rows and self._measured_s < _MEASURING_S:
                started, best = time.perf_counter(), math.inf
                tokens = torch.arange(num_rows, device=self.device) % 2
                for _ in range(3):
                    start = time.perf_counter()
                    positions = torch.arange(num_rows, device=self.device)
                    self.model(tokens, positions, CausalAttend(), tokens, positions[1:] if num_rows > 1 else None)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize()
                    best = min(best, time.perf_counter() - start)
                self._costs.add(num_rows, best)
                self._measured_s += time.perf_counter() - started
        return self._costs

    def can_launch(self, plan: StepPlan) -> bool:
        """Whether ``launch`` takes the step: it starts it, and the host may read it while the next one runs."""
        return False

    def launch(self, plan: StepPlan) -> Flight:
        raise NotImplementedError

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[WindowResult | None]:
        """One forward; a result per work of the plan, None for chunks."""
        windows = [work for work in plan.work if work.decodes]
        chunks = plan.work[len(windows) :]
        self._load(windows)
        if not windows:
            self._forward([], chunks, None)
            return [None] * len(chunks)
        index = torch.tensor([self._slots[work.request.request_id] for work in windows], device=self.device)
        params = self._stack_params(windows)
        state, run = extend(self.state.take(index), params.window)
        drafts = num_drafts(state, params.window)
        num_rows, starts, drafts = torch.stack((state.width, state.cached, drafts)).tolist()
        if not params.flags.streams and max(num_rows) <= 1:  # anchors alone: what auto decoding costs where AR is best
            params = replace(params, flags=replace(params.flags, groups=False, entropy=False))
        order = topological_order(state.filled, state.width)
        packed = pack_rows(state.width, sum(num_rows))
        column = order[packed.sequence, packed.row]
        filled = state.filled[packed.sequence, column]
        # Streaming reads nothing from a filled row; verification reads all.
        wanted = (~filled | params.window.verifies[packed.sequence]).nonzero()[:, 0]
        tokens = torch.where(filled, state.tokens[packed.sequence, column], self.mask_token_id)
        layout = row_layout(state.filled, state.width, params.window.verifies)
        offset, shared, own_start = (
            part[packed.sequence, column] for part in (layout.offset, layout.shared, layout.own_start)
        )
        positions = state.cached[packed.sequence] + offset
        visibility = RowVisibility(shared, own_start) if params.flags.groups else None
        masked = (~filled).nonzero()[:, 0]  # windows come first, so these are rows of the step, too
        logits = self._forward(windows, chunks, (tokens, positions, num_rows, starts, wanted, masked), visibility)
        logits = logits.float()
        rows = PackedRows(packed.sequence[wanted], packed.row[wanted], packed.real[wanted])
        constrained = ConstrainedStep.of(windows, state, layout)
        target = (positions + filled)[wanted]
        results = self._choose(logits, rows, column[wanted], target, params, state, windows, constrained)
        if constrained is not None:
            constrained.draft(results)
        state, emitted = update_windows(state, run, results, params.limited(plan.row_budget))
        if constrained is not None:
            constrained.correct(run, state, emitted)
        self.state.put(index, state)
        return self._read(windows, state, emitted, num_rows, drafts) + [None] * len(chunks)

    def _stack_params(self, windows: list[Work]) -> BatchParams:
        params = [work.request.decode for work in windows]
        if self._params is None or self._params[0] != params:
            self._params = (params, BatchParams.stack(params, self.device))
        return self._params[1]

    def _forward(
        self,
        windows: list[Work],
        chunks: list[Work],
        rows: tuple[Tensor, Tensor, list[int], list[int], Tensor, Tensor] | None,
        visibility: RowVisibility | None = None,
    ) -> Tensor:
        """Windows' rows, then chunks' rows, through the model; logits of the wanted window rows only."""
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        window_tokens, window_positions, num_rows, starts, wanted, masked = rows or (none, none, [], [], none, none)
        tokens, positions = [window_tokens], [window_positions]
        for work in chunks:
            stop = work.start + work.count
            tokens.append(torch.tensor(work.request.tokens[work.start : stop], device=self.device))
            positions.append(torch.arange(work.start, stop, device=self.device))
        if visibility is not None and chunks:  # a chunk's rows are in plain order
            more = (0, sum(work.count for work in chunks))
            visibility = RowVisibility(F.pad(visibility.shared, more), F.pad(visibility.own_start, more))
        everything = [*windows, *chunks]
        batch = ExtendBatch(
            starts=[*starts, *(work.start for work in chunks)],
            counts=[*num_rows, *(work.count for work in chunks)],
            pages=[work.pages for work in everything],
            visibility=visibility,
        )
        attend = self.plan_attention(self.cache, batch)
        return self.model(torch.cat(tokens), torch.cat(positions), attend, wanted, masked if len(masked) else None)

    def _choose(
        self,
        logits: Tensor,
        rows: PackedRows,
        column: Tensor,
        target: Tensor,
        params: BatchParams,
        state: WindowState,
        windows: list[Work],
        constrained: ConstrainedStep | None,
    ) -> RowResults:
        """One token per row of logits [L, V], scattered to window columns."""
        asked = [work.request.params.logprobs for work in windows]
        any_logprobs = any(n is not None for n in asked)
        entropy = logsumexp = logits.new_zeros(len(logits))
        if params.flags.entropy or any_logprobs:
            entropy, logsumexp = entropy_and_logsumexp(logits)
        raw = logits.clone() if any_logprobs else logits
        stop_tokens = params.stop_tokens[rows.sequence]
        if not params.flags.eos_banned:
            stop_tokens = stop_tokens[:, :0]  # nothing to scatter
        eos_banned = target < params.min_eos_position[rows.sequence]
        logits = ban_tokens(logits, self.mask_token_id, stop_tokens, eos_banned)
        sampling = SamplingBatch(
            temperature=params.temperature[rows.sequence],
            top_k=params.top_k[rows.sequence],
            top_p=params.top_p[rows.sequence],
            seed=params.seed[rows.sequence],
            position=target,
            any_sampled=params.flags.sampled,
            any_truncated=params.flags.truncated,
        )
        if constrained is not None:
            constrained.apply(logits, rows, column, logsumexp, sampling)
        choice = choose_tokens(logits, sampling)
        logprobs = raw.gather(1, choice[:, None])[:, 0] - logsumexp
        if any_logprobs:
            self._keep_alternatives(raw - logsumexp[:, None], rows.sequence, target, windows)
        at = (rows.sequence, column)
        shape = state.tokens.shape
        return RowResults(
            choice=torch.zeros(shape, dtype=torch.long, device=self.device).index_put_(at, choice),
            entropy=torch.zeros(shape, device=self.device).index_put_(at, entropy),
            logprobs=torch.zeros(shape, device=self.device).index_put_(at, logprobs),
        )

    def _keep_alternatives(self, logprobs: Tensor, sequence: Tensor, target: Tensor, windows: list[Work]) -> None:
        """Remember the top log-probabilities for every position that this step may fill; emission reads the last ones.

        A masked position that stays masked is overwritten by the next step. When verifying, the masked row of a
        position comes after the filled row that decides it, so the first one written for a position stands.
        """
        top = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[1]), dim=1)
        items = zip(sequence.tolist(), target.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
        fresh: set[tuple[int, int]] = set()
        for s, position, tokens, values in items:
            count = windows[s].request.params.logprobs
            if count is not None and (s, position) not in fresh:
                fresh.add((s, position))
                kept = self._alternatives[windows[s].request.request_id]
                kept[position] = list(zip(tokens[:count], values[:count], strict=True))

    def _read(
        self, windows: list[Work], state: WindowState, emitted: Emitted, num_rows: list[int], drafts: list[int]
    ) -> list[WindowResult | None]:
        """Copy what became final to the host."""
        results: list[WindowResult | None] = []
        cached, counts = state.cached.tolist(), emitted.count.tolist()
        widest = max(counts)
        tokens, logprobs = emitted.tokens[:, :widest].tolist(), emitted.logprobs[:, :widest].tolist()
        for s, work in enumerate(windows):
            alternatives: list[Alternatives] = []
            if work.request.params.logprobs is not None:
                kept, first = self._alternatives[work.request.request_id], len(work.request.tokens)
                alternatives = [kept.pop(first + i) for i in range(counts[s])]
            results.append(
                WindowResult(
                    tokens[s][: counts[s]], logprobs[s][: counts[s]], alternatives, num_rows[s], cached[s], drafts[s]
                )
            )
        return results
