# SPDX-License-Identifier: Apache-2.0
"""Micro-batches: packed sequences of data with noise, as the tensors that one forward takes."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wedlm.algorithm.dual_stream import DualStream, RowLabels, RowRanges, clean_stream, dual_stream, row_ranges
from wedlm.algorithm.noise import draw_noise
from wedlm.algorithm.objective import LossTotals, row_coefficients
from wedlm.train.config import TrainConfig
from wedlm.train.packing import PackedSequence

# Losses are reported apart for each depth in a block up to this one, and for ratios in tenths.
NUM_DEPTHS = 32
NUM_RATIOS = 10
AR_GROUP = 0
NUM_GROUPS = 1 + NUM_DEPTHS + NUM_RATIOS
# The rows with a loss are padded to a multiple of this, so that compiled kernels meet one shape.
_LOSS_ROWS_MULTIPLE = 1024
# Rows of a prediction stream of its own are cut to a multiple of this.
_PREDICTION_ROWS_MULTIPLE = 512


@dataclass(frozen=True)
class TrainBatch:
    """N sequences of R rows, and the K rows of them that have a loss (padded by rows of coefficient 0).

    ``loss_rows`` index the N · R flattened rows. ``coefficient`` comes from ``row_coefficients``; it is empty until the
    totals of the optimiser batch are known. ``depth_group`` and ``ratio_group`` number the statistics that a row counts
    in (NUM_GROUPS: none). ``is_text`` marks AR rows of plain text, which is learnt from its beginning. ``ar_row`` is
    that of ``DualStream``, as an index of the flattened rows. ``entropy_coefficient`` is that of ``chunked_losses``, or
    None without such a term. ``num_clean_tokens`` counts those of the clean stream without padding. ``num_clean_rows``
    is 0, or the row at which all sequences' prediction streams begin.
    """

    tokens: Tensor  # [N, R]
    positions: Tensor  # [N, R]
    document: Tensor  # [N, R]
    block: Tensor  # [N, R]
    prediction: Tensor  # [N, R]
    masked: Tensor  # [N, R]
    ranges: Tensor  # [3, N, R]
    loss_rows: Tensor  # [K]
    target: Tensor  # [K]
    weight: Tensor  # [K]
    is_ar: Tensor  # [K]
    is_text: Tensor  # [K]
    depth_group: Tensor  # [K]
    ratio_group: Tensor  # [K]
    ar_row: Tensor  # [K]
    coefficient: Tensor  # [K]
    entropy_coefficient: Tensor | None  # [K]
    num_clean_tokens: int
    num_clean_rows: int

    @property
    def labels(self) -> RowLabels:
        return RowLabels(self.document, self.block, self.prediction)

    @property
    def row_ranges(self) -> RowRanges:
        return RowRanges(*self.ranges)

    def totals(self) -> LossTotals:
        return LossTotals(float(self.weight.double().sum()), float(self.is_ar.sum()))

    def to(
        self, device: torch.device, totals: LossTotals, ar_loss_weight: float, entropy_weight: float = 0.0
    ) -> "TrainBatch":
        """The batch on ``device``, with coefficients for these totals.

        The entropy term counts ``entropy_weight`` times as much as the CE.
        """
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        coefficient = row_coefficients(self.weight, self.is_ar, totals, ar_loss_weight)
        values["coefficient"] = coefficient
        if entropy_weight:
            values["entropy_coefficient"] = torch.where(self.is_ar, 0.0, coefficient * entropy_weight)
        for name, value in values.items():
            if isinstance(value, Tensor):
                pinned = value.pin_memory() if device.type == "cuda" else value
                values[name] = pinned.to(device, non_blocking=True)
        return TrainBatch(**values)


def noised_rows(sequence: PackedSequence, index: int, config: TrainConfig, mask_token_id: int) -> DualStream:
    """The training rows of one packed sequence.

    Noise depends only on (seed, ``index`` of the sequence), so it is the same for any number of processes and after any
    resume.
    """
    tokens, positions, documents, trainable = (
        torch.from_numpy(np.ascontiguousarray(array))
        for array in (sequence.tokens, sequence.positions, sequence.documents, sequence.trainable)
    )
    if config.objective == "autoregressive":
        return clean_stream(tokens, positions, documents, trainable)
    seed = np.random.SeedSequence((config.seed, index)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(seed >> 1))
    noise = draw_noise(
        positions, documents, trainable, config.block_size, generator, config.mask_per_block, config.suffix_noise
    )
    return dual_stream(
        tokens,
        positions,
        documents,
        trainable,
        noise,
        mask_token_id,
        config.num_rows,
        uniform_weights=config.loss_weighting_scheme == "uniform",
        clean_rows=_clean_rows(config),
    )


def _clean_rows(config: TrainConfig) -> int:
    """The rows of the clean stream if it is computed separately, which is possible because with a LoRA of masked rows
    no gradient reaches a clean row."""
    return config.max_seq_length if config.lora_rows == "masked" else 0


def without_loss(sequence: PackedSequence) -> PackedSequence:
    """The same sequence with nothing to learn: it takes part in a forward and counts in no metric."""
    return dataclasses.replace(sequence, trainable=np.zeros_like(sequence.trainable))


def collate_sequences(
    sequences: Sequence[PackedSequence], indices: Sequence[int], config: TrainConfig, mask: int
) -> TrainBatch:
    """The micro-batch of these sequences. ``indices`` are their global numbers, ``mask`` the mask token's id."""
    rows = [noised_rows(one, index, config, mask) for one, index in zip(sequences, indices, strict=True)]
    return collate(rows, _clean_rows(config))


