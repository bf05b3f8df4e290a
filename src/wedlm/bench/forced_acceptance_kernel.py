# SPDX-License-Identifier: Apache-2.0
"""``force_choices`` for packed rows of a captured step, in one kernel, so that it adds little to the step. It is
separate from ``forced_acceptance`` because it needs triton, which is optional."""

import triton
import triton.language as tl
from torch import Tensor

from wedlm.kernels.window_verified import VerifiedRows


@triton.jit
def _force(  # type: ignore[no-untyped-def]
    choice_ptr, tokens_ptr, target_ptr, positions_ptr, sequence_ptr, row_start_ptr, chance_ptr, count_ptr, out_ptr,
    num_others,
    T: tl.constexpr, DEPTHS: tl.constexpr, FIRST_OTHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    inside = row < T
    more = row + 1 < T
    count = tl.load(count_ptr)
    # A filled row's choice stands one position after the row's own; a masked row's at it.
    filled = tl.load(target_ptr + row, mask=inside, other=0) > tl.load(positions_ptr + row, mask=inside, other=0)
    next_filled = tl.load(target_ptr + row + 1, mask=more, other=0) > tl.load(
        positions_ptr + row + 1, mask=more, other=0
    )
    sequence = tl.load(sequence_ptr + row, mask=inside, other=0)
    same = tl.load(sequence_ptr + row + 1, mask=more, other=-1) == sequence
    depth = row - tl.load(row_start_ptr + sequence, mask=inside, other=0).to(tl.int32)
    chance = tl.load(chance_ptr + tl.minimum(tl.maximum(depth, 0), DEPTHS - 1), mask=inside, other=0.0)
    following = tl.load(tokens_ptr + row + 1, mask=more, other=0)
    choice = tl.load(choice_ptr + row, mask=inside, other=0)
    forced = tl.where(tl.rand(count, row) < chance, following, (following + 1) % num_others + FIRST_OTHER)
    tl.store(out_ptr + row, tl.where(filled & next_filled & same, forced, choice), mask=inside)
    tl.store(count_ptr, count + 1)


def force_rows(
    rows: VerifiedRows, choice: Tensor, by_depth: Tensor, count: Tensor, num_others: int, first_other: int
) -> Tensor:
    """Choices [T] of packed rows with AR's choice after each draft forced.

    ``by_depth`` to ``first_other`` are those of ``Chances``; ``count`` is increased by one.
    """
    out = choice.new_empty(choice.shape)
    _force[(1,)](
        choice, rows.tokens, rows.target, rows.positions, rows.sequence, rows.row_start, by_depth, count, out,
        num_others, T=len(choice), DEPTHS=len(by_depth), FIRST_OTHER=first_other,
        BLOCK=triton.next_power_of_2(len(choice)), num_warps=8,
    )  # fmt: skip
    return out
