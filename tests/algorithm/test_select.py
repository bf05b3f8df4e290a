# SPDX-License-Identifier: Apache-2.0
"""Which positions to fill, against a plain loop."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.select import select_fill


def select_by_loop(
    entropy: list[float], masked: list[bool], threshold: float | None, penalty: float, causal: bool, least: int
) -> list[bool]:
    columns = [c for c, flag in enumerate(masked) if flag]
    adjusted = {c: entropy[c] + penalty * (c - columns[0]) for c in columns}
    if causal:
        certain = list(itertools.takewhile(lambda c: threshold is not None and adjusted[c] < threshold, columns))
        return [c in (certain or columns[:1]) for c in range(len(masked))]
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
            st.booleans(),
            st.integers(1, 7),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_select_fill_equals_a_loop(batch):
    """Ties, H' equal to τ (not below it), τ None, and rows in which nothing is masked."""
    entropy = [[h for h, _ in row] for row, *_ in batch]
    masked = [[flag for _, flag in row] for row, *_ in batch]
    threshold = torch.tensor([-math.inf if t is None else t for _, t, *_ in batch], dtype=torch.double)
    penalty = torch.tensor([p for _, _, p, *_ in batch], dtype=torch.double)
    causal = torch.tensor([flag for *_, flag, _ in batch])
    given = torch.tensor(entropy), torch.tensor(masked), threshold, penalty, causal
    for least in (None, torch.tensor([n for *_, n in batch])):
        found = select_fill(*given, least)
        expected = [
            select_by_loop(h, m, t, p, flag, 1 if least is None else n)
            for h, m, (_, t, p, flag, n) in zip(entropy, masked, batch, strict=True)
        ]
        assert found.tolist() == expected


@pytest.mark.parametrize(
    ("remasking", "steps", "filled"),
    [
        ("low_confidence_static", None, [2]),
        ("low_confidence_static", 2, [2, 0]),
        ("low_confidence_static", 1, [0, 1, 2, 3]),
        ("low_confidence_dynamic", None, [2, 0]),
        ("low_confidence_dynamic", 1, [0, 1, 2, 3]),
    ],
)
def test_the_rule_of_sdar(remasking, steps, filled):
    """By hand from the rule of SDAR's generate.py: a block of 4, probabilities 0.9, 0.2, 0.95 and 0.85, the last of
    which does not exceed the threshold; ``steps`` forwards for the block."""
    params = DecodeParams("block", 4, remasking=remasking, denoising_steps=steps, confidence_threshold=0.85)
    uncertainty = -torch.tensor([[0.9, 0.2, 0.95, 0.85]], dtype=torch.double).log()
    threshold, penalty = torch.tensor([params.fill_below], dtype=torch.double), torch.zeros(1, dtype=torch.double)
    least = torch.tensor([params.fill_schedule[0]])
    causal = torch.tensor([False])
    found = select_fill(uncertainty, torch.ones(1, 4, dtype=torch.bool), threshold, penalty, causal, least)
    assert found.nonzero()[:, 1].tolist() == sorted(filled)


def test_longer_steps_come_first():
    """8 positions in 3 forwards are 3, 3 and 2; no forward is left without any."""
    each, longer = DecodeParams("block", 8, remasking="low_confidence_static", denoising_steps=3).fill_schedule
    assert [each + (done < longer) for done in (0, 3, 6)] == [3, 3, 2]
    assert DecodeParams("block", 4, remasking="low_confidence_static", denoising_steps=9).fill_schedule == (1, 0)


@pytest.mark.parametrize("entropy", [[math.nan, 1.0], [1.0, math.nan], [math.nan, math.nan]], ids=str)
@pytest.mark.parametrize("threshold", [-math.inf, 0.4])
def test_nan_does_not_stop_the_progress(entropy, threshold):
    """A float16 model that overflows gives nan logits: a poor text, but an end."""
    tau, penalty = (torch.tensor([x], dtype=torch.double) for x in (threshold, 0.02))
    masked = torch.tensor([[False, True, True]])
    for causal, least in itertools.product((False, True), (None, torch.tensor([1]), torch.tensor([2]))):
        filled = select_fill(torch.tensor([[0.0, *entropy]]), masked, tau, penalty, torch.tensor([causal]), least)
        assert filled.sum() >= (1 if least is None or causal else int(least))
        assert not filled[0, 0]
