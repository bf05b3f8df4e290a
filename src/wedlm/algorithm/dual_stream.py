# SPDX-License-Identifier: Apache-2.0
"""Dual-stream training rows (paper section 3.3): a clean stream, a prediction stream, and which rows see which.

``sees`` is the only rule. This module derives the dense mask and the list of ranges from it, and
``wedlm.attention.flex`` FlexAttention's block mask; tests compare all of them with the rule applied pair by pair.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wedlm.algorithm.noise import Noise

PADDING = -1


class RowLabels(NamedTuple):
    """The labels that decide which rows see each other, for R rows (or [..., R] of several sequences).

    ``document`` is PADDING for padding rows. ``block`` rises along each document in both streams. ``prediction``
    distinguishes the streams. Clean rows come first, ordered by position; prediction rows follow, ordered by document,
    then block, and within a block observed before masked.
    """

    document: Int[Tensor, "*S R"]
    block: Int[Tensor, "*S R"]
    prediction: Bool[Tensor, "*S R"]


@dataclass(frozen=True)
class DualStream:
    """R training rows of one sequence.

    ``target`` is the token whose cross-entropy counts at a row: a masked row's own token, a clean row's next token
    (0 where ``is_ar`` and ``masked`` are both False). ``weight`` is that of the masked loss, 0 elsewhere; ``depth`` is
    how many masked rows of its block come before a masked row; ``ratio`` its block's γ. ``ar_row`` is the clean row
    whose AR head predicts a masked row's token, -1 for a document's first token, in a gap, and where no row is masked.
    """

    tokens: Int[Tensor, " R"]
    positions: Int[Tensor, " R"]
    labels: RowLabels
    target: Int[Tensor, " R"]
    masked: Bool[Tensor, " R"]
    is_ar: Bool[Tensor, " R"]
    weight: Float[Tensor, " R"]
    depth: Int[Tensor, " R"]
    ratio: Float[Tensor, " R"]
    ar_row: Int[Tensor, " R"]


def sees(
    query: RowLabels, key: RowLabels, query_row: Int[Tensor, "*#B"], key_row: Int[Tensor, "*#B"]
) -> Bool[Tensor, "*#B"]:
    """Whether each query row sees each key row; arguments broadcast against each other.

    Clean → clean: causal. Prediction → clean: earlier blocks only. Prediction → prediction: same block, causal in row
    order. Clean → prediction and across documents: never. Padding sees itself alone, so that no softmax is empty.
    """
    causal = key_row <= query_row
    own_stream = causal & (~query.prediction | (key.block == query.block))
    other_stream = query.prediction & (key.block < query.block)
    related = torch.where(query.prediction == key.prediction, own_stream, other_stream)
    there = (query.document != PADDING) & (query.document == key.document)
    return torch.where(there, related, key_row == query_row)


def dense_mask(labels: RowLabels) -> Bool[Tensor, "*S R R"]:
    """``sees`` for all pairs: [..., query, key]."""
    row = torch.arange(labels.document.shape[-1], device=labels.document.device)
    query = RowLabels(*(label[..., :, None] for label in labels))
    key = RowLabels(*(label[..., None, :] for label in labels))
    return sees(query, key, row[:, None], row[None, :])


class RowRanges(NamedTuple):
    """``sees`` as two ranges of key rows for each query row q (of R, or [..., R] of several sequences): [clean_start,
    clean_end), which is empty for clean rows, and [own_start, q]. Kernels take these: three numbers per query row, and
    none per key."""

    clean_start: Int[Tensor, "*S R"]
    clean_end: Int[Tensor, "*S R"]
    own_start: Int[Tensor, "*S R"]


def row_ranges(labels: RowLabels) -> RowRanges:
    """The ranges of one sequence; they rely on the order of its rows."""
    document, block, prediction = labels
    row = torch.arange(len(document), device=document.device)
    there = document != PADDING
    clean = there & ~prediction

    def first_clean_row(key: Tensor) -> Tensor:
        """For every row, the first clean row with the same key."""
        first = torch.full_like(row, len(row)).scatter_reduce(0, key[clean], row[clean], "amin")
        return torch.where(there, first[key.clamp(min=0)], row)

    document_start = first_clean_row(document)
    starts_block = prediction.clone()
    starts_block[1:] &= (block[1:] != block[:-1]) | ~prediction[:-1]
    block_start = torch.where(starts_block, row, 0).cummax(dim=0).values
    predicts = there & prediction
    return RowRanges(
        torch.where(predicts, document_start, 0),
        torch.where(predicts, first_clean_row(block), 0),
        torch.where(predicts, block_start, document_start),
    )


class AttentionRange(NamedTuple):
    """Query rows [query_start, query_end) see key rows [key_start, key_end): all of them, or, if ``causal``, query row
    query_end - 1 - i sees keys up to key_end - 1 - i."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int
    causal: bool


