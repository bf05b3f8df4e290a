# SPDX-License-Identifier: Apache-2.0
"""A step in plain torch operations, one after the other, with exact sizes: the reference for every other executor."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.window import Emitted, RowResults, WindowParams, WindowState, extend, num_drafts, update_windows
from wedlm.attention.base import ExtendBatch, KVCache, RowVisibility
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.constraints.step import ConstrainedStep
from wedlm.engine.execution.base import PlanAttention, RowsModel
from wedlm.engine.execution.pending import FinishedStep
from wedlm.engine.execution.rows import ChooseRowTokens, Report, choose_row_tokens, window_rows, with_adapters
from wedlm.engine.execution.sampling_tensors import BatchParams
from wedlm.engine.execution.windows import Windows
from wedlm.engine.plan import ScheduledRequest, StepPlan, StepResults, WindowResult
from wedlm.engine.request import Request

MEASURING_S = 0.7  # for the table of costs

A = TypeVar("A")


class EagerStep(Generic[A]):
    """The ``StepExecutor`` for every plan, on any device. It waits for the device several times a step.

    ``block_length`` is as in ``ExtendBatch``. ``local_model`` and ``choose`` are for ranks that share a model: its
    forward without whole logits, and the choice from its result. ``force_choice`` is for benchmarks: it replaces the
    tokens chosen by window column, given the windows, the choice and the windows' parameters.
    """

    runs_ahead = False
    has_padded_costs = False

    def __init__(
        self,
        model: RowsModel[A],
        plan_attention: PlanAttention[A],
        cache: KVCache,
        windows: Windows,
        mask_token_id: int,
        block_length: int = 1,
        local_model: RowsModel[A] | None = None,
        choose: ChooseRowTokens = choose_row_tokens,
    ) -> None:
        self.model, self.plan_attention, self.cache = model, plan_attention, cache
        self.local_model, self._choose = local_model, choose
        self.windows, self.mask_token_id, self.block_length = windows, mask_token_id, block_length
        self.device = windows.device
        self.force_choice: Callable[[WindowState, RowResults, WindowParams], Tensor] | None = None
        self._params: tuple[list[DecodeParams], BatchParams] | None = None  # of the latest windows
        self._measured_s = 0.0

    def takes(self, plan: StepPlan) -> bool:
        return True

    def unload(self, request: Request) -> None:
        pass

    def measure_costs(self, costs: StepCosts, most_rows: int) -> None:
        """Run forwards of 1, 2, 4, ... rows until all calls together have taken ``MEASURING_S``."""
        attend = cast(A, CausalAttend())  # only asked of models that attend so: captured steps time themselves

        @torch.inference_mode()
        def forward(num_rows: int) -> None:
            tokens, positions = (
                torch.arange(num_rows, device=self.device) % 2,
                torch.arange(num_rows, device=self.device),
            )
            self.model(tokens, positions, attend, tokens, positions[1:] if num_rows > 1 else None)
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        self._measured_s += costs.measure(forward, most_rows, MEASURING_S - self._measured_s)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> FinishedStep:
        """Run one forward: the chunks' rows, then the windows' rows."""
        windows = [one for one in plan.scheduled if one.is_window]
        chunks = plan.scheduled[len(windows) :]
        results: StepResults = [*self._run_windows(windows, chunks, plan)] if windows else []
        if not windows:
            none = torch.zeros(0, dtype=torch.long, device=self.device)
            self._forward([], ExtendBatch([], [], []), chunks, none, none, none, None)
        return FinishedStep([*results, *[None] * len(chunks)])

    def _run_windows(
        self, windows: list[ScheduledRequest], chunks: list[ScheduledRequest], plan: StepPlan
    ) -> list[WindowResult]:
        self.windows.load([one.request for one in windows])
        self.windows.propose(plan)
        slots = [self.windows.slots[one.request.request_id] for one in windows]
        index = torch.tensor(slots, device=self.device)
        params = self._stack_params(windows)
        state, run = extend(self.windows.state.take(index), params.window)
        drafts = num_drafts(state, params.window)
        num_rows, starts, drafts = torch.stack((state.width, state.cached, drafts)).tolist()
        flags = params.flags
        if not flags.streaming and max(num_rows) <= 1:  # anchors alone: what auto decoding costs where AR is best
            flags = replace(flags, groups=False, entropy=False)
        rows = window_rows(state, params.window, sum(num_rows), self.mask_token_id, padded=False)
        wanted = rows.needs_logits.nonzero()[:, 0]
        masked = (~rows.filled).nonzero()[:, 0]
        batch = ExtendBatch(starts, num_rows, [one.pages for one in windows], rows.visibility if flags.groups else None)
        logits = self._forward(
            windows,
            batch,
            chunks,
            rows.tokens,
            rows.positions,
            wanted,
            masked if len(masked) else None,
        )
        sequence, column = rows.packed.sequence[wanted], rows.target_column[wanted]
        target = rows.target[wanted]
        constrained = ConstrainedStep.of(windows, state, rows.layout)
        report: Report = "choice" if flags.by_confidence else "none"
        if any(one.request.params.logprobs is not None for one in windows):
            report = "all"
        chosen = self._choose(
            logits.float(), params, sequence, target, flags, self.mask_token_id, report=report,
            constrain=None if constrained is None else partial(constrained.apply, sequence, column),
        )  # fmt: skip
        if chosen.raw_logprobs is not None:
            self.windows.keep_top_logprobs([one.request for one in windows], sequence, target, chosen.raw_logprobs)
        results = chosen.by_column(sequence, column, state.tokens.shape, rows.is_next[wanted])
        if self.force_choice is not None:
            results = replace(results, choice=self.force_choice(state, results, params.window))
        if constrained is not None:
            constrained.draft(results)
        state, emitted = update_windows(state, run, results, params.limited(plan.row_budget, plan.max_drafts))
        if constrained is not None:
            constrained.correct(run, state, emitted)
        self.windows.state.put(index, state)
        return self._read(windows, state, emitted, num_rows, drafts)

    def _stack_params(self, windows: list[ScheduledRequest]) -> BatchParams:
        params = [one.request.decode for one in windows]
        if self._params is None or self._params[0] != params:
            self._params = (params, BatchParams.stack(params, self.device))
        return self._params[1]

    def _forward(
        self,
        scheduled: list[ScheduledRequest],
        windows: ExtendBatch,
        chunks: list[ScheduledRequest],
        window_tokens: Tensor,
        window_positions: Tensor,
        logits_indices: Tensor,
        masked: Tensor | None,
    ) -> Tensor:
        """Run the chunks' rows, then the windows' rows, through the model; returns logits [L, V] of window rows only,
        which ``logits_indices`` and ``masked`` count. ``scheduled`` are the windows' requests.

        A model may run long steps a part at a time: a first window comes after the chunk that it sees."""
        tokens, positions, num_before = [], [], sum(one.count for one in chunks)
        for one in chunks:
            stop = one.start + one.count
            tokens.append(torch.tensor(one.request.output.tokens[one.start : stop], device=self.device))
            positions.append(torch.tensor(one.request.decode.positions(one.start, stop), device=self.device))
        visibility = windows.visibility
        if visibility is not None and chunks:  # a chunk's rows are in plain order
            more = (num_before, 0)
            visibility = RowVisibility(F.pad(visibility.shared, more), F.pad(visibility.own_start, more))
        batch = ExtendBatch(
            starts=[*(one.start for one in chunks), *windows.starts],
            counts=[*(one.count for one in chunks), *windows.counts],
            pages=[*(one.pages for one in chunks), *windows.pages],
            visibility=visibility,
            block_length=self.block_length,
        )
        attend = self.plan_attention(self.cache, batch)
        adapters = [one.request.adapter_slot for one in (*chunks, *scheduled)]
        last = with_adapters(None if masked is None else masked + num_before, adapters, batch.counts, self.device)
        model = self.model if self.local_model is None else self.local_model
        rows = torch.cat((*tokens, window_tokens)), torch.cat((*positions, window_positions))
        return model(*rows, attend, logits_indices + num_before, *last)

    def _read(
        self,
        windows: list[ScheduledRequest],
        state: WindowState,
        emitted: Emitted,
        num_rows: list[int],
        drafts: list[int],
    ) -> list[WindowResult]:
        """Copy what became final to the host."""
        results: list[WindowResult] = []
        cached, counts = state.cached.tolist(), emitted.count.tolist()
        widest = max(counts)
        tokens, logprobs = emitted.tokens[:, :widest].tolist(), emitted.logprobs[:, :widest].tolist()
        for s, one in enumerate(windows):
            # The prompt's part of a block is not output.
            first = max(0, len(one.request.prompt_token_ids) - cached[s]) if self.block_length > 1 else 0
            new = slice(first, max(first, counts[s]))
            top = self.windows.pop_top_logprobs(one.request, new.stop - first)
            results.append(WindowResult(tokens[s][new], logprobs[s][new], top, num_rows[s], cached[s], drafts[s]))
        return results
