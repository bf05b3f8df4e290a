# SPDX-License-Identifier: Apache-2.0
"""Auto decoding with a fixed row budget, for measurements: the engine follows orders, and counts drafts if you ask it
to."""

from wedlm.algorithm.params import drafts_of
from wedlm.engine.adaptive.draft_budget import Budget, DraftBudget
from wedlm.engine.adaptive.step_costs import StepCosts


class FixedRows(DraftBudget):
    """Keeps one budget."""

    def choose(self, num_windows: int, most: int) -> Budget:
        return self.within(most)


class CountedRows(FixedRows):
    """Keeps ``rows`` and counts what becomes of drafts: ``trials[d]`` drafts whose d predecessors were accepted, of
    which ``accepted[d]`` were accepted themselves. To measure a model's own rates, draft every masked row, however
    uncertain (``wedlm_draft_entropy`` 1e9)."""

    def __init__(self, rows: int) -> None:
        super().__init__(StepCosts([(1, 1.0)], padded=False), budget=Budget.of(rows))
        self.trials, self.accepted = [0] * drafts_of(rows), [0] * drafts_of(rows)

    def observe(self, num_drafts: int, num_accepted: int, longest: int, num_windows: int, count: int = 1) -> None:
        for depth in range(min(num_drafts, num_accepted + 1)):
            self.trials[depth] += count
            self.accepted[depth] += count * (depth < num_accepted)

    @property
    def shares(self) -> list[float]:
        """Shares of drafts accepted by depth, given their predecessors, up to the last depth with a trial."""
        return [a / t for a, t in zip(self.accepted, self.trials, strict=True) if t]
