# SPDX-License-Identifier: Apache-2.0
"""Which positions to fill, against a plain loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wedlm.algorithm.select import select_fill


def select_by_loop(
    entropy: list[float], masked: list[bool], threshold: float | None, penalty: float, causal: bool
) -> list[bool]:
    columns = [c for c, flag in enumerate(masked) if flag]
    adjusted = {c: entropy[c] + penalty * (c - columns[0]) for c in columns}
    if causal and columns:
        adjusted[columns[0]] = -math.inf
    chosen = [c for c in columns if threshold is not None and adjusted[c] < threshold]
    if not chosen and columns:
        chosen = [min(columns, key=lambda c: (adjusted[c], c))]
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
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_select_fill_equals_a_loop(batch):
    """Ties, H' equal to τ (not below it), τ None, and rows in which nothing is masked."""
    rows, thresholds, penalties, causal = zip(*batch, strict=True)
    entropy = [[h for h, _ in row] for row in rows]
    masked = [[flag for _, flag in row] for row in rows]
    threshold = torch.tensor([-math.inf if t is None else t for t in thresholds], dtype=torch.double)
    penalty = torch.tensor(penalties, dtype=torch.double)
    found = select_fill(torch.tensor(entropy), torch.tensor(masked), threshold, penalty, torch.tensor(causal))
    each = zip(entropy, masked, thresholds, penalties, causal, strict=True)
    expected = [select_by_loop(*one) for one in each]
    assert found.tolist() == expected


@pytest.mark.parametrize("entropy", [[math.nan, 1.0], [1.0, math.nan], [math.nan, math.nan]], ids=str)
@pytest.mark.parametrize("threshold", [-math.inf, 0.4])
def test_nan_does_not_stop_the_progress(entropy, threshold):
    """A float16 model that overflows gives nan logits: a poor text, but an end."""
    tau, penalty = (torch.tensor([x], dtype=torch.double) for x in (threshold, 0.02))
    masked = torch.ones(1, 2, dtype=torch.bool)
    for causal in (False, True):
        assert select_fill(torch.tensor([entropy]), masked, tau, penalty, torch.tensor([causal])).sum() >= 1
