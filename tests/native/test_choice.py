# SPDX-License-Identifier: Apache-2.0
"""The library's choice of a token, against ``algorithm/sample.py``, its slow twin: given the same logits, the same."""

import random

import pytest
import torch
from torch import Tensor

from tests.engine.native_model import needs_native
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.sample import SamplingBatch, choose_tokens, gumbel_noise
from wedlm.native import decoder

pytestmark = needs_native


def torch_choice(logits: Tensor, params: list[DecodeParams], positions: Tensor) -> Tensor:
    batch = SamplingBatch(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.top_k for p in params]),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        seed=torch.tensor([p.seed for p in params]),
        position=positions,
        any_sampled=True,
        any_truncated=True,
    )
    return choose_tokens(logits.clone(), batch)


def check(logits: Tensor, params: list[DecodeParams], positions: Tensor) -> None:
    """Equal, but where the noise of two tokens makes their scores equal to a millionth of them: torch's logarithms and
    ours may round differently there."""
    ours, theirs = decoder.choose_tokens(logits, params, positions), torch_choice(logits, params, positions)
    for row in (ours != theirs).nonzero()[:, 0].tolist():
        p, tokens = params[row], torch.stack((ours[row], theirs[row]))
        noise = gumbel_noise(torch.tensor([p.seed]), positions[row : row + 1], tokens)[0].double()
        a, b = (logits[row][tokens].double() - logits[row].max()) / p.temperature + noise
        assert abs(a - b) <= 2e-6 * max(1.0, abs(a)), (p, tokens, a, b)


@pytest.mark.parametrize("vocab_size", [1, 7, 1000, 1024, 1025, 49152])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
def test_the_same_tokens(vocab_size, spread):
    rng = random.Random(vocab_size)
    torch.manual_seed(vocab_size)
    rows = 40 if vocab_size > 2000 else 200
    params = [
        DecodeParams(
            "autoregressive",
            temperature=rng.choice([0.0, 1e-6, 0.3, 1.0, 1.0, 4.0, 1e30]),
            top_k=rng.choice([0, 0, 1, 5, 50, vocab_size + 3]),
            top_p=rng.choice([1.0, 1.0, 0.1, 0.8, 0.9999]),
            seed=rng.choice([0, rng.randrange(2**63), -rng.randrange(2**63)]),
        )
        for _ in range(rows)
    ]
    logits = spread * torch.randn(rows, vocab_size)
    if vocab_size > 5:
        logits[::3, 3] = -torch.inf
        logits[1::4] = logits[1::4].round()  # many equal ones
    check(logits, params, torch.randint(0, 2**40, (rows,)))


def test_three_thousand_draws_of_one_row():
    """Few draws may meet a tie, and every token is drawn as often as its probability says."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).repeat(3000, 1)
    params = [DecodeParams("autoregressive", temperature=1.0, seed=5)] * 3000
    positions = torch.arange(3000)
    ours = decoder.choose_tokens(logits, params, positions)
    assert torch.equal(ours, torch_choice(logits, params, positions))
    shares = torch.bincount(ours, minlength=4) / 3000
    assert shares.tolist() == pytest.approx(logits[0].softmax(0).tolist(), abs=0.03)


def test_logits_that_overflowed():
    """Something is chosen that exists."""
    params = [DecodeParams("autoregressive", temperature=t, top_k=k, top_p=0.5) for t in (0.0, 1.0) for k in (0, 2)]
    for bad in (torch.nan, torch.inf, -torch.inf):
        tokens = decoder.choose_tokens(torch.full((4, 100), bad), params, torch.arange(4))
        assert ((tokens >= 0) & (tokens < 100)).all()


@pytest.mark.parametrize(("vocab_size", "count"), [(1, 1), (7, 7), (64, 5), (1025, 20), (49152, 20)])
def test_the_most_probable_tokens(vocab_size, count):
    """Of equal logits those of the lowest tokens, in their order; what is not a number comes last."""
    torch.manual_seed(vocab_size)
    logits = torch.randn(30, vocab_size)
    logits[::3] = logits[::3].round()
    logits[1::3] = logits[1::3].sort().values  # each is larger than all before
    logits[2, 0] = -torch.inf
    tokens, values = decoder.top_tokens(logits, count)
    expected = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(tokens, expected.indices[:, :count])
    assert torch.equal(values, expected.values[:, :count])
    logits[0, ::2] = torch.nan
    tokens, values = decoder.top_tokens(logits[:1], count)
    finite = logits[0].nan_to_num(-torch.inf).sort(descending=True, stable=True)
    assert torch.equal(values[0], finite.values[:count])
    assert ((tokens >= 0) & (tokens < vocab_size)).all()