def attention_ranges(ranges: RowRanges) -> list[AttentionRange]:
    """The ranges of one sequence, with equal query rows merged, for kernels that take ranges (MagiAttention). No pair
    is covered twice."""
    changed = torch.ones(len(ranges.own_start), dtype=torch.bool, device=ranges.own_start.device)
    changed[1:] = torch.stack([part[1:] != part[:-1] for part in ranges]).any(dim=0)
    starts = torch.nonzero(changed).flatten().tolist()
    plan = []
    for start, end in zip(starts, [*starts[1:], len(changed)], strict=True):
        clean_start, clean_end, own_start = (int(part[start]) for part in ranges)
        # Rows of a run share the start of their own keys, so the run's keys are a triangle on the diagonal.
        plan.append(AttentionRange(start, end, own_start, end, causal=True))
        if clean_end > clean_start:
            plan.append(AttentionRange(start, end, clean_start, clean_end, causal=False))
    return plan


def dual_stream(  # noqa: PLR0913 - the text, its noise and three choices
    tokens: Int[Tensor, " L"],
    positions: Int[Tensor, " L"],
    documents: Int[Tensor, " L"],
    trainable: Bool[Tensor, " L"],
    noise: Noise,
    mask_token_id: int,
    num_rows: int,
    uniform_weights: bool = False,
    clean_rows: int = 0,
) -> DualStream:
    """The rows of one sequence, padded to ``num_rows`` (2L always suffices). The first ``clean_rows`` or more are the
    clean stream, padded, too.

    A block without a masked position has no loss, and no row sees it, so it is left out of the prediction stream.
    ``documents`` is PADDING at padded positions. ``uniform_weights`` True gives every masked row weight 1 instead of
    1/γ.
    """
    there = documents != PADDING
    masked_here = noise.masked & there
    length = len(tokens)
    has_mask = torch.zeros(length, dtype=torch.bool)
    has_mask[noise.block[masked_here]] = True
    predicted = torch.nonzero(there & has_mask[noise.block]).flatten()
    # Topological order inside each block: observed first. Blocks rise along the sequence, so they stay in place.
    predicted = predicted[torch.argsort(noise.block[predicted] * 2 + masked_here[predicted].long(), stable=True)]
    clean = torch.nonzero(there).flatten()
    source = torch.cat((clean, predicted))
    second = max(clean_rows, len(clean))  # the first row of the prediction stream
    if second + len(predicted) > num_rows:
        raise ValueError(f"num_rows is {num_rows}; expected at least {second + len(predicted)} for these documents")
    place = torch.cat((torch.arange(len(clean)), second + torch.arange(len(predicted))))

    def rows(values: Tensor, fill: int) -> Tensor:
        return values.new_full((num_rows,), fill).index_copy_(0, place, values)

    prediction = rows((torch.arange(len(source)) >= len(clean)).long(), 0).bool()
    masked = prediction & rows(masked_here[source].long(), 0).bool()
    # A clean row's target is the next token, if that is trainable and of the same document. What follows a gap, and
    # fills it, sees what no AR row sees in decoding: such tokens do not stand in their place.
    place_in_text = torch.arange(length)
    in_place = positions == place_in_text - torch.where(positions == 0, place_in_text, 0).cummax(dim=0).values
    continues = torch.zeros(length, dtype=torch.bool)
    continues[:-1] = (documents[1:] == documents[:-1]) & there[:-1] & in_place[:-1] & in_place[1:]
    follows = continues & trainable.roll(-1)
    is_ar = ~prediction & rows(follows[source].long(), 0).bool()
    own, after = rows(tokens[source], 0), rows(tokens.roll(-1)[source], 0)
    before = torch.where(continues.roll(1), there.long().cumsum(dim=0) - 2, -1)
    ratio = rows(noise.ratio[source], 1)
    weight = torch.ones(num_rows) if uniform_weights else 1 / ratio
    labels = RowLabels(rows(documents[source], PADDING), rows(noise.block[source], 0), prediction)
    return DualStream(
        tokens=torch.where(masked, mask_token_id, own),
        positions=rows(positions[source], 0),
        labels=labels,
        target=torch.where(masked, own, torch.where(is_ar, after, 0)),
        masked=masked,
        is_ar=is_ar,
        weight=torch.where(masked, weight, 0.0),
        depth=torch.where(masked, _masked_before(masked, labels.block), 0),
        ratio=ratio,
        ar_row=torch.where(masked, rows(before[source], -1), -1),
    )


def clean_stream(
    tokens: Int[Tensor, " L"],
    positions: Int[Tensor, " L"],
    documents: Int[Tensor, " L"],
    trainable: Bool[Tensor, " L"],
) -> DualStream:
    """The rows of AR training: only the clean stream, L rows."""
    nothing = Noise(torch.zeros_like(documents), torch.zeros_like(trainable), torch.ones(len(tokens)))
    return dual_stream(tokens, positions, documents, trainable, nothing, 0, len(tokens))


def _masked_before(masked: Bool[Tensor, " R"], block: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The number of masked rows of the same block before each row; a block's masked rows are contiguous."""
    index = torch.arange(len(masked))
    starts = masked.clone()
    starts[1:] &= ~masked[:-1] | (block[1:] != block[:-1])
    return index - torch.where(starts, index, 0).cummax(dim=0).values
