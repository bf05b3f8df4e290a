# SPDX-License-Identifier: Apache-2.0
"""Training rows and who sees whom, against the definitions applied row by row and pair by pair."""

import pytest
import torch
from torch import Tensor

from tests.algorithm.packings import MASK_ID, Packing, PlainRow, random_packings, spread
from wedlm.algorithm.dual_stream import (
    PADDING,
    AttentionRange,
    DualStream,
    RowLabels,
    attention_ranges,
    clean_stream,
    dense_mask,
    dual_stream,
    row_ranges,
)
from wedlm.algorithm.noise import Noise


def expanded(plan: list[AttentionRange], num_rows: int) -> Tensor:
    """How many of the ranges let each pair through: int [query R, key R]."""
    times = torch.zeros(num_rows, num_rows, dtype=torch.int)
    for part in plan:
        for query in range(part.query_start, part.query_end):
            end = part.key_end - (part.query_end - 1 - query) * part.causal
            times[query, part.key_start : end] += 1
    return times


def rows_by_loop(packing: Packing, uniform_weights: bool = False) -> list[tuple]:
    """(token, position, document, is prediction, target, masked, is_ar, weight, depth, ratio) of each row."""
    tokens, documents, trainable = packing.tokens.tolist(), packing.documents.tolist(), packing.trainable.tolist()
    rows: list[tuple] = []
    earlier: list[PlainRow] = []
    for row in packing.plain_rows:
        i, depth = row.source, 0
        ratio = packing.noise.ratio[i].item()
        target, is_ar, weight, token = 0, False, 0.0, tokens[i]
        if row.masked:
            target, token, weight = tokens[i], MASK_ID, 1.0 if uniform_weights else 1 / ratio
            depth = sum(e.masked and (e.document, e.block) == (row.document, row.block) for e in earlier)
        elif row.stream == "clean" and i + 1 < len(tokens) and documents[i + 1] == row.document and trainable[i + 1]:
            target, is_ar = tokens[i + 1], True
        prediction = row.stream == "prediction"
        rows.append((token, row.position, row.document, prediction, target, row.masked, is_ar, weight, depth, ratio))
        earlier.append(row)
    padding = (0, 0, PADDING, False, 0, False, False, 0.0, 0, 1.0)
    return rows + [padding] * (packing.num_rows - len(rows))


def columns(rows: DualStream) -> list[tuple]:
    values = (
        rows.tokens,
        rows.positions,
        rows.labels.document,
        rows.labels.prediction,
        rows.target,
        rows.masked,
        rows.is_ar,
        rows.weight,
        rows.depth,
        rows.ratio,
    )
    return list(zip(*(value.tolist() for value in values), strict=True))


def assert_same_rows(found: list[tuple], expected: list[tuple]) -> None:
    assert [row[:7] + row[8:] for row in found] == [row[:7] + row[8:] for row in expected]
    assert [row[7] for row in found] == pytest.approx([row[7] for row in expected], rel=1e-6)


def test_rows_equal_a_loop():
    for packing in random_packings():
        assert_same_rows(columns(packing.stream), rows_by_loop(packing))


def test_a_clean_stream_may_be_padded():
    """Everything but the place of the prediction stream is as it was, who sees whom, too."""
    for packing in random_packings()[:100]:
        parts = packing.tokens, packing.positions, packing.documents, packing.trainable, packing.noise, MASK_ID
        clean_rows = len(packing.tokens) + 3
        num_clean = int((packing.documents != PADDING).sum())
        rows = dual_stream(*parts, packing.num_rows + 3 + len(packing.tokens) - num_clean, clean_rows=clean_rows)
        kept = torch.arange(len(rows.tokens))
        kept = kept[(kept < num_clean) | (kept >= clean_rows)]
        assert_same_rows([columns(rows)[r] for r in kept], columns(packing.stream))
        assert torch.equal(dense_mask(rows.labels)[kept][:, kept], packing.seen)
        assert rows.labels.document[num_clean:clean_rows].eq(PADDING).all()


def test_the_ar_row_stands_at_the_token_before():
    for packing in random_packings():
        found = packing.stream.ar_row.tolist()
        clean = {row.source: r for r, row in enumerate(packing.plain_rows) if row.stream == "clean"}
        for r, row in enumerate(packing.plain_rows):
            assert found[r] == (clean[row.source - 1] if row.masked and row.position else -1)
        assert set(found[len(packing.plain_rows) :]) <= {-1}


def test_block_labels_number_the_blocks():
    """Rows of a document share a label iff they share a block, and labels rise with the blocks."""
    for packing in random_packings():
        label = packing.stream.labels.block.tolist()
        named = {(row.document, row.block, label[r]) for r, row in enumerate(packing.plain_rows)}
        assert len(named) == len({name[:2] for name in named}) == len({name[2] for name in named})
        assert [name[2] for name in sorted(named)] == sorted(name[2] for name in named)


def test_dense_mask_equals_brute_force():
    for packing in random_packings():
        assert torch.equal(dense_mask(packing.stream.labels), packing.seen)


def test_attention_ranges_equal_brute_force():
    """Each pair that is seen is covered exactly once: a kernel would count it twice in its softmax."""
    for packing in random_packings():
        times = expanded(attention_ranges(row_ranges(packing.stream.labels)), packing.num_rows)
        assert torch.equal(times, packing.seen.int())


