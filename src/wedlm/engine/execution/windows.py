# SPDX-License-Identifier: Apache-2.0
"""The decoding windows of running requests on the device: one request slot each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wedlm.algorithm.lookup import Proposals, propose, propose_one
from wedlm.algorithm.window import WindowState
from wedlm.engine.execution.transfer import scatter_rows, to_device_async
from wedlm.engine.plan import ScheduledRequest, StepPlan
from wedlm.engine.request import Request, TopLogprobs, WindowSnapshot
from wedlm.engine.sampling_params import MAX_LOGPROBS


class Windows:
    """``state`` has one window per request slot. All executors share one ``Windows``.

    ``capacity`` is the number of columns at first; wider windows widen all. With a null slot there is one extra slot,
    the last, whose window stays empty; padding points at it.
    """

    def __init__(self, num_slots: int, device: torch.device, capacity: int = 32, has_null_slot: bool = False) -> None:
        self.device, self.num_slots = device, num_slots
        self.state = WindowState.empty(num_slots + has_null_slot, capacity, device)
        self.slots: dict[str, int] = {}
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self.top_logprobs: dict[str, dict[int, TopLogprobs]] = {}  # by request, then by position

    @property
    def null_slot(self) -> int:
        assert len(self.state.width) > self.num_slots, "these windows have no null slot"
        return self.num_slots

    def load(self, requests: Sequence[Request]) -> None:
        """Put the windows of requests that have no slot yet on the device. A request may be named twice."""
        new = list({one.request_id: one for one in requests if one.request_id not in self.slots}.values())
        if not new:
            return
        slots = [self.free_slots.pop() for _ in new]
        for request, slot in zip(new, slots, strict=True):
            self.slots[request.request_id] = slot
            self.top_logprobs[request.request_id] = dict(request.progress.window.top_logprobs)
        # No window reaches past the model's length, whatever size was asked for; the state stays that wide for all.
        max_rows = max(min(request.decode.max_rows, request.decode.max_positions) for request in new)
        if max_rows > self.state.tokens.shape[1]:
            self.state = self.state.widened(1 << (max_rows - 1).bit_length())  # a power of two, as kernels like it
        windows, state = [request.progress.window for request in new], self.state
        rest = [[0] * (state.tokens.shape[1] - len(window.tokens)) for window in windows]
        both = list(zip(windows, rest, strict=True))
        values = [
            (state.cached, torch.tensor([window.cached for window in windows])),
            (state.width, torch.tensor([len(window.tokens) for window in windows])),
            (state.tokens, torch.tensor([[*(token or 0 for token in w.tokens), *zeros] for w, zeros in both])),
            (state.filled, torch.tensor([[*(token is not None for token in w.tokens), *zeros] for w, zeros in both])),
            (state.logprobs, torch.tensor([[*w.logprobs, *zeros] for w, zeros in both])),
        ]
        scatter_rows(slots, values)

    def propose(self, plan: StepPlan) -> None:
        """Put the drafts from the text into the windows of the plan, which must be loaded, in place of their own. Does
        not wait for the device."""
        proposed = [(one, one.proposal) for one in plan.scheduled if one.proposal is not None and one.proposal.most]
        if not proposed:
            return
        limits = [_limits(one, plan) for one, _ in proposed]
        slots = [self.slots[one.request.request_id] for one, _ in proposed]
        if self.device.type == "cpu":
            for slot, limit, (_, proposal) in zip(slots, limits, proposed, strict=True):
                propose_one(self.state, slot, *limit, proposal)
            return
        widest = max(len(proposal.tokens) for _, proposal in proposed)
        numbers = [
            [slot, *limit, len(one.tokens), one.known, one.most, *one.tokens, *[0] * (widest - len(one.tokens))]
            for slot, limit, (_, one) in zip(slots, limits, proposed, strict=True)
        ]
        sent = to_device_async(torch.tensor(numbers), self.device)
        index, row_budget, max_drafts, max_positions, count, known, most = sent[:, :7].unbind(1)
        proposals = Proposals(sent[:, 7:], count, known, most)
        self.state.put(index, propose(self.state.take(index), row_budget, max_drafts, max_positions, proposals))

    def keep_top_logprobs(
        self, requests: Sequence[Request], sequence: Tensor, target: Tensor, logprobs: Tensor
    ) -> None:
        """Call ``keep_top`` for the most probable tokens by ``logprobs`` [L, V]."""
        top = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[1]), dim=1)
        self.keep_top(requests, sequence.tolist(), target.tolist(), top.indices.tolist(), top.values.tolist())

    def keep_top(
        self,
        requests: Sequence[Request],
        sequence: Sequence[int],
        target: Sequence[int],
        tokens: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
    ) -> None:
        """Remember the top log-probabilities for every position that this step may fill; emission reads the last ones.
        ``sequence`` and ``target`` are each row's index in ``requests`` and its position. ``tokens`` and ``logprobs``
        are the most probable ones, at least as many as the request asks for.

        The next step overwrites a masked position that stays masked. When verifying, the masked row of a position comes
        after the filled row that decides it, so the first row written for a position wins.
        """
        written: set[tuple[int, int]] = set()
        for s, position, ids, values in zip(sequence, target, tokens, logprobs, strict=True):
            count = requests[s].params.logprobs
            if count is not None and (s, position) not in written:
                written.add((s, position))
                kept = self.top_logprobs[requests[s].request_id]
                kept[position] = list(zip(ids[:count], values[:count], strict=True))

    def pop_top_logprobs(self, request: Request, count: int) -> list[TopLogprobs]:
        """The top log-probabilities of the next ``count`` tokens, which have become final; empty if not requested."""
        if request.params.logprobs is None:
            return []
        kept, first = self.top_logprobs[request.request_id], request.next_position
        return [kept.pop(first + i) for i in range(count)]

    def unload(self, request: Request) -> None:
        """Free the request's slot, if it has one."""
        slot = self.slots.pop(request.request_id, None)
        if slot is not None:
            self.free_slots.append(slot)
            del self.top_logprobs[request.request_id]

    def snapshot(self, request: Request) -> WindowSnapshot:
        """The request's window as it stands, or the one it came with, if it never ran. Waits for the device."""
        slot = self.slots.get(request.request_id)
        if slot is None:
            return request.progress.window
        width = int(self.state.width[slot])
        tokens, filled = self.state.tokens[slot, :width].tolist(), self.state.filled[slot, :width].tolist()
        return WindowSnapshot(
            cached=int(self.state.cached[slot]),
            tokens=tuple(t if f else None for t, f in zip(tokens, filled, strict=True)),
            logprobs=tuple(self.state.logprobs[slot, :width].tolist()),
            top_logprobs=dict(self.top_logprobs[request.request_id]),
        )


def _limits(one: ScheduledRequest, plan: StepPlan) -> tuple[int, int, int]:
    """Row budget, most drafts of masked rows, and positions of a window, limited by the rows that there are
    pages for."""
    decode = one.request.decode
    drafts = min(decode.max_drafts, plan.max_drafts) if decode.is_adaptive else decode.max_drafts
    return min(decode.row_budget, one.count), drafts, decode.max_positions
