# SPDX-License-Identifier: Apache-2.0
"""The loss of a whole optimiser batch against a plain loop over its masked positions, written from the definition."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.model.tiny import causal_attend
from wedlm.algorithm.objective import LossTotals
from wedlm.model import ModelConfig, Transformer
from wedlm.train import batch as batch_module
from wedlm.train.batch import AR_GROUP, NUM_DEPTHS, NUM_GROUPS, NUM_RATIOS, TrainBatch, collate_sequences, without_loss
from wedlm.train.config import TrainConfig
from wedlm.train.packing import PackedSequence
from wedlm.train.step import StepLosses, TrainingModel, prepare_layers

VOCAB, MASK, LENGTH, BLOCK = 50, 49, 40, 8


def settings(**overrides) -> TrainConfig:
    values = {"model_path": "x", "train_data": "x", "max_seq_length": LENGTH, "block_size": BLOCK}
    return TrainConfig(**{**values, **overrides})


def packed_sequence(*lengths: int, seed: int) -> PackedSequence:
    """Documents of these lengths, about a quarter of whose tokens is a prompt, and padding."""
    rng = np.random.default_rng(seed)
    documents = np.full(LENGTH, -1)
    positions, trainable, at = np.zeros(LENGTH, dtype=np.int64), np.zeros(LENGTH, dtype=bool), 0
    for number, length in enumerate(lengths):
        documents[at : at + length], positions[at : at + length] = number, np.arange(length)
        trainable[at + length // 4 : at + length] = True
        at += length
    return PackedSequence(rng.integers(0, MASK, LENGTH), positions, documents, trainable)


ROWS = [
    packed_sequence(11, 5, 20, seed=0),
    packed_sequence(40, seed=1),
    packed_sequence(3, 1, 17, 9, seed=2),
    packed_sequence(8, 8, seed=3),
]


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=64,
        qk_norm=True,
    )
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def cross_entropies(model: Transformer, tokens: list[int], positions: list[int], targets: list[int]) -> tuple:
    """(cross-entropy, right guess) of a causal sequence's rows; a target of -1 counts nowhere."""
    logits = model(torch.tensor(tokens), torch.tensor(positions), causal_attend)
    losses = F.cross_entropy(logits, torch.tensor(targets), ignore_index=-1, reduction="none")
    return losses, logits.argmax(dim=-1) == torch.tensor(targets)


def masked_positions(batch: TrainBatch, row: int) -> dict[tuple[int, int], set[int]]:
    """What the draw masked: positions by (document, block of BLOCK positions)."""
    masked = defaultdict(set)
    at_mask = batch.prediction[row] & (batch.tokens[row] == MASK)
    for document, position in zip(batch.document[row][at_mask], batch.positions[row][at_mask], strict=True):
        masked[int(document), int(position) // BLOCK].add(int(position))
    return masked


class PlainLoop:
    """One forward for each masked position and each document; figures as sums over rows."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.ar: list[Tensor] = []
        self.masked: list[tuple[Tensor, float]] = []
        self.statistics = torch.zeros(NUM_GROUPS, 3, dtype=torch.float64)

    def count(self, group: int, loss: Tensor, right: Tensor) -> None:
        self.statistics[group] += torch.tensor([1, float(loss.detach()), float(right)], dtype=torch.float64)

    def document(self, tokens: list[int], trainable: list[bool], masked: dict[int, set[int]], ratios: dict) -> None:
        """``masked``: positions by block; ``ratios``: γ by block."""
        positions = list(range(len(tokens)))
        targets = [tokens[p + 1] if p + 1 < len(tokens) and trainable[p + 1] else -1 for p in positions]
        losses, right = cross_entropies(self.model, tokens, positions, targets)
        for p in positions:
            if targets[p] >= 0:
                self.ar.append(losses[p])
                self.count(AR_GROUP, losses[p], right[p])
        for block, hidden in masked.items():
            here = [p for p in positions if p // BLOCK == block]
            maskable = [p for p in here if trainable[p]]
            assert len(hidden) == round(ratios[block] * len(maskable))
            assert hidden <= set(maskable)
            seen = [p for p in positions if p < here[0]] + [p for p in here if p not in hidden]
            for depth, p in enumerate(sorted(hidden)):
                seen.append(p)  # masked rows see the masked rows before them
                row_tokens = [MASK if q in hidden else tokens[q] for q in seen]
                losses, right = cross_entropies(self.model, row_tokens, seen, [-1] * (len(seen) - 1) + [tokens[p]])
                self.masked.append((losses[-1], 1 / ratios[block]))
                self.count(1 + min(depth, NUM_DEPTHS - 1), losses[-1], right[-1])
                self.count(1 + NUM_DEPTHS + math.ceil(ratios[block] * NUM_RATIOS) - 1, losses[-1], right[-1])

    def loss(self, a: float, uniform: bool) -> Tensor:
        weights = [1.0 if uniform else weight for _, weight in self.masked]
        masked = sum(w * loss for w, (loss, _) in zip(weights, self.masked, strict=True)) / sum(weights)
        return (masked + a * sum(self.ar) / len(self.ar)) / (1 + a)


def plain_loop(model: Transformer, micro_batches: list[TrainBatch]) -> PlainLoop:
    loop = PlainLoop(model)
    for number, row in enumerate(ROWS):
        batch, within = micro_batches[number // 2], number % 2
        masked = masked_positions(batch, within)
        ratios = {}
        for rank, loss_row in enumerate(batch.loss_rows.tolist()):
            if batch.weight[rank] > 0 and loss_row // batch.tokens.shape[1] == within:
                place = loss_row % batch.tokens.shape[1]
                key = int(batch.document[within][place]), int(batch.positions[within][place]) // BLOCK
                ratios[key] = 1 / float(batch.weight[rank])
        for document in range(row.documents.max() + 1):
            own = row.documents == document
            of = {block: hidden for (d, block), hidden in masked.items() if d == document}
            gammas = {block: ratio for (d, block), ratio in ratios.items() if d == document}
            loop.document(row.tokens[own].tolist(), row.trainable[own].tolist(), of, gammas)
    return loop


def run(model: TrainingModel, micro_batches: list[TrainBatch], a: float) -> StepLosses:
    """The optimiser batch's loss; gradients add up in the parameters."""
    totals = [batch.totals() for batch in micro_batches]
    whole = LossTotals(sum(t.weight for t in totals), sum(t.num_ar for t in totals))
    results = [model(batch.to(torch.device("cpu"), whole, a)) for batch in micro_batches]
    loss = sum(result.loss for result in results)
    if loss.requires_grad:
        loss.backward()
    return StepLosses(loss, sum(result.statistics for result in results))


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def two_micro_batches(config: TrainConfig) -> list[TrainBatch]:
    return [collate_sequences(ROWS[i : i + 2], range(i, i + 2), config, MASK) for i in (0, 2)]


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
