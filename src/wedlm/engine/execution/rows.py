# SPDX-License-Identifier: Apache-2.0
"""The rows of a step's windows, and the choice of one token per row: shared by the eager step and the device step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from wedlm.algorithm.reorder import PackedRows, leading_run, pack_rows, topological_order
from wedlm.algorithm.sample import SamplingBatch, ban_tokens, choose_tokens, entropy_and_logsumexp
from wedlm.algorithm.verify import RowLayout, row_layout
from wedlm.algorithm.window import RowResults, WindowParams, WindowState
from wedlm.attention.base import RowVisibility
from wedlm.engine.execution.sampling_tensors import BatchFlags, BatchParams

Report = Literal["none", "choice", "all"]  # log-probabilities: none, the chosen token's, or all tokens', too
Constrain = Callable[[Tensor, Tensor, SamplingBatch], None]  # (logits [L, V], in place; their logsumexp; sampling)


@dataclass(frozen=True)
class WindowRows:
    """T rows of S windows, packed window by window, then padding, if any. All fields but ``layout`` are by row [T].

    ``column``: the window column that a row holds. ``needs_logits``: streaming takes a token for each masked row, and
    verification for every row. ``is_next``: the last row of a leading filled run, whose logits decide the first masked
    column in causal streaming; it needs them, too.
    """

    packed: PackedRows
    layout: RowLayout
    column: Tensor
    filled: Tensor
    tokens: Tensor
    positions: Tensor
    visibility: RowVisibility
    needs_logits: Tensor
    is_next: Tensor

    @property
    def target(self) -> Tensor:
        """The positions that the rows' predictions are for."""
        return self.positions + self.filled

    @property
    def target_column(self) -> Tensor:
        """The columns that the rows' results belong to."""
        return self.column + self.is_next


def window_rows(
    state: WindowState, params: WindowParams, num_rows: int, mask_token_id: int, padded: bool
) -> WindowRows:
    """The rows of windows after ``extend``. ``num_rows`` is their sum, or if ``padded`` an upper bound of it. Padding
    is not filled, needs no logits and has token ``mask_token_id``, position 0 and visibility (0, 0)."""
    order = topological_order(state.filled, state.width)
    packed = pack_rows(state.width, num_rows)
    sequence = packed.sequence
    column = order[sequence, packed.row]
    filled = state.filled[sequence, column]
    if padded:
        filled = filled & packed.real
    run = leading_run(state.filled)
    last = torch.where(params.causal & (run < state.width), run - 1, -1)
    is_next = filled & (column == last[sequence])
    needs_logits = ~filled | is_next | params.is_verified[sequence]
    tokens = torch.where(filled, state.tokens[sequence, column], mask_token_id)
    layout = row_layout(state.filled, state.width, params.is_verified)
    offset, shared, own_start = (part[sequence, column] for part in (layout.offset, layout.shared, layout.own_start))
    positions = (state.cached - params.suffix_length)[sequence] + offset
    if padded:
        needs_logits = needs_logits & packed.real
        positions, shared, own_start = (part.where(packed.real, 0) for part in (positions, shared, own_start))
    visibility = RowVisibility(shared, own_start)
    return WindowRows(packed, layout, column, filled, tokens, positions, visibility, needs_logits, is_next)


def with_adapters(
    masked: Tensor | None, slots: Sequence[int], counts: Sequence[int], device: torch.device
) -> tuple[Tensor | None, ...]:
    """The last arguments of ``RowsModel``: masked rows and, if there are any, the slots of the rows' adapters, given
    those of sequences of ``counts`` rows."""
    if not any(slots):
        return (masked,)
    adapters = torch.repeat_interleave(torch.tensor(slots), torch.tensor(counts))
    return masked, adapters.to(device)


@dataclass(frozen=True)
class RowChoices:
    """For each row with logits [L] the token chosen, and from the raw logits the entropy (nats) and the choice's
    log-probability. ``raw_logprobs`` [L, V]: those of all tokens, if requested."""

    choice: Tensor
    entropy: Tensor
    logprobs: Tensor
    raw_logprobs: Tensor | None = None

    def by_column(
        self, sequence: Tensor, column: Tensor, shape: torch.Size, is_next: Tensor, real: Tensor | None = None
    ) -> RowResults:
        """Scatter to windows of ``shape`` [S, C]. ``column``: ``WindowRows.target_column``. ``real``: the rows that
        count; None: all."""
        num_windows, capacity = shape

        def scatter(value: Tensor, mine: Tensor) -> Tensor:
            at = sequence.where(mine, num_windows), column  # the others write to a window that does not exist
            return value.new_zeros(num_windows + 1, capacity).index_put_(at, value)[:num_windows]

        own, following = ~is_next, is_next
        if real is not None:
            own, following = own & real, following & real
        decided = scatter(following, following)
        choice, next_choice = scatter(self.choice, own), scatter(self.choice, following)
        return RowResults(
            choice=torch.where(decided, next_choice, choice),
            entropy=scatter(self.entropy, own).masked_fill(decided & (choice != next_choice), torch.inf),
            logprobs=torch.where(decided, scatter(self.logprobs, following), scatter(self.logprobs, own)),
        )


class ChooseRowTokens(Protocol):
    """``choose_row_tokens``, or a function that does the same with the logits of one rank."""

    def __call__(
        self,
        logits: Tensor,
        params: BatchParams,
        index: Tensor,
        target: Tensor,
        flags: BatchFlags,
        mask_token_id: int,
        /,
        *,
        report: Report,
        constrain: Constrain | None = None,
    ) -> RowChoices: ...


def choose_row_tokens(
    logits: Tensor,
    params: BatchParams,
    index: Tensor,
    target: Tensor,
    flags: BatchFlags,
    mask_token_id: int,
    *,
    report: Report,
    constrain: Constrain | None = None,
) -> RowChoices:
    """Choose one token per row of logits [L, V] (float32), which may be changed in place.

    ``index`` [L] is each row's place in ``params``, and ``target`` [L] the position that its token is for. ``report``
    says which log-probabilities are needed; the others are meaningless, and so are entropies unless some are needed or
    ``flags.entropy`` is set.
    """
    entropy = logsumexp = logits.new_zeros(len(logits))
    if flags.entropy or report != "none":
        entropy, logsumexp = entropy_and_logsumexp(logits)
    raw = logits
    if report != "none":
        logits = logits.clone()
    stop_tokens = params.stop_tokens[index][:, : None if flags.eos_banned else 0]  # nothing to scatter otherwise
    logits = ban_tokens(logits, mask_token_id, stop_tokens, target < params.min_eos_position[index])
    sampling = params.sampling(index, target, flags)
    if constrain is not None:
        constrain(logits, logsumexp, sampling)
    choice = choose_tokens(logits, sampling)
    logprobs = raw.gather(1, choice[:, None])[:, 0] - logsumexp
    return RowChoices(choice, entropy, logprobs, raw - logsumexp[:, None] if report == "all" else None)
