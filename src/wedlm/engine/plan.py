# SPDX-License-Identifier: Apache-2.0
"""What a step is to do and what it did, as plain data between the scheduler, the controller and the executors."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from wedlm.algorithm.lookup import Proposal
from wedlm.engine.request import Request, TopLogprobs


@dataclass(slots=True)  # made for each window of each step, and four times slower to make if frozen
class ScheduledRequest:
    """One request's share of a step: its decoding window, or a chunk of ``count`` tokens to cache, from ``start`` on.
    For a window both are upper bounds. A prompt's last chunk and the first window may be two shares of one step.
    ``pages`` covers slots 0 .. start + count - 1. ``proposal``: drafts from the text for a window."""

    request: Request
    is_window: bool
    count: int
    pages: list[int]
    start: int
    proposal: Proposal | None = None

    def num_lookup_drafts(self) -> int:
        """How many drafts from the text the step verified. Ask before its tokens are appended."""
        if self.proposal is None or not self.proposal.most:
            return 0
        text = self.request.output.tokens
        return len(self.proposal.drafts(len(text), text[-1], self.request.decode.max_positions))


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one forward does, windows first. ``preempted`` requests have lost their pages; save their windows before
    anything runs. ``row_budget`` and ``max_drafts``: the most rows, and the most drafts among them, for a window of
    auto decoding in this step."""

    scheduled: list[ScheduledRequest]
    preempted: list[Request] = field(default_factory=list)
    row_budget: int = 1
    max_drafts: int = 0


@dataclass(slots=True)  # as ``ScheduledRequest``
class WindowResult:
    """What a step did to one window: tokens that became final, rows it ran, tokens that now have valid keys, drafts
    that it verified."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: Sequence[TopLogprobs]
    num_rows: int
    num_cached: int
    num_drafts: int


StepResults = list[WindowResult | None]  # one for each scheduled request of the plan; None for chunks
