# SPDX-License-Identifier: Apache-2.0
"""Runs the steps of an engine, each with the first executor that accepts the plan."""

from collections.abc import Sequence

import torch

from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.execution.base import StepExecutor
from wedlm.engine.execution.eager_step import EagerStep
from wedlm.engine.execution.pending import PendingStep
from wedlm.engine.execution.windows import Windows
from wedlm.engine.plan import StepPlan, StepResults
from wedlm.engine.request import Request, WindowSnapshot
from wedlm.engine.resolve_options import make_current


class Runner:
    """``preferred`` executors in order; ``eager`` takes the plans that they do not."""

    def __init__(self, windows: Windows, eager: EagerStep, preferred: Sequence[StepExecutor] = ()) -> None:
        self.windows, self.cache, self.eager = windows, eager.cache, eager
        executors: tuple[StepExecutor, ...] = (*preferred, eager)
        self.executors = executors
        self._ahead = [one for one in executors if one.runs_ahead]
        self._direct = [one for one in executors if not one.runs_ahead]
        self.has_padded_costs = executors[0].has_padded_costs

    @property
    def device(self) -> torch.device:
        return self.windows.device

    def measure_costs(self, costs: StepCosts, most_rows: int) -> None:
        """Measure the costs of the preferred executor."""
        make_current(self.device)  # steps may run in any thread
        self.executors[0].measure_costs(costs, most_rows)

    def can_launch(self, plan: StepPlan) -> bool:
        """Whether ``launch`` accepts the plan: it starts the step, and the host may read it while the next one runs."""
        return any(one.takes(plan) for one in self._ahead)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step that ``can_launch`` accepted."""
        make_current(self.device)  # steps may run in any thread
        return _first_that_takes(self._ahead, plan).launch(plan)

    def run(self, plan: StepPlan) -> StepResults:
        """Run any step to its end."""
        make_current(self.device)  # steps may run in any thread
        return _first_that_takes(self._direct, plan).launch(plan).wait()

    def suspend(self, request: Request) -> WindowSnapshot:
        """Free the request's slot and return its window. Waits for the device."""
        window = self.windows.snapshot(request)
        self.unload(request)
        return window

    def unload(self, request: Request) -> None:
        """Free what the request holds on the device, if anything."""
        for one in self.executors:
            one.unload(request)
        self.windows.unload(request)


def _first_that_takes(executors: Sequence[StepExecutor], plan: StepPlan) -> StepExecutor:
    # The last one need not be asked: it costs a look at every window.
    return next(one for one in executors if one is executors[-1] or one.takes(plan))
