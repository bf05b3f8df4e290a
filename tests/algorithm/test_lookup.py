# SPDX-License-Identifier: Apache-2.0
"""Drafts looked up in the text: the search against brute force, and proposals in windows against plain Python."""

import random
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slow_lookup import SlowLookup, common
from wedlm.algorithm.lookup import SHORTEST, Proposal, Proposals, TextLookup, propose, propose_one
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.window import WindowParams, WindowState

LIMITLESS = 10**9


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 3, 20]), st.sampled_from([1, 2, 16]), st.sampled_from([2, 4, 32]))
def test_it_finds_what_brute_force_finds(seed, vocab_size, candidates, longest):
    rng = random.Random(seed)
    text = [rng.randrange(vocab_size) for _ in range(rng.randint(0, 20))]
    fast, slow = TextLookup(text, longest, candidates), SlowLookup(longest, candidates)
    for _ in range(25):
        start = rng.randrange(len(text)) if text else 0
        copied = text[start : start + rng.randint(0, 6)] if rng.random() < 0.5 else []
        text += copied or [rng.randrange(vocab_size) for _ in range(rng.randint(0, 3))]
        assert fast.find() == slow.find(text)
        assert fast.find() == slow.find(text), "asking changes nothing"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60))
def test_without_limits_it_is_the_longest_suffix_that_stood_before(text):
    grown: list[int] = []
    lookup = TextLookup(grown, LIMITLESS, LIMITLESS)
    for token in text:
        grown.append(token)
        length, source = lookup.find()
        longest = max((common(grown, place, LIMITLESS) for place in range(1, len(grown))), default=0)
        assert length == (longest if longest >= SHORTEST else 0)
        assert not length or grown[source - length : source] == grown[-length:]


def test_drafts_go_on_as_the_text_would():
    lookup = TextLookup([1, 2, 3, 4, 1, 2])
    assert lookup.find() == (2, 2)
    assert lookup.draft(2, 3) == [3, 4, 1]
    assert lookup.draft(2, 9) == [3, 4, 1, 2, 3, 4, 1, 2, 3]
    assert TextLookup([7, 7, 7]).draft(2, 4) == [7, 7, 7, 7]


def test_a_long_text_is_added_in_pieces():
    text = [*range(5000), 3, 4]
    lookup = TextLookup(text)
    assert lookup.find() == (0, 0)
    assert lookup.find() == (2, 5)


@pytest.mark.parametrize("kind", ["one token", "two tokens", "nearly equal"])
def test_no_text_makes_it_slow(kind):
    """A search compares at most a fixed number of tokens, whatever the text: counted, not timed."""
    rng = random.Random(0)
    near = [5, *([1, 2] * 14)]  # as long as may be compared, nearly
    text = {"one token": [1] * 3000, "two tokens": [rng.randrange(2) for _ in range(3000)], "nearly equal": near * 100}
    counting = _Counting(text[kind])
    lookup = TextLookup(counting)
    lookup.find()
    most = 0
    for _ in range(50):
        counting.append(counting[-1])
        counting.reads = 0
        lookup.find()
        most = max(most, counting.reads)
    assert most <= 16 * (2 * 32 + 2) + 8


class _Counting(list):
    """A list that counts how often it is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_proposals_in_windows(seed):
    """As plain Python has them, whatever the text has become since; other windows stay as they are."""
    rng = random.Random(seed)
    windows, capacity = rng.randint(1, 4), 16
    params = [
        DecodeParams(
            rng.choice(["verified", "auto", "streaming"]),
            window_size=rng.randint(1, 16),
            lookup_drafts=15,
            has_masked_rows=rng.random() < 0.5,
            max_positions=rng.choice([12, 30, 100]),
        )
        for _ in range(windows)
    ]
    state, texts, proposals = WindowState.empty(windows, capacity, torch.device("cpu")), [], []
    for s, p in enumerate(params):
        text = [rng.randrange(4) for _ in range(rng.randint(3, p.max_positions - 1))]
        texts.append(text)
        state.cached[s] = len(text) - p.is_verified
        state.width[s] = p.width(0, p.max_positions - int(state.cached[s])) if rng.random() < 0.9 else 0
        state.tokens[s] = torch.randint(4, (capacity,))
        state.tokens[s, 0] = text[-1]
        state.filled[s, 0] = p.is_verified and int(state.width[s]) > 0
        known = len(text) - rng.choice([0, 0, 1, 2])
        tokens = [rng.randrange(4) for _ in range(rng.randint(0, 20))] if p.is_verified else []
        proposals.append(Proposal(known, tokens, 2, rng.randint(0, p.max_lookup)))
    widest = 20
    limits = WindowParams.stack(params, torch.device("cpu"))
    found = propose(
        state,
        limits.row_budget,
        limits.max_drafts,
        limits.max_positions,
        Proposals(
            torch.tensor([one.tokens + [0] * (widest - len(one.tokens)) for one in proposals]),
            torch.tensor([len(one.tokens) for one in proposals]),
            torch.tensor([one.known for one in proposals]),
            torch.tensor([one.most for one in proposals]),
        ),
    )
    before = WindowState(*(getattr(state, one.name).clone() for one in fields(state)))
    for s, (p, text, proposal) in enumerate(zip(params, texts, proposals, strict=True)):
        room = p.max_positions - int(state.cached[s])
        propose_one(state, s, p.row_budget, p.max_drafts, p.max_positions, proposal)
        drafts = proposal.drafts(len(text), text[-1], p.max_positions) if int(before.width[s]) else []
        assert drafts == drafts_of(proposal, text)[: room - 1] or not int(before.width[s])
        expected = found if drafts else before
        for name in ("width", "tokens", "filled", "logprobs", "cached"):
            assert torch.equal(getattr(state, name)[s], getattr(expected, name)[s]), name
            assert torch.equal(getattr(found, name)[s], getattr(expected, name)[s]), name
        if drafts:
            assert found.tokens[s, : len(drafts) + 1].tolist() == [text[-1], *drafts]
            assert found.filled[s].sum() == len(drafts) + 1
            assert found.filled[s, : len(drafts) + 1].all()
            assert found.width[s] == p.width(len(drafts), room) <= p.max_rows


def drafts_of(proposal: Proposal, text: list[int]) -> list[int]:
    """What a step takes of it, as far as the model may reach."""
    end = len(text)
    if end == proposal.known:
        return proposal.tokens[: proposal.most]
    emitted = end - proposal.known
    if len(proposal.tokens) < emitted or proposal.tokens[emitted - 1] != text[-1]:
        return []
    return proposal.tokens[emitted:][: proposal.most]
