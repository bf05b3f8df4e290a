# SPDX-License-Identifier: Apache-2.0
"""Two ways to choose which positions of a training sequence are masked (paper section 3.3).

A sequence is L positions that hold one or more documents; a *block* is a run of consecutive positions of one document.
Only ``trainable`` positions are ever masked: the replies in fine-tuning, everything in continued training.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Noise of L positions.

    ``block`` numbers the blocks along the sequence, so positions share a block iff their numbers are equal. ``ratio``
    is the share γ that was drawn for the position's block.
    """

    block: Int[Tensor, " L"]
    masked: Bool[Tensor, " L"]
    ratio: Float[Tensor, " L"]


def random_noise(
    positions: Int[Tensor, " L"],
    documents: Int[Tensor, " L"],
    trainable: Bool[Tensor, " L"],
    block_size: int,
    generator: torch.Generator,
    ratio_per_block: bool = True,
) -> Noise:
    """The paper's noise: every block of ``block_size`` positions draws γ ~ U(0, 1] and masks round(γ · n) of its n
    trainable positions, uniformly and without replacement.

    ``positions`` count from 0 in each document, and ``documents`` number the documents. A block also ends where
    positions jump, as they do around a suffix that comes before its gap. ``ratio_per_block`` False draws one γ for a
    whole document.
    """
    jump = torch.zeros(len(positions), dtype=torch.long)
    jump[1:] = (positions[1:] != positions[:-1] + 1).long()
    block = _number_runs(documents, jump.cumsum(dim=0), positions // block_size)
    drawn_for = block if ratio_per_block else _number_runs(documents)
    gamma = 1 - torch.rand(len(block), generator=generator, dtype=torch.float64)[drawn_for]
    order_key = torch.rand(len(block), generator=generator, dtype=torch.float64)
    count = torch.zeros(len(block), dtype=torch.long).index_add_(0, block, trainable.long())
    start = torch.searchsorted(block, torch.arange(len(block)))
    # Within a block: its trainable positions first, in random order, so that a place in the order is a rank among them.
    order = torch.argsort(block * 2.0 + torch.where(trainable, order_key * 0.5, 1.0))
    rank = torch.empty_like(block)
    rank[order] = torch.arange(len(block))
    chosen = rank - start[block] < torch.round(gamma * count[block])
    return Noise(block, trainable & chosen, gamma.float())


def suffix_noise(
    documents: Int[Tensor, " L"], trainable: Bool[Tensor, " L"], block_size: int, generator: torch.Generator
) -> Noise:
    """The noise that verified decoding meets: a filled prefix, then only masks.

    A block with a random observed prefix and a masked suffix equals a fully masked block that starts where the suffix
    did, because observed positions before the first mask are computed as in the clean stream. Blocks therefore have
    random lengths, uniform in 1 .. ``block_size``, and γ = 1, so that the prediction stream wastes no row on a prefix.
    A block never mixes trainable and other positions, and the latter are never masked.
    """
    run = _number_runs(documents, trainable.long())
    lengths = torch.randint(1, block_size + 1, (len(run),), generator=generator)
    # Cuts at the running sums of the lengths, counted from the start of each run: its first block is a full draw.
    index = torch.arange(len(run))
    ends = lengths.cumsum(dim=0)
    run_start = torch.searchsorted(run, run)
    first = torch.where(run_start > 0, ends[(run_start - 1).clamp(min=0)], 0)
    drawn = torch.searchsorted(ends, index - run_start + first, right=True)
    return Noise(_number_runs(run, drawn), trainable.clone(), torch.ones(len(run)))


def mix_noise(documents: Int[Tensor, " L"], first: Noise, second: Noise, use_second: Bool[Tensor, " L"]) -> Noise:
    """Combine two kinds of noise in one sequence; ``use_second`` is the same at all positions of a document."""
    return Noise(
        _number_runs(documents, torch.where(use_second, second.block, first.block)),
        torch.where(use_second, second.masked, first.masked),
        torch.where(use_second, second.ratio, first.ratio),
    )


def draw_noise(
    positions: Int[Tensor, " L"],
    documents: Int[Tensor, " L"],
    trainable: Bool[Tensor, " L"],
    block_size: int,
    generator: torch.Generator,
    ratio_per_block: bool = True,
    suffix_share: float = 0.0,
) -> Noise:
    """Draw the noise of training: ``suffix_noise`` for this share of the documents, chosen one by one, ``random_noise``
    for the others."""
    noise = random_noise(positions, documents, trainable, block_size, generator, ratio_per_block)
    if not suffix_share:
        return noise
    suffix = suffix_noise(documents, trainable, block_size, generator)
    chosen = torch.rand(int(documents.max()) + 1, generator=generator) < suffix_share
    return mix_noise(documents, noise, suffix, chosen[documents.clamp(min=0)])


def _number_runs(*keys: Int[Tensor, " L"]) -> Int[Tensor, " L"]:
    """The number, from 0, of the run of equal keys that each position belongs to."""
    changed = torch.zeros(len(keys[0]), dtype=torch.bool)
    for key in keys:
        changed[1:] |= key[1:] != key[:-1]
    return changed.long().cumsum(dim=0)
