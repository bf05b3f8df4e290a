# SPDX-License-Identifier: Apache-2.0
"""The masked objective for other trainers: a collator that makes the rows of both streams, and their loss.

transformers' ``Trainer`` only needs the collator. TRL's ``SFTTrainer`` adds up losses itself, so it also needs
``compute_loss_func=masked_loss``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from wedlm.algorithm.dual_stream import PADDING, DualStream, RowLabels, RowRanges, dual_stream, row_ranges
from wedlm.algorithm.noise import draw_noise
from wedlm.algorithm.objective import LossTotals, row_coefficients
from wedlm.attention.base import Attend
from wedlm.attention.dual_stream import choose_training_backend, plan_training_attention

IGNORED = -100  # the label of what is not learned, as everywhere in transformers
_BLOCK_SIZE = 32
_ROWS_MULTIPLE = 128  # numbers of rows are rounded up to it, so that compiled attention meets few of them
_LABELS = ("documents", "blocks", "predicts")


class Text(NamedTuple):
    """One example's L tokens: ids, positions from 0 in each document, numbers of the documents, and which tokens are
    learned."""

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    trainable: Tensor


class WeDLMCollator:
    """Turns examples into a batch of both streams with random noise, for which ``WeDLMForCausalLM`` computes the masked
    and the AR loss. Pass it as ``data_collator``.

    An example has ``input_ids`` [L]; ``labels`` [L], which are -100 where nothing should be learned (without labels
    everything is learned); and, if it consists of several documents, their lengths as ``seq_lengths``. In each
    document, tokens after its last learned one are left out, and an end token there is repeated. ``config`` is the
    model's, which names mask token, block size (32 if it has none) and end tokens; the other arguments are settings of
    ``wedlm train``.

    The batch's loss is divided by its own totals. If an optimiser batch consists of several of these, its loss is their
    mean by the number of rows with a loss, while ``wedlm train`` divides by the totals of the whole batch. Noise comes
    from torch's default generator and the example, so the trainer's ``seed`` decides it, and each process draws its
    own.
    """

    def __init__(
        self,
        config: Any,
        *,
        block_size: int | None = None,
        mask_per_block: bool = True,
        suffix_noise: float = 0.0,
        loss_weighting_scheme: Literal["weighted", "uniform"] = "weighted",
        num_learnable_im_end: int = 8,
        ar_loss_weight: float = 1.0,
    ) -> None:
        size = next(one for one in (block_size, config.block_size, _BLOCK_SIZE) if one is not None)
        if config.mask_token_id is None:
            raise ValueError("the model has no mask token; expected a directory that wedlm init has made")
        if loss_weighting_scheme not in ("weighted", "uniform"):
            raise ValueError(f"loss_weighting_scheme is {loss_weighting_scheme!r}; expected weighted or uniform")
        for name, value, fits, expected in (
            ("block_size", size, size >= 1, "at least 1"),
            ("suffix_noise", suffix_noise, 0 <= suffix_noise <= 1, "a share of the documents, 0 to 1"),
            ("num_learnable_im_end", num_learnable_im_end, num_learnable_im_end >= 1, "at least 1"),
            ("ar_loss_weight", ar_loss_weight, ar_loss_weight >= 0, "at least 0"),
        ):
            if not fits:
                raise ValueError(f"{name} is {value}; expected {expected}")
        ends = config.eos_token_id
        self.end_tokens = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.mask_token_id, self.block_size = config.mask_token_id, size
        self.mask_per_block, self.suffix_noise = mask_per_block, suffix_noise
        self.uniform_weights = loss_weighting_scheme == "uniform"
        self.num_end_tokens, self.ar_loss_weight = num_learnable_im_end, ar_loss_weight

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a batch. All tensors are [N, R]: R rows of N examples, padding last.

        It has ``input_ids`` and ``position_ids`` of the rows; ``documents``, ``blocks`` and ``predicts``, which are
        ``RowLabels``; ``labels`` and ``shift_labels``, both the token whose cross-entropy counts at the row itself, or
        -100; and ``loss_coefficient``, the weight of that cross-entropy.
        """
        texts = [self._text(example) for example in examples]
        longest = max(len(text.tokens) for text in texts)
        streams = [self._noised(text, 2 * longest + _ROWS_MULTIPLE) for text in texts]
        used = max(int((one.labels.document != PADDING).sum()) for one in streams)
        end = -(-used // _ROWS_MULTIPLE) * _ROWS_MULTIPLE

        def rows(name: str) -> Tensor:
            return torch.stack([getattr(one, name) for one in streams])[:, :end]

        labels_NR = (torch.stack(parts)[:, :end] for parts in zip(*(one.labels for one in streams), strict=True))
        masked, is_ar, weight = rows("masked"), rows("is_ar"), rows("weight")
        totals = LossTotals(float(weight.double().sum()), float(is_ar.sum()))
        coefficient = row_coefficients(weight.flatten(), is_ar.flatten(), totals, self.ar_loss_weight)
        labels = torch.where(masked | is_ar, rows("target"), IGNORED)
        return {
            "input_ids": rows("tokens"),
            "position_ids": rows("positions"),
            "labels": labels,
            "shift_labels": labels.clone(),
            "loss_coefficient": coefficient.view_as(weight),
            **dict(zip(_LABELS, labels_NR, strict=True)),
        }

    def seed(self, text: Text) -> int:
        """The seed of one example's noise: 32 bits, since torch's generator for CPUs uses no more."""
        return int(torch.randint(2**32, ())) ^ crc32(text.tokens.numpy().tobytes())

    def _text(self, example: Mapping[str, Any]) -> Text:
        ids = torch.as_tensor(example["input_ids"]).long()
        labels = example.get("labels")
        trainable = torch.ones_like(ids, dtype=torch.bool) if labels is None else torch.as_tensor(labels) != IGNORED
        if bool((ids == self.mask_token_id).any()):
            raise ValueError(f"an example has the mask token ({self.mask_token_id}); expected one that no text needs")
        lengths = [int(length) for length in example.get("seq_lengths") or [len(ids)]]
        if not len(ids):
            raise ValueError("an example is empty; expected at least one token")
        if ids.ndim != 1 or ids.shape != trainable.shape or sum(lengths) != len(ids):
            raise ValueError(
                f"an example has input_ids of shape {list(ids.shape)}, labels of {list(trainable.shape)} and documents "
                f"of {lengths} tokens; expected the first two alike, and documents that are all of it"
            )
        documents = [
            self._ended(*pair)
            for pair in zip(ids.split(lengths), trainable.split(lengths), strict=True)
            if len(pair[0])
        ]
        return Text(
            torch.cat([tokens for tokens, _ in documents]),
            torch.cat([torch.arange(len(tokens)) for tokens, _ in documents]),
            torch.cat([torch.full_like(tokens, number) for number, (tokens, _) in enumerate(documents)]),
            torch.cat([learned for _, learned in documents]),
        )

    def _ended(self, tokens: Tensor, trainable: Tensor) -> tuple[Tensor, Tensor]:
        """A document up to its last learned token, which is repeated if it is an end token."""
        end = int(trainable.nonzero()[-1]) + 1 if bool(trainable.any()) else 1
        tokens, trainable = tokens[:end], trainable[:end]
        if int(tokens[-1]) not in self.end_tokens or not bool(trainable[-1]):
            return tokens, trainable
        more = self.num_end_tokens - 1
        return torch.cat((tokens, tokens[-1:].expand(more))), torch.cat((trainable, trainable[-1:].expand(more)))

    def _noised(self, text: Text, num_rows: int) -> DualStream:
        generator = torch.Generator().manual_seed(self.seed(text))
        noise = draw_noise(*text[1:], self.block_size, generator, self.mask_per_block, self.suffix_noise)
        return dual_stream(*text, noise, self.mask_token_id, num_rows, self.uniform_weights)


def masked_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The ``compute_loss_func`` for TRL's ``SFTTrainer``: the loss of a ``WeDLMCollator``'s batch, which the model has
    computed, as a share of ``num_items_in_batch``, the rows with a loss of the optimiser batch."""
    if num_items_in_batch is None:
        return outputs.loss
    return outputs.loss * ((labels != IGNORED).sum() / num_items_in_batch)


def take_row_labels(batch: dict[str, Any]) -> RowLabels | None:
    """Take the row labels out of a collator's batch; None for any other batch."""
    if "documents" not in batch:
        return None
    return RowLabels(*(batch.pop(name) for name in _LABELS))


def training_attend(labels: RowLabels) -> Attend:
    """Attention of both streams' rows, flattened, on the labels' device."""
    ranges = [torch.stack(row_ranges(RowLabels(*one))) for one in zip(*labels, strict=True)]
    backend = choose_training_backend("auto", labels.document.device)
    return plan_training_attention(backend, labels, RowRanges(*torch.stack(ranges, dim=1).int()))