def test_row_ranges_equal_brute_force():
    for packing in random_packings():
        clean_start, clean_end, own_start = (part[:, None] for part in row_ranges(packing.stream.labels))
        key = torch.arange(packing.num_rows)
        visible = (key >= clean_start) & (key < clean_end) | (key >= own_start) & (key <= key[:, None])
        assert torch.equal(visible, packing.seen)


def test_the_random_packings_are_worth_it():
    """What the tests above are meant to meet does occur."""
    packings = random_packings()
    rows = [row for packing in packings for row in packing.plain_rows]
    assert any(len(packing.plain_rows) < packing.num_rows for packing in packings)
    assert any(packing.documents.tolist().count(0) == 1 for packing in packings)
    assert 0.3 < sum(row.masked for row in rows) / sum(row.stream == "prediction" for row in rows) < 0.9
    assert any(not packing.noise.masked.any() for packing in packings)
    assert sum(packing.noise.masked.any().item() for packing in packings) > 400
    assert max(packing.num_rows for packing in packings) > 64


def test_a_batch_of_sequences_has_one_mask_each():
    packings = [packing for packing in random_packings() if packing.num_rows == 30][:3]
    assert len(packings) == 3
    labels = RowLabels(*(torch.stack(parts) for parts in zip(*(p.stream.labels for p in packings), strict=True)))
    assert torch.equal(dense_mask(labels), torch.stack([packing.seen for packing in packings]))


def make(lengths: list[int], masked: list[int], block_size: int, num_rows: int, **options) -> DualStream:
    """Everything trainable, γ = 1/2, these indices masked; token i is 100 + i."""
    positions, documents = spread(lengths)
    block = torch.tensor(
        [d * 100 + p // block_size for d, p in zip(documents.tolist(), positions.tolist(), strict=True)]
    )
    block = torch.unique(block, return_inverse=True)[1]
    flags = torch.zeros(len(positions), dtype=torch.bool)
    flags[masked] = True
    noise = Noise(block, flags, torch.full((len(positions),), 0.5))
    tokens, everything = 100 + torch.arange(len(positions)), torch.ones_like(flags)
    return dual_stream(tokens, positions, documents, everything, noise, MASK_ID, num_rows, **options)


def test_rows_of_a_small_example():
    """Documents of 5 and 2 tokens, blocks of 2; the block of positions 2 and 3 has no mask and is not predicted."""
    rows = make([5, 2], [0, 4, 5, 6], block_size=2, num_rows=13)
    assert rows.tokens.tolist() == [*range(100, 107), 101, MASK_ID, MASK_ID, MASK_ID, MASK_ID, 0]
    assert rows.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 1, 0, 4, 0, 1, 0]
    assert rows.target.tolist() == [101, 102, 103, 104, 0, 106, 0, 0, 100, 104, 105, 106, 0]
    assert rows.depth.tolist() == [0] * 11 + [1, 0]
    assert rows.weight.tolist() == [0.0] * 8 + [2.0] * 4 + [0.0]
    assert [[k for k, flag in enumerate(row) if flag] for row in dense_mask(rows.labels).tolist()[7:]] == [
        [7],
        [7, 8],
        [0, 1, 2, 3, 9],
        [10],
        [10, 11],
        [12],
    ]


def test_uniform_weights_weigh_masked_rows_one():
    rows = make([5, 2], [0, 4, 5, 6], block_size=2, num_rows=13, uniform_weights=True)
    assert torch.equal(rows.weight, rows.masked.float())


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="num_rows is 11; expected at least 12 for these documents"):
        make([5, 2], [0, 4, 5, 6], block_size=2, num_rows=11)


def test_padding_that_claims_to_be_masked_or_trainable_has_no_rows():
    """Noise drawn over a whole sequence may mask padding; nothing of that may be learned."""
    positions, documents = spread([3], padding=3)
    everything = torch.ones(6, dtype=torch.bool)
    noise = Noise(torch.tensor([0, 0, 0, 1, 1, 1]), everything, torch.ones(6))
    rows = dual_stream(100 + torch.arange(6), positions, documents, everything, noise, MASK_ID, 12)
    assert rows.masked.tolist() == [False] * 3 + [True] * 3 + [False] * 6
    assert rows.is_ar.tolist() == [True, True] + [False] * 10
    assert rows.labels.document.tolist() == [0] * 6 + [PADDING] * 6
    shared = Noise(torch.zeros(6, dtype=torch.long), documents == PADDING, torch.ones(6))
    rows = dual_stream(100 + torch.arange(6), positions, documents, everything, shared, MASK_ID, 12)
    assert not rows.labels.prediction.any()


def test_clean_stream_is_the_causal_half():
    for packing in random_packings(60):
        rows = clean_stream(packing.tokens, packing.positions, packing.documents, packing.trainable)
        clean = [row for row in rows_by_loop(packing) if not row[3] and row[2] != PADDING]
        found = [row[:7] for row in columns(rows)]
        assert found[: len(clean)] == [row[:7] for row in clean]
        assert not rows.masked.any()
        assert not rows.weight.any()
        seen = dense_mask(rows.labels)[: len(clean), : len(clean)]
        assert torch.equal(seen, packing.seen[: len(clean), : len(clean)])
        times = expanded(attention_ranges(row_ranges(rows.labels)), len(packing.tokens))
        assert torch.equal(times.bool(), dense_mask(rows.labels))
