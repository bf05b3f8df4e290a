# SPDX-License-Identifier: Apache-2.0
"""Drafts accepted at will: random weights refuse all of them, so a checkpoint's acceptance is put in their place.

Inside the step, captured or not, AR's choice after each draft becomes the draft itself with the chance of its depth,
and something else otherwise. All else of the step, its cost included, is as it is; the texts mean nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wedlm.algorithm.window import RowResults, WindowParams, WindowState
from wedlm.engine import runner as plain_runner
from wedlm.engine.adaptive.draft_budget import AutoRows
from wedlm.engine.engine import Engine

FIRST_OTHER = 10
_DEPTHS = 8  # what lies deeper has the last one's chance


class Chances:
    """The rates in force, on the device: captured steps read them anew each time."""

    def __init__(self, device: torch.device, vocab_size: int) -> None:
        assert vocab_size > 32, "refused drafts are replaced by tokens from 10 on"
        self.num_others = min(1000, vocab_size - FIRST_OTHER)
        self.by_depth = torch.zeros(_DEPTHS, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)  # of steps: what makes each draw another

    def set(self, rates: Sequence[float]) -> None:
        """Share of drafts accepted by depth, given their predecessors."""
        padded = [*rates, *[rates[-1]] * _DEPTHS][:_DEPTHS]
        self.by_depth.copy_(torch.tensor(padded))

    def another(self, token: Tensor) -> Tensor:
        """A token that is not this one, and neither a mask nor an end in random weights' vocabularies."""
        return (token + 1) % self.num_others + FIRST_OTHER


@contextmanager
def injected(engine: Engine) -> Iterator[Chances]:
    """Meanwhile verification accepts at the rates that ``set`` was last given, at first none. Auto decoding begins anew
    before and after: what it learns from one says nothing of the other."""
    chances = Chances(engine.runner.device, engine.config.vocab_size)
    before = plain_runner.update_windows

    def update_windows(state: WindowState, run: Tensor, results: RowResults, params: WindowParams) -> Any:
        return before(state, run, replace(results, choice=force_choices(state, results, params, chances)), params)

    forget = getattr(engine.runner, "forget_graphs", lambda: None)
    restore = [_swap(plain_runner, "update_windows", update_windows)]
    if hasattr(engine.runner, "forget_graphs"):
        restore.append(_swap_captured(chances))
    forget()
    _begin_anew(engine)
    try:
        yield chances
    finally:
        for put_back in restore:
            put_back()
        forget()
        _begin_anew(engine)


def _begin_anew(engine: Engine) -> None:
    if engine.auto is not None:
        engine.auto = AutoRows(engine.auto.costs)


def force_choices(state: WindowState, results: RowResults, params: WindowParams, chances: Chances) -> Tensor:
    """``results.choice`` with AR's choice after each draft forced; streaming windows as they are. [S, C]"""
    column = torch.arange(state.tokens.shape[1], device=state.tokens.device)
    following = state.tokens.roll(-1, dims=1)
    drafted = state.filled.roll(-1, dims=1) & state.filled & params.verifies[:, None]
    drafted[:, -1] = False
    chance = chances.by_depth[column.clamp(max=_DEPTHS - 1)]
    accepted = torch.rand(drafted.shape, device=column.device) < chance
    return torch.where(drafted, torch.where(accepted, following, chances.another(following)), results.choice)


def _swap(owner: Any, name: str, value: Any) -> Any:
    """Sets an attribute; returns what sets it back."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _swap_captured(chances: Chances) -> Any:
    from wedlm.bench.forced_acceptance_kernel import force_rows
    from wedlm.engine import device_step

    before = device_step.update_verified

    def update_windows(
        state: WindowState, params: Any, index: Tensor, rows: Any, choice: Tensor, *others: Tensor
    ) -> Any:
        forced = force_rows(rows, choice, chances.by_depth, chances.count, chances.num_others, FIRST_OTHER)
        return before(state, params, index, rows, forced, *others)

    return _swap(device_step, "update_verified", update_windows)
