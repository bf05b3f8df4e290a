# SPDX-License-Identifier: Apache-2.0
"""What a whole model computes in a dual-stream forward is what inference computes, row by row.

In float64, so that no tolerance hides a key too many.
"""

import functools

import pytest
import torch
from torch import Tensor

from tests.algorithm.packings import MASK_ID, Packing, PlainRow, random_packings, spread
from tests.model.tiny import causal_attend, our_model
from wedlm.algorithm.dual_stream import DualStream, RowLabels, RowRanges, dual_stream, row_ranges
from wedlm.algorithm.noise import Noise, suffix_noise
from wedlm.attention.dual_stream import plan_training_attention
from wedlm.model import Transformer


@functools.cache
def model() -> Transformer:
    return our_model("qwen3-bias").double()


def forward(rows: list[DualStream]) -> Tensor:
    """Logits [N, R, V] of a batch of dual-stream sequences."""
    labels = RowLabels(*(torch.stack(parts) for parts in zip(*(own.labels for own in rows), strict=True)))
    ranges = RowRanges(*(torch.stack(parts) for parts in zip(*(row_ranges(own.labels) for own in rows), strict=True)))
    attend = plan_training_attention("dense", labels, ranges)
    tokens, positions = (torch.stack([getattr(own, name) for own in rows]) for name in ("tokens", "positions"))
    with torch.inference_mode():
        logits = model()(tokens.flatten(), positions.flatten(), attend)
    assert logits.isfinite().all()  # those of padding, too
    return logits.unflatten(0, tokens.shape)


def causal_logits(tokens: list[int], positions: list[int]) -> Tensor:
    """The plain causal model over rows in this order."""
    with torch.inference_mode():
        return model()(torch.tensor(tokens), torch.tensor(positions), causal_attend)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def blocks_of(packing: Packing) -> dict[tuple[int, int], list[int]]:
    """The prediction rows of each (document, block), in their order."""
    blocks: dict[tuple[int, int], list[int]] = {}
    for r, row in enumerate(packing.plain_rows):
        if row.stream == "prediction":
            blocks.setdefault((row.document, row.block), []).append(r)
    return blocks


@pytest.mark.parametrize("seed", range(24))
def test_rows_are_those_of_a_causal_forward(seed):
    """A block after the clean tokens before it, observed rows first: what decoding runs over its cache. And the clean
    stream of a document is an ordinary forward of that document alone."""
    packing = random_packings()[seed]
    rows, tokens = packing.plain_rows, packing.tokens.tolist()
    logits = forward([packing.stream])[0]
    clean: dict[int, list[PlainRow]] = {}
    for row in rows:
        if row.stream == "clean":
            clean.setdefault(row.document, []).append(row)
    for document, own in clean.items():
        numbers = [r for r, row in enumerate(rows) if row.stream == "clean" and row.document == document]
        assert_equal(logits[numbers], causal_logits([tokens[row.source] for row in own], list(range(len(own)))))
    for (document, start), numbers in blocks_of(packing).items():
        earlier = [tokens[row.source] for row in clean[document][:start]]
        block = [MASK_ID if rows[r].masked else tokens[rows[r].source] for r in numbers]
        positions = [*range(start), *(rows[r].position for r in numbers)]
        assert [rows[r].masked for r in numbers] == sorted(rows[r].masked for r in numbers)
        assert_equal(logits[numbers], causal_logits(earlier + block, positions)[start:])


def two_documents() -> tuple[list[int], Tensor, Tensor, Noise]:
    """(lengths, positions, documents, noise) of 13 and 10 tokens in blocks of 4, every other position masked."""
    lengths = [13, 10]
    positions, documents = spread(lengths, padding=3)
    block = torch.unique_consecutive(documents * 100 + positions // 4, return_inverse=True)[1]
    return lengths, positions, documents, Noise(block, (positions % 2 == 1) & (documents >= 0), torch.ones(26))


@pytest.mark.parametrize("changed", ["first", "second", "padding"])
def test_documents_and_padding_influence_nobody_else(changed):
    lengths, positions, documents, noise = two_documents()
    tokens = torch.randint(0, 90, (26,), generator=torch.Generator().manual_seed(0))
    number = {"first": 0, "second": 1, "padding": -1}[changed]
    others = torch.where(documents == number, (tokens + 17) % 90, tokens)
    everything = documents >= 0
    before, after = (
        dual_stream(t, positions, documents, everything, noise, MASK_ID, 2 * sum(lengths) + 4) for t in (tokens, others)
    )
    if changed == "padding":  # its tokens do not even enter the rows, so they are changed there
        after = DualStream(**{**vars(after), "tokens": after.tokens + 17 * (after.labels.document == -1)})
    logits = forward([before, after])
    same = (before.labels.document != number) & (before.labels.document != -1)
    assert torch.equal(logits[0, same], logits[1, same])
    assert not torch.equal(logits[0, ~same], logits[1, ~same])


@pytest.mark.parametrize("seed", range(4))
def test_suffix_noise_is_an_observed_prefix_and_a_masked_suffix(seed):
    """A fully masked block that starts anywhere gives the logits of a block with an observed prefix before it."""
    length = 22
    positions, documents = spread([length])
    everything = torch.ones(length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 90, (length,), generator=generator)
    noise = suffix_noise(documents, everything, 6, generator)

    def rows(own: Noise) -> DualStream:
        return dual_stream(tokens, positions, documents, everything, own, MASK_ID, 2 * length)

    explicit, spans = [], []
    for number in noise.block.unique().tolist():
        inside = torch.nonzero(noise.block == number).flatten()
        start, end = int(inside[0]), int(inside[-1]) + 1
        prefix = int(torch.randint(0, min(start, 8) + 1, (1,), generator=generator))
        block = (positions >= start - prefix).long() + (positions >= end)
        masked = (positions >= start) & (positions < end)
        explicit.append(rows(Noise(block, masked, torch.ones(length))))
        spans.append((start, end))
    logits = forward([rows(noise), *explicit])
    for (start, end), own, own_logits in zip(spans, explicit, logits[1:], strict=True):
        assert own.masked.sum() == end - start
        assert_equal(own_logits[own.masked], logits[0, length + start : length + end])


def test_suffixes_of_fixed_blocks_are_blocks_of_their_own():
    """All blocks of one sequence at once: [observed | masked] in blocks of 5 against blocks cut at the bar."""
    length = 23
    positions, documents = spread([length])
    everything = torch.ones(length, dtype=torch.bool)
    tokens = torch.randint(0, 90, (length,), generator=torch.Generator().manual_seed(1))
    observed = torch.tensor([3, 0, 5, 1, 2])  # of each block
    masked = positions % 5 >= observed[positions // 5]
    fixed = Noise(positions // 5, masked, torch.ones(length))
    cut = Noise(torch.unique_consecutive(positions // 5 * 2 + masked, return_inverse=True)[1], masked, fixed.ratio)
    both = [dual_stream(tokens, positions, documents, everything, own, MASK_ID, 2 * length) for own in (fixed, cut)]
    logits = forward(both)
    assert both[1].labels.prediction.sum() == masked.sum()  # no row is spent on a prefix
    assert_equal(logits[0, both[0].masked], logits[1, both[1].masked])
