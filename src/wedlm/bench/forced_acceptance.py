# SPDX-License-Identifier: Apache-2.0
"""Accept drafts at given rates: random weights refuse all drafts, so this imposes a checkpoint's acceptance on them.

Inside the step, captured or not, AR's choice after each draft becomes the draft itself with the probability of its
depth, and something else otherwise. Everything else in the step, including its cost, stays the same; the texts mean
nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wedlm.algorithm.window import RowResults, WindowParams, WindowState
from wedlm.engine.adaptive.draft_budget import DraftBudget
from wedlm.engine.engine import Engine

FIRST_OTHER = 10
_DEPTHS = 8  # what lies deeper has the last one's chance


class Chances:
    """The rates in force, on the device, where captured steps read them each time."""

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        assert vocab_size > 32, "refused drafts are replaced by tokens from 10 on"
        self.first_other = FIRST_OTHER
        self.num_others = min(1000, vocab_size - FIRST_OTHER)
        self.by_depth = torch.zeros(_DEPTHS, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)  # of steps: what makes each draw another

    def set(self, rates: Sequence[float]) -> None:
        """Set the share of drafts accepted by depth, given their predecessors."""
        padded = [*rates, *[rates[-1]] * _DEPTHS][:_DEPTHS]
        self.by_depth.copy_(torch.tensor(padded))

    def another(self, token: Tensor) -> Tensor:
        """A different token, which is neither a mask nor an end token in random weights' vocabularies."""
        return (token + 1) % self.num_others + FIRST_OTHER


@contextmanager
def injected(engine: Engine) -> Iterator[Chances]:
    """Inside the block verification accepts at the rates that ``set`` was last given, at first none. Auto decoding
    starts over before and after, because what it learns from one says nothing about the other."""
    chances = Chances(engine.runner.device, engine.config.vocab_size)
    direct: list[Any] = [one for one in engine.runner.executors if not one.runs_ahead]
    captured = _device_steps(engine)
    for step in direct:
        step.force_choice = lambda state, results, params: force_choices(state, results, params, chances)
    for step in captured:
        from wedlm.bench.forced_acceptance_kernel import force_rows

        step.force_choice = lambda rows, choice: force_rows(
            rows, choice, chances.by_depth, chances.count, chances.num_others, FIRST_OTHER
        )
    _start_over(engine)
    try:
        yield chances
    finally:
        for step in [*direct, *captured]:
            step.force_choice = None
        _start_over(engine)


def _device_steps(engine: Engine) -> list[Any]:
    """The device steps inside captured ones, if there are any."""
    return [one.step for one in engine.runner.executors if one.runs_ahead]  # type: ignore[attr-defined]


def _start_over(engine: Engine) -> None:
    """Forget captured steps, and what auto decoding has learnt about drafts."""
    for one in engine.runner.executors:
        if one.runs_ahead:
            one.graphs.clear()  # type: ignore[attr-defined]
    controller = engine.controller
    if controller.draft_budget is not None:
        controller.draft_budget = DraftBudget(controller.costs)


def force_choices(state: WindowState, results: RowResults, params: WindowParams, chances: Chances) -> Tensor:
    """``results.choice`` with AR's choice after each draft forced; streaming windows stay as they are. [S, C]"""
    column = torch.arange(state.tokens.shape[1], device=state.tokens.device)
    following = state.tokens.roll(-1, dims=1)
    drafted = state.filled.roll(-1, dims=1) & state.filled & params.is_verified[:, None]
    drafted[:, -1] = False
    chance = chances.by_depth[column.clamp(max=_DEPTHS - 1)]
    accepted = torch.rand(drafted.shape, device=column.device) < chance
    return torch.where(drafted, torch.where(accepted, following, chances.another(following)), results.choice)
