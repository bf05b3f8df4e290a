# SPDX-License-Identifier: Apache-2.0
"""Packing loses nothing, repeats nothing, is the same everywhere, and fills sequences."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wedlm.train import packing
from wedlm.train.packing import copies_in_epoch, cut_documents, plan_epoch, random_order

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def spans(pieces) -> list[tuple[int, int, int]]:
    columns = (pieces.document.tolist(), pieces.start.tolist(), pieces.length.tolist())
    return list(zip(*columns, strict=True))


def best_fit_slowly(lengths: list[int], size: int, num_open: int) -> list[int]:
    """The sequence of each piece, by looking at every open sequence."""
    room: dict[int, int] = {}
    sequences, count = [], 0
    for length in lengths:
        fitting = [(left, sequence) for sequence, left in room.items() if left >= length]
        sequence = min(fitting)[1] if fitting else count
        count += not fitting
        room[sequence] = room.get(sequence, size) - length
        sequences.append(sequence)
        if room[sequence] == 0:
            del room[sequence]
        if len(room) > num_open:
            del room[min(room, key=lambda sequence: (room[sequence], sequence))]
    return sequences


@given(LENGTHS, st.integers(2, 70))
def test_cutting_loses_nothing(lengths, size):
    covered = [
        (document, start + i) for document, start, length in spans(cut_documents(lengths, size)) for i in range(length)
    ]
    assert covered == [(document, i) for document, length in enumerate(lengths) for i in range(length)]
    pieces = cut_documents(lengths, size)
    assert pieces.length.max() <= size
    assert len(pieces) == sum(-(-length // size) for length in lengths)


@given(LENGTHS, st.integers(2, 70), st.integers(0, 3), st.integers(0, 2**40), st.integers(0, 5))
def test_a_plan_holds_every_piece_as_often_as_asked(lengths, size, repeat, seed, epoch):
    pieces = cut_documents(lengths, size)
    plan = plan_epoch(pieces, np.full(len(lengths), float(repeat)), size, seed, epoch)
    assert Counter(spans(plan.pieces)) == {span: repeat for span in spans(pieces) if repeat}
    filled = [int(plan.pieces.length[a:b].sum()) for a, b in zip(plan.offsets[:-1], plan.offsets[1:], strict=True)]
    assert all(0 < tokens <= size for tokens in filled)
    assert plan.num_sequences == len(filled)
    assert plan.fill == (pytest.approx(sum(filled) / (len(filled) * size)) if filled else 0)
    again = plan_epoch(pieces, np.full(len(lengths), float(repeat)), size, seed, epoch)
    assert spans(again.pieces) == spans(plan.pieces)
    assert (again.offsets == plan.offsets).all()


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(1, 5))
def test_best_fit_is_that_of_the_slow_one(lengths, num_open):
    before, packing.OPEN_SEQUENCES = packing.OPEN_SEQUENCES, num_open
    try:
        sequences, count = packing._best_fit(np.array(lengths, dtype=np.int64), 20)
    finally:
        packing.OPEN_SEQUENCES = before
    assert sequences.tolist() == best_fit_slowly(lengths, 20, num_open)
    assert count == len(set(sequences.tolist()))


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.3])),
        min_size=1,
        max_size=40,
    ),
    st.integers(0, 99),
)
def test_fractions_take_turns(documents, seed):
    groups = np.array([group for group, _ in documents])
    of_group = dict(documents)
    repeats = np.array([of_group[group] for group in groups.tolist()])
    epochs = np.array([copies_in_epoch(repeats, seed, epoch, groups) for epoch in range(20)])
    assert (epochs >= np.floor(repeats)).all()
    assert (epochs <= np.ceil(repeats)).all()
    # Whatever the share, after 20 epochs every document had its turns (all repeats above are multiples of 1/20).
    assert (epochs.sum(0) == np.round(20 * repeats)).all()
    for group, repeat in of_group.items():
        own = epochs[:, groups == group]
        assert (abs(own.sum(1) - repeat * own.shape[1]) < 1).all()


def test_halves_are_complementary_and_random():
    first, second, third = (copies_in_epoch(np.full(1000, 0.5), 3, epoch) for epoch in range(3))
    assert first.sum() == 500
    assert (first + second == 1).all()
    assert (third == first).all()
    assert 200 < first[:500].sum() < 300
    assert (first != copies_in_epoch(np.full(1000, 0.5), 4, 0)).any()


@pytest.mark.parametrize("repeat", [-1.0, float("nan"), float("inf")])
def test_impossible_repeats(repeat):
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        copies_in_epoch(np.array([1.0, repeat]), 0, 0)


def test_sequence_length_is_checked():
    with pytest.raises(ValueError, match="sequence_length is 1; expected at least 2"):
        cut_documents(np.array([5]), 1)


def test_epochs_and_seeds_differ():
    pieces = cut_documents(np.arange(1, 200), 256)
    ones = np.ones(199)
    orders = {
        tuple(plan_epoch(pieces, ones, 256, seed, epoch).pieces.document.tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_the_order_never_changes():
    """A run that is resumed under another release must go on with the same sequences."""
    assert random_order(8, 0).tolist() == [1, 4, 5, 7, 6, 0, 3, 2]
    plan = plan_epoch(cut_documents(np.array([3, 9, 4, 5, 2, 7]), 8), np.ones(6), 8, seed=1, epoch=2)
    assert spans(plan.pieces) == [(5, 0, 7), (1, 8, 1), (0, 0, 3), (4, 0, 2), (1, 0, 8), (2, 0, 4), (3, 0, 5)]
    assert plan.offsets.tolist() == [0, 2, 4, 5, 6, 7]


def test_rows_of_chat_like_lengths_are_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, 20_000).astype(np.int64), 8, 30_000)
    plan = plan_epoch(cut_documents(lengths, 2048), np.ones(len(lengths)), 2048, 0, 0)
    assert plan.fill > 0.99
    # Long pieces are spread over the epoch: the sequence of a piece says nothing about its length.
    sequence_of = np.repeat(np.arange(plan.num_sequences), np.diff(plan.offsets))
    assert abs(np.corrcoef(sequence_of, plan.pieces.length)[0, 1]) < 0.03
