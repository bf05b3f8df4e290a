# SPDX-License-Identifier: Apache-2.0
"""The same examples for our trainer and for others', under the same noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.engine.tiny_llm import END, MASK
from wedlm.algorithm.noise import Noise, draw_noise
from wedlm.hf import WeDLMCollator
from wedlm.model import load_model
from wedlm.train import batch as train_batch
from wedlm.train.batch import collate_sequences
from wedlm.train.config import TrainConfig
from wedlm.train.packing import PackedSequence
from wedlm.train.step import TrainingModel

LENGTH, BLOCK, ENDS = 96, 8, 3


def settings(**more: Any) -> TrainConfig:
    values = {"model_path": "x", "train_data": "x", "max_seq_length": LENGTH, "block_size": BLOCK}
    return TrainConfig(**{**values, "num_learnable_im_end": ENDS, **more})


def noise_without_padding(positions: Tensor, documents: Tensor, trainable: Tensor, *rest: Any) -> Noise:
    """``draw_noise``, which draws for padding, too, and so depends on how much of it there is."""
    there = int((documents >= 0).sum())
    noise = draw_noise(positions[:there], documents[:there], trainable[:there], *rest)
    more = len(documents) - there
    block = torch.cat((noise.block, noise.block[-1] + 1 + torch.arange(more)))
    return Noise(block, torch.cat((noise.masked, torch.zeros(more).bool())), torch.cat((noise.ratio, torch.ones(more))))


class NumberedCollator(WeDLMCollator):
    """Draws for the examples, in the order in which they come, what our trainer draws for sequences 0, 1 and so on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples: list[list[dict[str, Any]]] = []  # of each batch

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        self.number = sum(len(one) for one in self.examples)
        self.examples.append([dict(example) for example in examples])
        return super().__call__(examples)

    def seed(self, text: Any) -> int:
        seed = np.random.SeedSequence((settings().seed, self.number)).generate_state(1, np.uint64)[0]
        self.number += 1
        return int(seed >> 1)


def sequence(example: dict[str, Any]) -> PackedSequence:
    """The example as our trainer's data has it: documents up to their last learned token, end tokens repeated."""
    tokens, positions, documents, trainable = [], [], [], []
    start = 0
    for number, length in enumerate(example.get("seq_lengths") or [len(example["input_ids"])]):
        document = list(zip(*(example[name][start : start + length] for name in ("input_ids", "labels")), strict=True))
        start += length
        while document[-1][1] == -100:
            document.pop()
        if document[-1][0] == END:
            document += document[-1:] * (ENDS - 1)
        tokens += [token for token, _ in document]
        trainable += [label != -100 for _, label in document]
        positions += range(len(document))
        documents += [number] * len(document)
    more = LENGTH - len(tokens)
    return PackedSequence(
        np.array(tokens + [0] * more),
        np.array(positions + [0] * more),
        np.array(documents + [-1] * more),
        np.array(trainable + [False] * more),
    )


def our_loss(model: TrainingModel, examples: list[dict[str, Any]], first: int, config: TrainConfig) -> Tensor:
    """Of one micro-batch, whose examples are sequences ``first`` and following."""
    indices = range(first, first + len(examples))
    batch = collate_sequences([sequence(one) for one in examples], indices, config, MASK)
    return model(batch.to(torch.device("cpu"), batch.totals(), config.effective_ar_weight)).loss


def our_model(directory: Path) -> TrainingModel:
    transformer, _ = load_model(str(directory), torch.float32)
    return TrainingModel(transformer, "dense", MASK, own_mask_embedding=False)


__all__ = ["train_batch"]  # whose draw_noise tests replace