def collate(sequences: list[DualStream], clean_rows: int = 0) -> TrainBatch:
    """One micro-batch, without coefficients. ``clean_rows`` is that of all sequences."""
    end = len(sequences[0].tokens)
    if clean_rows:  # few numbers of rows occur, and little of what is padding in all sequences
        used = max(1, *(int(one.labels.prediction.sum()) for one in sequences))
        end = min(end, clean_rows + -(-used // _PREDICTION_ROWS_MULTIPLE) * _PREDICTION_ROWS_MULTIPLE)

    def stacked(parts: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(parts), dim=-2)[..., :end]

    def rows(name: str) -> Tensor:
        return stacked(getattr(one, name) for one in sequences)

    masked, is_ar = rows("masked"), rows("is_ar")
    loss_rows = torch.nonzero((masked | is_ar).flatten()).flatten()
    padding = -len(loss_rows) % _LOSS_ROWS_MULTIPLE
    loss_rows = torch.cat((loss_rows, loss_rows.new_zeros(padding)))
    real = torch.arange(len(loss_rows)) < len(loss_rows) - padding

    def of_loss_rows(values: Tensor) -> Tensor:
        return values.flatten()[loss_rows]

    is_ar = of_loss_rows(is_ar) & real
    has_masked_loss = of_loss_rows(masked) & real
    depth = 1 + of_loss_rows(rows("depth")).clamp(max=NUM_DEPTHS - 1)
    tenth = (of_loss_rows(rows("ratio")) * NUM_RATIOS).ceil().long().clamp(1, NUM_RATIOS) - 1
    ar_row = of_loss_rows(rows("ar_row"))
    labels = [one.labels for one in sequences]
    return TrainBatch(
        tokens=rows("tokens"),
        positions=rows("positions"),
        document=stacked(one.document for one in labels),
        block=stacked(one.block for one in labels),
        prediction=stacked(one.prediction for one in labels),
        masked=masked,
        ranges=stacked(torch.stack(row_ranges(one)) for one in labels).int(),
        loss_rows=loss_rows,
        target=of_loss_rows(rows("target")),
        weight=torch.where(real, of_loss_rows(rows("weight")), 0.0),
        is_ar=is_ar,
        is_text=of_loss_rows(stacked(_text_rows(one) for one in sequences)) & is_ar,
        depth_group=torch.where(is_ar, AR_GROUP, torch.where(has_masked_loss, depth, NUM_GROUPS)),
        ratio_group=torch.where(has_masked_loss, 1 + NUM_DEPTHS + tenth, NUM_GROUPS),
        ar_row=torch.where(has_masked_loss & (ar_row >= 0), ar_row + loss_rows // end * end, -1),
        coefficient=torch.empty(0),
        entropy_coefficient=None,
        num_clean_tokens=sum(int(((one.document >= 0) & ~one.prediction).sum()) for one in labels),
        num_clean_rows=clean_rows,
    )


def _text_rows(sequence: DualStream) -> Tensor:
    """Rows of documents whose very first row has an AR target, because a conversation begins with a question."""
    document = sequence.labels.document
    texts = document[(sequence.positions == 0) & sequence.is_ar & ~sequence.labels.prediction]
    return torch.isin(document, texts)
