# SPDX-License-Identifier: Apache-2.0
"""The loss of a whole optimiser batch against a plain loop over its masked positions, written from the definition."""

import pytest
import torch
from torch import Tensor

from tests.train.plain_loop import MASK, ROWS, gradients, plain_loop, run, settings, two_micro_batches
from wedlm.model import Transformer
from wedlm.train import batch as batch_module
from wedlm.train.batch import AR_GROUP, NUM_DEPTHS, collate_sequences, without_loss
from wedlm.train.config import TrainConfig
from wedlm.train.step import TrainingModel, prepare_layers


def training_model(transformer: Transformer) -> TrainingModel:
    return TrainingModel(transformer, "dense", MASK, False)


def test_losses_gradients_and_statistics_equal_a_plain_loop(transformer):
    micro_batches = two_micro_batches(settings())
    loop = plain_loop(transformer, micro_batches)
    assert len(loop.masked) > 30
    expected = loop.loss(a=0.5, uniform=False)
    expected.backward()
    expected_gradients = gradients(transformer)
    losses = run(training_model(transformer), micro_batches, a=0.5)
    torch.testing.assert_close(losses.loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.statistics.double(), loop.statistics, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(transformer).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


def test_weights_and_mixture(transformer):
    """Uniform weights, and the masked loss alone: the draw is the same, so one loop serves."""
    weighted = two_micro_batches(settings())
    with torch.no_grad():
        loop = plain_loop(transformer, weighted)
        uniform = two_micro_batches(settings(loss_weighting_scheme="uniform"))
        assert torch.equal(uniform[0].tokens, weighted[0].tokens)
        for batches, a in ((uniform, 1.0), (uniform, 0.0), (weighted, 0.0)):
            expected = loop.loss(a, uniform=batches is uniform)
            torch.testing.assert_close(run(training_model(transformer), batches, a).loss, expected, rtol=0, atol=1e-5)


def test_padding_of_loss_rows_changes_nothing(transformer, monkeypatch):
    padded = run(training_model(transformer), two_micro_batches(settings()), 1.0)
    with_padding = gradients(transformer)
    monkeypatch.setattr(batch_module, "_LOSS_ROWS_MULTIPLE", 1)
    exact_batches = two_micro_batches(settings())
    assert all((batch.coefficient.numel() == 0) & (batch.weight.gt(0) | batch.is_ar).all() for batch in exact_batches)
    exact = run(training_model(transformer), exact_batches, 1.0)
    torch.testing.assert_close(padded.loss, exact.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(padded.statistics, exact.statistics, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients(transformer).items():
        torch.testing.assert_close(with_padding[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_a_row_without_a_loss_counts_nowhere(transformer):
    rows = [without_loss(row) for row in ROWS[:2]]
    batch = collate_sequences(rows, range(2), settings(), MASK)
    losses = run(training_model(transformer), [batch], 1.0)
    assert not losses.loss
    assert not losses.statistics.any()


@pytest.mark.parametrize("suffix", [0.0, 0.5, 1.0])
def test_noise_depends_on_seed_and_row_number_alone(suffix):
    config = settings(suffix_noise=suffix)

    def rows(number: int, *indices: int, config: TrainConfig = config) -> Tensor:
        """Tokens and blocks of the sequence with this number in a micro-batch."""
        batch = collate_sequences([ROWS[1]] * len(indices), indices, config, MASK)
        return torch.stack((batch.tokens[number], batch.block[number]))

    first = rows(0, 7)
    torch.manual_seed(99)  # the noise has its own generator
    assert torch.equal(first, rows(1, 3, 7, 2**40))
    assert torch.equal(first, rows(0, 7, config=config.model_copy(update={"learning_rate": 1.0})))
    assert not torch.equal(first, rows(0, 8))
    assert not torch.equal(first, rows(0, 7, config=config.model_copy(update={"seed": 1})))


def test_layers_that_recompute_their_activations(transformer):
    micro_batches = two_micro_batches(settings())
    plain = run(training_model(transformer), micro_batches, 1.0)
    expected = gradients(transformer)
    forwards = [layer.forward for layer in transformer.model.layers]
    prepare_layers(transformer, compile_layers=False, checkpoint_activations=True)
    again = run(training_model(transformer), micro_batches, 1.0)
    for layer, forward in zip(transformer.model.layers, forwards, strict=True):
        layer.forward = forward
    assert torch.equal(plain.loss, again.loss)
    for name, gradient in gradients(transformer).items():
        assert torch.equal(gradient, expected[name]), name


def test_autocast_does_not_round_the_loss(transformer):
    micro_batches = two_micro_batches(settings())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        losses = run(training_model(transformer), micro_batches, 1.0)
    count, entropy, _ = losses.statistics.double().unbind(1)
    uniform = two_micro_batches(settings(loss_weighting_scheme="uniform"))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        loss = run(training_model(transformer), uniform, 1.0).loss
    masked = slice(1, 1 + NUM_DEPTHS)
    expected = (entropy[masked].sum() / count[masked].sum() + entropy[AR_GROUP] / count[AR_GROUP]) / 2
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)


def test_a_mask_embedding_of_its_own(transformer):
    """It stands in for the embedding's row, gets that row's gradient as an input, and leaves the embedding alone."""
    micro_batches = two_micro_batches(settings())
    with torch.no_grad():
        expected = run(training_model(transformer), micro_batches, 1.0).loss
    model = TrainingModel(transformer, "dense", MASK, True)
    embedding = transformer.model.embed_tokens.weight
    embedding.requires_grad_(False)
    try:
        with torch.no_grad():
            before = embedding[MASK].clone()
            embedding[MASK] = 0
        losses = run(model, micro_batches, 1.0)
        torch.testing.assert_close(losses.loss.detach(), expected)
        assert model.mask_embedding.grad.abs().sum() > 0
        assert embedding.grad is None
    finally:
        with torch.no_grad():
            embedding[MASK] = before
        embedding.requires_grad_(True)
        transformer.zero_grad()
