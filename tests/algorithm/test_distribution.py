# SPDX-License-Identifier: Apache-2.0
"""Whole sampled sequences against the exact probabilities of autoregressive sampling."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.stub import StubModel
from wedlm.algorithm import reference
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.sample import SamplingBatch, ban_tokens, choose_tokens, entropy_and_logsumexp
from wedlm.algorithm.verify import row_layout
from wedlm.algorithm.window import RowResults, WindowParams, WindowState, extend, update_windows

CPU = torch.device("cpu")
PROMPT, LENGTH = [1, 4, 2], 3
SMALL = StubModel(vocab_size=6, mask_token_id=5, agreement=1.5, seed=3)


def exact_probabilities(temperature: float) -> dict[tuple[int, ...], float]:
    """Of every sequence of LENGTH tokens, from AR logits of whole prefixes."""
    found: dict[tuple[int, ...], float] = {}
    tokens = [t for t in range(SMALL.vocab_size) if t != SMALL.mask_token_id]
    for sequence in itertools.product(tokens, repeat=LENGTH):
        known = [*PROMPT, *sequence]
        logits = SMALL.rows_model(known, list(range(len(known))))[len(PROMPT) - 1 : -1]
        probs = torch.softmax(logits[:, tokens].double() / temperature, dim=-1)
        found[sequence] = math.prod(probs[i, token].item() for i, token in enumerate(sequence))
    assert sum(found.values()) == pytest.approx(1)
    return found


def sample_sequences(params: DecodeParams, seeds: Tensor) -> Tensor:
    """LENGTH tokens of PROMPT for each seed, [S, LENGTH], through the batched algorithm; verified or AR."""
    count = len(seeds)
    window_params = WindowParams.stack([params] * count, CPU)
    state = WindowState.empty(count, params.max_rows, CPU)
    state.cached[:], state.width[:] = len(PROMPT) - 1, params.width(0, 10**6)
    state.tokens[:, 0], state.filled[:, 0] = PROMPT[-1], True
    known = torch.zeros(count, len(PROMPT) + LENGTH + params.max_rows + 1, dtype=torch.long)
    known[:, : len(PROMPT)] = torch.tensor(PROMPT)
    end = torch.full((count,), len(PROMPT))
    column = torch.arange(params.max_rows)
    while int(end.min()) < len(PROMPT) + LENGTH:
        state, run = extend(state, window_params)
        logits = forward(state, known)
        entropy, _ = entropy_and_logsumexp(logits)
        layout = row_layout(state.filled, state.width, window_params.is_verified)
        target = (state.cached[:, None] + layout.offset + state.filled).flatten()
        no_ends = torch.zeros(len(logits), 0, dtype=torch.long)
        allowed = ban_tokens(logits.clone(), SMALL.mask_token_id, no_ends, torch.zeros(len(logits), dtype=torch.bool))
        ones = torch.ones(len(logits))
        batch = SamplingBatch(
            temperature=ones * params.temperature,
            top_k=torch.zeros(len(logits), dtype=torch.long),
            top_p=ones,
            seed=seeds.repeat_interleave(params.max_rows),
            position=target,
            any_sampled=True,
            any_truncated=False,
        )
        choice = choose_tokens(allowed, batch).view(state.tokens.shape)
        results = RowResults(choice, entropy.view(choice.shape), torch.zeros(choice.shape))
        state, emitted = update_windows(state, run, results, window_params)
        take = torch.minimum(emitted.count, known.shape[1] - end)
        inside = column < take[:, None]
        at = torch.where(inside, end[:, None] + column, known.shape[1] - 1)  # the last column is a bin
        known.scatter_(1, at, emitted.tokens)
        end = torch.minimum(end + take, torch.tensor(len(PROMPT) + LENGTH + params.max_rows))
    return known[:, len(PROMPT) : len(PROMPT) + LENGTH]


def forward(state: WindowState, known: Tensor) -> Tensor:
    """Logits [S·C, V] of every column, seeing what the layout of a verified window lets it see."""
    layout = row_layout(state.filled, state.width, torch.ones(len(state.width), dtype=torch.bool))
    column = torch.arange(state.tokens.shape[1])
    sees = (column < layout.shared[..., None]) | (column >= layout.own_start[..., None])
    sees &= column <= column[:, None]
    tokens = torch.where(state.filled, state.tokens, SMALL.mask_token_id)
    positions = state.cached[:, None] + layout.offset
    before = torch.arange(known.shape[1]) < state.cached[:, None]
    values = SMALL.values(known.flatten(), torch.arange(known.shape[1]).repeat(len(known)))
    history = (values.view(*known.shape, -1) * before[..., None]).sum(1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Sums instead of means: the model looks at their ratio to feature 0."""
        return (sees.float() @ v.view(*tokens.shape, -1) + history[:, None]).flatten(0, 1)[:, None]

    return SMALL(tokens.flatten(), positions.flatten(), attend)


def check_distribution(params: DecodeParams, count: int, chunk: int = 5_000) -> Tensor:
    """Chi-square over all sequences, rare ones (expected fewer than 5 times) taken together."""
    samples = torch.cat([sample_sequences(params, torch.arange(i, i + chunk)) for i in range(0, count, chunk)])
    exact = exact_probabilities(params.temperature)
    codes = (samples * torch.tensor([100, 10, 1])).sum(1)
    found = np.array([int((codes == 100 * a + 10 * b + c).sum()) for a, b, c in exact])
    assert found.sum() == count
    expected = np.array(list(exact.values())) * count
    rare = expected < 5
    observed = [*found[~rare], found[rare].sum()]
    wanted = [*expected[~rare], expected[rare].sum()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 25
    assert stats.chisquare(observed, wanted).pvalue > 1e-3
    return samples


def verified(window_size: int) -> DecodeParams:
    return DecodeParams(
        "verified", window_size=window_size, draft_entropy=9.0, temperature=1.0, mask_token_id=SMALL.mask_token_id
    )


def autoregressive() -> DecodeParams:
    return replace(verified(4), decoding="autoregressive")


MODES: dict[str, Callable[[], DecodeParams]] = {
    "autoregressive": autoregressive,
    "verified-4": lambda: verified(4),
    "verified-16": lambda: verified(16),
}


def test_sampled_sequences_follow_the_model():
    """Verified and AR decoding at temperature 1: AR's distribution, and the same tokens for the same seed."""
    samples = [check_distribution(make(), 5_000) for make in MODES.values()]
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_hundred_thousand_sequences_follow_the_model(mode):
    samples = check_distribution(MODES[mode](), 100_000)
    ar = torch.cat([sample_sequences(autoregressive(), torch.arange(i, i + 5_000)) for i in range(0, 20_000, 5_000)])
    assert torch.equal(samples[:20_000], ar)


@pytest.mark.parametrize("mode", MODES)
def test_the_batched_samples_are_the_references(mode):
    """Ties the fast sampler above to reference.py, and shows that drafts are accepted and refused on the way."""
    params = MODES[mode]()
    samples = sample_sequences(params, torch.arange(40))
    steps = set()
    for seed in range(40):
        out = reference.decode(SMALL.rows_model, PROMPT, LENGTH, replace(params, seed=seed))
        assert out.tokens == samples[seed].tolist()
        steps.add(len(out.rows))
    assert steps == ({3} if mode == "autoregressive" else {2, 3})
