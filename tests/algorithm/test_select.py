# SPDX-License-Identifier: Apache-2.0
"""Which positions to fill, against a plain loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wedlm.algorithm.select import select_fill


def select_by_loop(
    entropy: list[float], masked: list[bool], threshold: float | None, penalty: float, least: int
) -> list[bool]:
    columns = [c for c, flag in enumerate(masked) if flag]
    adjusted = {c: entropy[c] + penalty * (c - columns[0]) for c in columns}
    chosen = [c for c in columns if threshold is not None and adjusted[c] < threshold]
    if len(chosen) < least:
        chosen = sorted(columns, key=lambda c: (adjusted[c], c))[:least]
    return [c in chosen for c in range(len(masked))]


@settings(max_examples=250, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]) | st.floats(0, 12, width=32), st.booleans()),
                min_size=6,
                max_size=6,
            ),
            st.none() | st.sampled_from([0.0, 0.25, 0.5, 100.0, math.inf]),
            st.sampled_from([0.0, 0.02, 0.25, 1e30]),
            st.integers(1, 7),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_select_fill_equals_a_loop(batch):
    """Ties, H' equal to τ (not below it), τ None, and rows in which nothing is masked."""
    entropy = [[h for h, _ in row] for row, _, _, _ in batch]
    masked = [[flag for _, flag in row] for row, _, _, _ in batch]
    threshold = [-math.inf if t is None else t for _, t, _, _ in batch]
    penalty = torch.tensor([p for _, _, p, _ in batch], dtype=torch.double)
    numbers = torch.tensor(entropy), torch.tensor(masked), torch.tensor(threshold).double(), penalty
    for least in (None, torch.tensor([n for _, _, _, n in batch])):
        found = select_fill(*numbers, least)
        expected = [
            select_by_loop(h, m, t, p, 1 if least is None else n)
            for h, m, (_, t, p, n) in zip(entropy, masked, batch, strict=True)
        ]
        assert found.tolist() == expected


@pytest.mark.parametrize("entropy", [[math.nan, 1.0], [1.0, math.nan], [math.nan, math.nan]], ids=str)
@pytest.mark.parametrize("threshold", [-math.inf, 0.4])
def test_nan_does_not_stop_the_progress(entropy, threshold):
    """A float16 model that overflows gives nan logits: a poor text, but an end."""
    tau, penalty = (torch.tensor([x], dtype=torch.double) for x in (threshold, 0.02))
    masked = torch.tensor([[False, True, True]])
    for least in (None, torch.tensor([1]), torch.tensor([2])):
        filled = select_fill(torch.tensor([[0.0, *entropy]]), masked, tau, penalty, least)
        assert filled.sum() >= (1 if least is None else int(least))
        assert not filled[0, 0]
