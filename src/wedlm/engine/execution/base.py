# SPDX-License-Identifier: Apache-2.0
"""What all executors of a step have in common: their interface to the engine, and the model as they see it."""

from typing import Protocol, TypeVar

from torch import Tensor

from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.engine.adaptive.step_costs import StepCosts
from wedlm.engine.execution.pending import PendingStep
from wedlm.engine.plan import StepPlan
from wedlm.engine.request import Request

A_contra = TypeVar("A_contra", contravariant=True)  # the kind of attention that a model calls
A_co = TypeVar("A_co", covariant=True)


class RowsModel(Protocol[A_contra]):
    """A model over packed rows: logits [L, V] of the rows ``logits_rows`` [L]. ``masked``: indices of masked rows.
    ``adapters`` [T]: the slots of the rows' adapters, 0 for none; None: no row has one."""

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: A_contra,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
        adapters: Tensor | None = None,
        /,
    ) -> Tensor: ...


class PlanAttention(Protocol[A_co]):
    """Plans the attention of one step, once for all layers."""

    def __call__(self, cache: KVCache, batch: ExtendBatch, /) -> A_co: ...


class StepExecutor(Protocol):
    """Runs the plan of a step.

    It finds the windows of the plan's requests in ``Windows`` (and loads those that have no slot yet), puts the keys of
    all scheduled rows into the cache, advances the windows, and reports what became final. ``EagerStep`` is the
    reference: every other executor gives its results. Results are in the order of the plan.
    """

    @property
    def runs_ahead(self) -> bool:
        """Whether ``launch`` returns before the step is done, so that the host can read it while the next one runs."""
        ...

    @property
    def has_padded_costs(self) -> bool:
        """Whether a step costs as much as one of the next larger captured size."""
        ...

    def takes(self, plan: StepPlan) -> bool:
        """Whether this executor can run the plan. Looks only at the plan."""
        ...

    def launch(self, plan: StepPlan) -> PendingStep:
        """Run the step, or start it."""
        ...

    def unload(self, request: Request) -> None:
        """Drop what is kept for the request, whose slot in ``Windows`` is being freed."""
        ...

    def measure_costs(self, costs: StepCosts, most_rows: int) -> None:
        """Add the missing sizes up to ``most_rows`` rows to the table, as far as that takes no more than about a
        second."""
        ...
