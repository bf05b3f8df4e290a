# SPDX-License-Identifier: Apache-2.0
"""The loss of an optimiser batch as a plain loop over its masked positions, written from the definition."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.engine.random_transformer import CONFIG, random_model
from tests.model.tiny import causal_attend
from wedlm.algorithm.objective import LossTotals
from wedlm.model import Transformer
from wedlm.train.batch import AR_GROUP, NUM_DEPTHS, NUM_GROUPS, NUM_RATIOS, TrainBatch, collate_sequences
from wedlm.train.config import TrainConfig
from wedlm.train.packing import PackedSequence
from wedlm.train.step import StepLosses, TrainingModel

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


def small_transformer() -> Transformer:
    config = replace(
        CONFIG, vocab_size=VOCAB, intermediate_size=48, num_kv_heads=2, head_dim=8, max_position_embeddings=64
    )
    return random_model(config, std=0.3).train()


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
