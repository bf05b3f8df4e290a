# SPDX-License-Identifier: Apache-2.0
"""Random packed sequences, and a plain-Python twin of the training rows and of who sees whom."""

import dataclasses
import functools
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from wedlm.algorithm.dual_stream import PADDING, DualStream, dual_stream
from wedlm.algorithm.noise import Noise, mix_noise, random_noise, suffix_noise

MASK_ID, VOCABULARY = 7, 20


@dataclass(frozen=True)
class PlainRow:
    """A row that is there, in the words of the definition. ``block`` is the position its block starts at."""

    stream: str  # "clean" or "prediction"
    document: int
    block: int
    position: int
    masked: bool
    source: int  # index in the packed sequence


@dataclass(frozen=True)
class Packing:
    """Documents one after the other, then padding: [L] each. ``num_rows`` suffices for the training rows; ``generator``
    is where ``noise`` came from, free for more draws."""

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    trainable: Tensor
    block_size: int
    generator: torch.Generator
    noise: Noise
    num_rows: int

    @functools.cached_property
    def plain_rows(self) -> list[PlainRow]:
        """The clean stream by position, then each block that has masks: observed positions, then masked ones."""
        document, position = self.documents.tolist(), self.positions.tolist()
        number, masked = self.noise.block.tolist(), self.noise.masked.tolist()
        there = [i for i in range(len(document)) if document[i] != PADDING]
        block = {i: min(position[j] for j in there if number[j] == number[i]) for i in there}

        def row(stream: str, i: int, is_masked: bool) -> PlainRow:
            return PlainRow(stream, document[i], block[i], position[i], is_masked, i)

        rows = [row("clean", i, False) for i in there]
        for name in sorted({number[i] for i in there if masked[i]}):
            members = [i for i in there if number[i] == name]
            rows += [row("prediction", i, False) for i in members if not masked[i]]
            rows += [row("prediction", i, True) for i in members if masked[i]]
        return rows

    @functools.cached_property
    def seen(self) -> Tensor:
        """Brute force, bool [query R, key R]."""
        rows: list[PlainRow | None] = [*self.plain_rows, *[None] * (self.num_rows - len(self.plain_rows))]
        pairs = ((q, k) for q in range(self.num_rows) for k in range(self.num_rows))
        seen = [is_seen(rows[q], rows[k]) if rows[q] and rows[k] else q == k for q, k in pairs]
        return torch.tensor(seen, dtype=torch.bool).view(self.num_rows, self.num_rows)

    @functools.cached_property
    def stream(self) -> DualStream:
        return dual_stream(
            self.tokens, self.positions, self.documents, self.trainable, self.noise, MASK_ID, self.num_rows
        )


def is_seen(query: PlainRow, key: PlainRow) -> bool:
    """Who sees whom, by document, stream, block and position; reordered rows rank by (masked, position)."""
    if query.document != key.document:
        return False
    if query.stream == "clean":
        return key.stream == "clean" and key.position <= query.position
    if key.stream == "clean":
        return key.block < query.block
    return key.block == query.block and (key.masked, key.position) <= (query.masked, query.position)


def spread(lengths: list[int], padding: int = 0) -> tuple[Tensor, Tensor]:
    """(positions, documents) of packed documents and padding."""
    positions = [p for length in lengths for p in range(length)] + [0] * padding
    documents = [d for d, length in enumerate(lengths) for _ in range(length)] + [PADDING] * padding
    return torch.tensor(positions, dtype=torch.long), torch.tensor(documents, dtype=torch.long)


def random_trainable(rng: random.Random, lengths: list[int], padding: int) -> Tensor:
    """Each document entirely, not at all, from some position on, or in scattered positions; never padding."""
    flags: list[bool] = []
    for length in lengths:
        start, kind = rng.randrange(length), rng.choice(("all", "none", "reply", "scattered"))
        choice = {"all": lambda p: True, "none": lambda p: False, "reply": start.__le__}
        flags.extend(map(choice.get(kind, lambda p: rng.random() < 0.5), range(length)))
    return torch.tensor(flags + [False] * padding)


def random_packing(seed: int) -> Packing:
    """Odd lengths including 1, partly trainable documents, random, suffix and mixed noise, blocks of 1..32, and exactly
    as many rows as are needed or a few more."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [rng.choice((1, 1, 2, 3, 5, 7, rng.randint(1, 20))) for _ in range(rng.randint(1, 4))]
    padding, block_size = rng.choice((0, 0, 1, 6)), rng.choice((1, 2, 3, 4, 5, 8, 16, 32))
    positions, documents = spread(lengths, padding)
    trainable = random_trainable(rng, lengths, padding)
    by_block = rng.random() < 0.7
    noise = random_noise(positions, documents, trainable, block_size, generator, by_block)
    kind = rng.choice(("random", "suffix", "mixed"))
    if kind != "random":
        suffix = suffix_noise(documents, trainable, block_size, generator)
        chosen = torch.tensor([kind == "suffix" or rng.random() < 0.5 for _ in lengths])
        noise = mix_noise(documents, noise, suffix, chosen[documents.clamp(min=0)])
    tokens = torch.tensor([rng.randrange(VOCABULARY) for _ in range(len(positions))])
    packing = Packing(tokens, positions, documents, trainable, block_size, generator, noise, num_rows=0)
    num_rows = len(packing.plain_rows) + rng.choice((0, 0, 1, 9))
    return dataclasses.replace(packing, num_rows=num_rows)


@functools.cache
def random_packings(count: int = 500) -> list[Packing]:
    return [random_packing(seed) for seed in range(count)]
