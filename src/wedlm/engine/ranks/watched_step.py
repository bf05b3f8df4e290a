# SPDX-License-Identifier: Apache-2.0
"""Captured steps whose exchanges may wait for a rank that never comes: raise an error instead of waiting forever."""

from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.execution.captured_step import CapturedStep
from wedlm.engine.execution.pending import PendingStep
from wedlm.engine.plan import StepPlan, StepResults
from wedlm.engine.ranks.processes import Ranks


class WatchedStep(CapturedStep):
    """``CapturedStep`` with other ranks. Raises RankFault if one of them fails or takes too long."""

    ranks: Ranks

    def measure_costs(self, costs: StepCosts, most_rows: int) -> None:
        with self.ranks.guarded():
            super().measure_costs(costs, most_rows)

    def launch(self, plan: StepPlan) -> PendingStep:  # type: ignore[override]
        with self.ranks.guarded():
            return _Watched(super().launch(plan), self.ranks)


class _Watched:
    def __init__(self, pending: PendingStep, ranks: Ranks) -> None:
        self._pending, self._ranks = pending, ranks

    def wait(self) -> StepResults:
        with self._ranks.guarded(), self._ranks.waiting():
            return self._pending.wait()
