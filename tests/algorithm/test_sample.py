# SPDX-License-Identifier: Apache-2.0
"""Choosing a token per row: bans, entropy and sampling against slow twins."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from wedlm.algorithm import reference
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.sample import (
    SamplingBatch,
    ban_tokens,
    choose_tokens,
    entropy_and_logsumexp,
)

CPU = torch.device("cpu")


def sampling_batch(params: list[DecodeParams], positions: list[int], dtype=torch.float32) -> SamplingBatch:
    sampled = [p for p in params if p.temperature > 0]
    return SamplingBatch(
        temperature=torch.tensor([p.temperature for p in params]),
        top_k=torch.tensor([p.top_k for p in params]),
        top_p=torch.tensor([p.top_p for p in params], dtype=dtype),
        seed=torch.tensor([p.seed for p in params]),
        position=torch.tensor(positions),
        any_sampled=bool(sampled),
        any_truncated=any(p.top_k > 0 or p.top_p < 1 for p in sampled),
    )


def choose(rows: list[list[float]], params: list[DecodeParams], positions: list[int]) -> list[int]:
    """Through the batched functions, bans included."""
    ends = [[*p.stop_token_ids, *[-1] * (2 - len(p.stop_token_ids))] for p in params]
    banned = [position < p.min_eos_position for p, position in zip(params, positions, strict=True)]
    mask = params[0].mask_token_id
    logits = ban_tokens(torch.tensor(rows), mask, torch.tensor(ends), torch.tensor(banned))
    return choose_tokens(logits, sampling_batch(params, positions)).tolist()


VOCAB = 9
# Multiples of 1/2 give many ties; huge and -inf logits must leave no nan.
LOGITS = st.one_of(
    st.floats(-8, 8, width=32),
    st.integers(-4, 4).map(lambda n: n / 2),
    st.sampled_from([-math.inf, -3e38, -1e30, 1e30, 3e38, 0.0, -0.0]),
)
ROW = st.lists(LOGITS, min_size=VOCAB, max_size=VOCAB) | st.lists(
    st.integers(-2, 2).map(float), min_size=VOCAB, max_size=VOCAB
)
PARAMS = st.builds(
    DecodeParams,
    decoding=st.just("streaming"),
    temperature=st.sampled_from([0.0, 1e-6, 1e-30, 1e-3, 0.3, 1.0, 1.0, 4.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, VOCAB, 100]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.31, 0.5, 0.77, 0.95, 0.9999]),
    seed=st.integers(-(2**63), 2**63 - 1),
    mask_token_id=st.just(VOCAB - 1),
    stop_token_ids=st.sampled_from([(), (0,), (3,), (0, 3)]),
    min_eos_position=st.sampled_from([0, 0, 50]),
)
ASKED = st.lists(st.tuples(ROW, PARAMS, st.integers(0, 100)), min_size=1, max_size=6)


@settings(max_examples=250, deadline=None)
@given(ASKED)
def test_choice_equals_the_reference(asked):
    rows, params, positions = (list(part) for part in zip(*asked, strict=True))
    for row in rows:
        assume(max(row[1:3] + row[4 : VOCAB - 1]) > -math.inf)  # some token that is never banned
    chosen = choose(rows, params, positions)
    for row, p, position, token in zip(rows, params, positions, chosen, strict=True):
        assert token == reference.choose_token(torch.tensor(row), position, p)
        assert token != p.mask_token_id
        assert row[token] > -math.inf


@settings(max_examples=100, deadline=None)
@given(ASKED)
def test_choice_does_not_depend_on_the_batch(asked):
    rows, params, positions = (list(part) for part in zip(*asked, strict=True))
    for row in rows:
        assume(max(row[1:3] + row[4 : VOCAB - 1]) > -math.inf)
    together = choose(rows, params, positions)
    assert together == [choose([rows[i]], [params[i]], [positions[i]])[0] for i in range(len(rows))]
    order = list(range(len(rows)))[::-1]
    again = choose([rows[i] for i in order], [params[i] for i in order], [positions[i] for i in order])
    assert again == together[::-1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45])
def test_a_tiny_temperature_is_greedy(temperature):
    rows = (torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(0)) * 5).tolist()
    params = DecodeParams("streaming", temperature=temperature, mask_token_id=VOCAB - 1)
    greedy = choose(rows, [replace(params, temperature=0.0)] * 50, [0] * 50)
    assert choose(rows, [params] * 50, list(range(50))) == greedy


def test_top_p_of_one_keeps_everything():
    """At a high temperature, a token of probability 1e-9 has a chance."""
    row = [20.0, *[0.0] * (VOCAB - 1)]
    params = DecodeParams("streaming", temperature=30.0, mask_token_id=VOCAB - 1)
    chosen = choose([row] * 20, [replace(params, seed=i) for i in range(20)], [0] * 20)
    assert set(chosen) != {0}
    assert chosen == [reference.choose_token(torch.tensor(row), 0, replace(params, seed=i)) for i in range(20)]


def test_top_p_is_not_rounded():
    """The runner's own stacking of parameters, beside the reference's double."""
    from wedlm.engine.execution.sampling_tensors import BatchParams

    params = DecodeParams("streaming", temperature=1.0, top_p=0.3, mask_token_id=10)
    row, no_ends = [*[0.0] * 10, -math.inf], torch.zeros(100, 0, dtype=torch.long)
    stacked = BatchParams.stack([replace(params, seed=i) for i in range(100)], CPU)
    logits = ban_tokens(torch.tensor([row] * 100), 10, no_ends, torch.zeros(100, dtype=torch.bool))
    batch = SamplingBatch(
        stacked.temperature, stacked.top_k, stacked.top_p, stacked.seed, torch.zeros(100, dtype=torch.long), True, True
    )
    chosen = choose_tokens(logits, batch).tolist()
    assert chosen == [reference.choose_token(torch.tensor(row), 0, replace(params, seed=i)) for i in range(100)]


@pytest.mark.parametrize("temperature", [1e20, 1e30])
def test_a_huge_temperature_is_uniform_over_what_is_allowed(temperature):
    count = 20_000
    params = [
        DecodeParams(
            "streaming", temperature=temperature, seed=i, mask_token_id=5, stop_token_ids=(0,), min_eos_position=9
        )
        for i in range(count)
    ]
    chosen = choose([[3.0, -8.0, 8.0, 0.0, 1.0, 9.0, -math.inf]] * count, params, [7] * count)
    assert set(chosen) == {1, 2, 3, 4}
    assert stats.chisquare(np.bincount(chosen)[1:5]).pvalue > 1e-3


def test_equal_logits_are_drawn_evenly():
    count = 20_000
    params = [DecodeParams("streaming", temperature=1e-6, seed=i, mask_token_id=VOCAB - 1) for i in range(count)]
    chosen = choose([[1.0] * 4 + [0.0] * 5] * count, params, [7] * count)
    assert stats.chisquare(np.bincount(chosen, minlength=4)[:4]).pvalue > 1e-3
    assert max(chosen) < 4


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature", "weights"),
    [
        (0, 1.0, 1.0, [8, 4, 2, 1, 1]),
        (0, 1.0, 0.5, [64, 16, 4, 1, 1]),
        (3, 1.0, 1.0, [8, 4, 2, 0, 0]),
        (0, 0.7, 1.0, [8, 4, 0, 0, 0]),
        (0, 0.75, 1.0, [8, 4, 0, 0, 0]),  # 8 + 4 of 16 reach 0.75 exactly
        (0, 0.76, 1.0, [8, 4, 2, 0, 0]),
        (3, 0.9, 1.0, [8, 4, 2, 0, 0]),  # top-p acts on what top-k left, renormalised: 12 of 14 are not enough
        (2, 0.66, 0.5, [1, 0, 0, 0, 0]),  # temperature comes last: top-p sees 8 of 12
    ],
)
def test_frequencies_follow_the_processed_distribution(top_k, top_p, temperature, weights):
    count = 20_000
    row = [*(math.log(w) for w in (8, 4, 2, 1, 1)), 5.0]  # the last is the mask token
    params = [
        DecodeParams("streaming", temperature=temperature, top_k=top_k, top_p=top_p, seed=i, mask_token_id=5)
        for i in range(count)
    ]
    logits = ban_tokens(torch.tensor([row] * count), 5, torch.zeros(count, 0).long(), torch.zeros(count).bool())
    chosen = choose_tokens(logits, sampling_batch(params, [3] * count))
    found, expected = np.bincount(chosen, minlength=5), np.array(weights) * count / sum(weights)
    assert found[expected == 0].sum() == 0
    if (expected > 0).sum() > 1:
        assert stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue > 1e-3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32) | st.just(-math.inf), min_size=2, max_size=40), st.floats(-100, 100))
def test_entropy_equals_scipy(row, shift):
    assume(max(row) > -math.inf)
    logits = torch.tensor([row]) + shift
    entropy, logsumexp = entropy_and_logsumexp(logits)
    log_probs = torch.log_softmax(logits.double(), dim=-1)[0]
    assert entropy.item() == pytest.approx(stats.entropy(log_probs.exp().numpy()), abs=5e-5)
    assert logsumexp.item() == pytest.approx(torch.logsumexp(logits.double(), dim=-1).item(), abs=1e-4)
    assert entropy.item() >= 0
    assert entropy.item() == pytest.approx(reference._entropy(logits[0]), abs=1e-4)


def test_entropy_of_extremes():
    inf = math.inf
    rows = [[1e30, -1e30, 0.0, -inf], [0.0, -inf, -inf, -inf], [-1e30, -inf, -inf, -3e38], [5.0, 5.0, 5.0, 5.0]]
    entropy, logsumexp = entropy_and_logsumexp(torch.tensor(rows))
    assert entropy.tolist() == pytest.approx([0.0, 0.0, 0.0, math.log(4)], abs=1e-6)
    assert torch.isfinite(logsumexp).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(-1, 6), min_size=3, max_size=3), st.booleans()), min_size=1, max_size=5))
def test_ban_tokens_equals_a_loop(rows):
    """Padding with -1 at any place, token 0 as an end token, the mask id as an end token, repeated ends."""
    mask = 5
    logits = torch.randn(len(rows), 7, generator=torch.Generator().manual_seed(len(rows)))
    expected = logits.clone()
    for i, (ends, banned) in enumerate(rows):
        expected[i, mask] = -math.inf
        for token in ends:
            if banned and token >= 0:
                expected[i, token] = -math.inf
    ends, banned = (torch.tensor(part) for part in zip(*rows, strict=True))
    assert torch.equal(ban_tokens(logits, mask, ends, banned), expected)


def test_ban_tokens_without_end_tokens():
    found = ban_tokens(torch.zeros(2, 3), 1, torch.zeros(2, 0, dtype=torch.long), torch.tensor([True, False]))
    assert found.tolist() == [[0.0, -math.inf, 0.0]] * 2
