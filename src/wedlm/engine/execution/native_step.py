# SPDX-License-Identifier: Apache-2.0
"""Steps in the native library of CPUs: one call, or several if the host has to see or change logits."""

from collections.abc import Callable

import torch
from torch import Tensor

from wedlm.algorithm.verify import RowLayout
from wedlm.algorithm.window import RowResults, WindowParams, WindowState
from wedlm.attention.base import KVCache
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.constraints.step import ConstrainedStep
from wedlm.engine.execution.eager_step import MEASURING_S
from wedlm.engine.execution.pending import FinishedStep
from wedlm.engine.execution.sampling_tensors import BatchParams
from wedlm.engine.execution.windows import Windows
from wedlm.engine.plan import ScheduledRequest, StepPlan, StepResults, WindowResult
from wedlm.engine.request import Request
from wedlm.native import NativeTransformer
from wedlm.native.decoder import Chunk, NativeDecoder, StepTensors


class NativeStep:
    """The ``StepExecutor`` for a native model's plans, except those that fill by the probability of tokens. The twin is
    ``EagerStep`` with the same model.

    ``force_choice`` is as in ``EagerStep``.
    """

    runs_ahead = False
    has_padded_costs = False

    def __init__(
        self, model: NativeTransformer, cache: KVCache, windows: Windows, mask_token_id: int, max_model_len: int
    ) -> None:
        self.model, self.windows = model, windows
        self.decoder = NativeDecoder(model, cache, windows.num_slots, max_model_len, mask_token_id)
        self.force_choice: Callable[[WindowState, RowResults, WindowParams], Tensor] | None = None
        self._num_pages: dict[str, int] = {}  # by request: pages that the decoder has
        self._measured_s = 0.0

    def takes(self, plan: StepPlan) -> bool:
        return not any(one.is_window and one.request.decode.by_confidence for one in plan.scheduled)

    def unload(self, request: Request) -> None:
        self._num_pages.pop(request.request_id, None)

    def measure_costs(self, costs: StepCosts, most_rows: int) -> None:
        """Run forwards of 1, 2, 4, ... rows until all calls together have taken ``MEASURING_S``."""

        def forward(num_rows: int) -> None:
            rows = torch.arange(num_rows)
            self.model.greedy(rows % 2, rows, CausalAttend(), rows, masked=rows[1:])

        self._measured_s += costs.measure(forward, most_rows, MEASURING_S - self._measured_s)

    def launch(self, plan: StepPlan) -> FinishedStep:
        """Run one forward: the chunks' rows, then the windows' rows."""
        self._set_step(plan)
        windows = [one for one in plan.scheduled if one.is_window]
        has_host = self.force_choice is not None or any(one.request.output.constraint is not None for one in windows)
        if windows and has_host:
            self._run_with_host(windows)
        else:
            self.decoder.run()
        requests = [one.request for one in windows]
        if any(request.params.logprobs is not None for request in requests):
            self.windows.keep_top(requests, *self.decoder.read_top())
        results: StepResults = [*self._read(windows)] if windows else []
        return FinishedStep([*results, *[None] * (len(plan.scheduled) - len(windows))])

    def _set_step(self, plan: StepPlan) -> None:
        slots, decoder = self.windows.slots, self.decoder
        new = [one.request for one in plan.scheduled if one.request.request_id not in self._num_pages]
        if new:
            self.windows.load(new)
            for request in new:
                num_top = request.params.logprobs or 0
                decoder.set_params(slots[request.request_id], request.decode, num_top, request.adapter_slot)
                self._num_pages[request.request_id] = 0
        self.windows.propose(plan)
        decoder.attach(self.windows.state)
        windows, chunks, most_positions = [], [], 0
        for one in plan.scheduled:
            request, pages = one.request, one.pages
            request_id = request.request_id
            slot, sent = slots[request_id], self._num_pages[request_id]
            if sent < len(pages):
                decoder.add_pages(slot, sent, pages[sent:])
                self._num_pages[request_id] = len(pages)
            stop = one.start + one.count
            if request.decode.suffix_length:  # which stands at the end
                most_positions = max(most_positions, request.decode.max_positions)
            most_positions = stop if stop > most_positions else most_positions
            if one.is_window:
                windows.append(slot)
            else:
                positions = request.decode.positions(one.start, stop)
                chunks.append(Chunk(slot, one.start, request.output.tokens[one.start : stop], positions))
        decoder.set_step(windows, chunks, plan.row_budget, plan.max_drafts, most_positions)

    @torch.inference_mode()
    def _run_with_host(self, windows: list[ScheduledRequest]) -> None:
        """Run the parts of the step, with Python's changes between them."""
        requests = [one.request for one in windows]
        reports = any(request.params.logprobs is not None for request in requests)
        step = self.decoder.forward(keep_raw=reports)
        params = BatchParams.stack([request.decode for request in requests], torch.device("cpu"))
        constrained = ConstrainedStep.of(windows, step.state, RowLayout(step.shared, step.shared, step.shared))
        if constrained is not None:
            sampling = params.sampling(step.sequence, step.target, params.flags)
            constrained.apply(step.sequence, step.column, step.logits, step.logsumexp, sampling)
        self.decoder.choose()
        self._force(step, params.window)
        if constrained is not None:
            constrained.draft(step.results)
        self.decoder.update()
        if constrained is not None:
            constrained.correct(step.run, step.state, step.emitted)
        self.decoder.put()

    def _force(self, step: StepTensors, params: WindowParams) -> None:
        if self.force_choice is not None:
            step.results.choice.copy_(self.force_choice(step.state, step.results, params))

    def _read(self, windows: list[ScheduledRequest]) -> list[WindowResult]:
        numbers, tokens, logprobs = self.decoder.read()
        return [
            WindowResult(
                of_tokens[:count],
                of_logprobs[:count],
                self.windows.pop_top_logprobs(one.request, count),
                rows,
                cached,
                drafts,
            )
            for one, (count, rows, cached, drafts), of_tokens, of_logprobs in zip(
                windows, numbers, tokens, logprobs, strict=True
            )
        ]
