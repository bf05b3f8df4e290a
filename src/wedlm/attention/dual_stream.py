# SPDX-License-Identifier: Apache-2.0
"""Attention of the training rows of N sequences, R rows each, by the rule in ``wedlm.algorithm.dual_stream``.

``plan_training_attention`` is called once per forward and gives the ``Attend`` of all its layers. Backends: ``dense``
(scaled_dot_product_attention with a mask; any device; the oracle of the others), ``flex`` (FlexAttention, CUDA) and
``magi`` (MagiAttention, CUDA, if it is installed).
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from wedlm.algorithm.dual_stream import RowLabels, RowRanges, attention_ranges, dense_mask
from wedlm.attention.base import Attend

TRAINING_BACKENDS = ("dense", "flex", "magi")


def choose_training_backend(name: str, device: torch.device) -> str:
    """``name``, or for "auto" what the device runs best: flex on CUDA, dense elsewhere. Raises ValueError if it cannot
    run."""
    if name == "auto":
        return "flex" if device.type == "cuda" else "dense"
    if name not in TRAINING_BACKENDS:
        raise ValueError(f"attention_backend is {name!r}; expected auto or one of {', '.join(TRAINING_BACKENDS)}")
    if name != "dense" and device.type != "cuda":
        raise ValueError(
            f"attention_backend is {name!r} on device {device.type}; expected dense there: the backward pass of {name} "
            "needs CUDA"
        )
    if name == "magi" and importlib.util.find_spec("magi_attention") is None:
        raise ValueError("attention_backend is 'magi', but the package magi_attention is not installed")
    return name


def plan_training_attention(backend: str, labels: RowLabels, ranges: RowRanges) -> Attend:
    """Plan the ``Attend`` for rows flattened to T = N · R; all tensors are [N, R] and on the device that runs.

    ``ranges`` must be those of ``labels``. Kernels use the ranges; the dense mask is made from the labels.
    """
    if backend == "magi":
        return MagiAttend(ranges)
    return _plan(backend, labels, ranges, slice(None))


def _plan(backend: str, labels: RowLabels, ranges: RowRanges, queries: slice) -> "DenseAttend | FlexAttend":
    """Plan attention with these rows of each sequence as queries, and all rows up to the last of them as keys."""
    num_sequences, end = len(labels.document), queries.stop
    if backend == "flex":
        own = RowRanges(*(part[:, queries] for part in ranges))
        return FlexAttend(flex_block_mask(own, first_row=queries.start or 0), num_sequences)
    visible = dense_mask(RowLabels(*(label[:, :end] for label in labels)))
    return DenseAttend(visible[:, None, queries], num_sequences)


class StreamPlan:
    """Attention of a batch whose clean rows, the first ``num_clean_rows`` of each sequence, are computed first and
    without gradients. The backend is ``dense`` or ``flex``; arguments are those of ``plan_training_attention``."""

    def __init__(self, backend: str, labels: RowLabels, ranges: RowRanges, num_clean_rows: int) -> None:
        num_rows = labels.document.shape[1]
        self.num_sequences = len(labels.document)
        self.clean = _plan(backend, labels, ranges, slice(0, num_clean_rows))
        self.prediction = _plan(backend, labels, ranges, slice(num_clean_rows, num_rows))

    def layer(self) -> tuple["CleanAttend", "PredictionAttend"]:
        """A pair for one layer; the second sees the keys that the first was called with."""
        clean = CleanAttend(self.clean)
        return clean, PredictionAttend(self.prediction, clean, self.num_sequences)


class CleanAttend:
    """Attention of clean rows; keeps their keys and values."""

    def __init__(self, attend: "DenseAttend | FlexAttend") -> None:
        self.attend = attend
        self.keys = self.values = torch.empty(0)

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "T K D"], v: Float[Tensor, "T K D"]
    ) -> Float[Tensor, "T H D"]:
        self.keys, self.values = k, v
        return self.attend(layer, q, k, v)


class PredictionAttend:
    """Attention of prediction rows, which see the kept keys of clean rows before their own."""

    def __init__(self, attend: "DenseAttend | FlexAttend", clean: CleanAttend, num_sequences: int) -> None:
        self.attend, self.clean, self.num_sequences = attend, clean, num_sequences

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "T K D"], v: Float[Tensor, "T K D"]
    ) -> Float[Tensor, "T H D"]:
        return self.attend(layer, q, self._behind(self.clean.keys, k), self._behind(self.clean.values, v))

    def _behind(self, clean: Tensor, own: Tensor) -> Tensor:
        """Join both, sequence by sequence."""
        parts = [part.unflatten(0, (self.num_sequences, -1)) for part in (clean, own)]
        return torch.cat(parts, dim=1).flatten(0, 1)


def _heads_first(x: Float[Tensor, "T H D"], num_sequences: int) -> Float[Tensor, "N H R D"]:
    return x.unflatten(0, (num_sequences, -1)).transpose(1, 2)


def _rows_first(x: Float[Tensor, "N H R D"]) -> Float[Tensor, "T H D"]:
    return x.transpose(1, 2).flatten(0, 1)


class DenseAttend:
    """``visible`` is the whole mask, [N, 1, query R, key R]. Keys and queries may be different rows."""

    def __init__(self, visible: Bool[Tensor, "N 1 Q R"], num_sequences: int) -> None:
        self.visible, self.num_sequences = visible, num_sequences

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "S K D"], v: Float[Tensor, "S K D"]
    ) -> Float[Tensor, "T H D"]:
        q, k, v = (_heads_first(x, self.num_sequences) for x in (q, k, v))
        return _rows_first(F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible, enable_gqa=True))


def flex_block_mask(ranges: RowRanges, block_rows: int = 128, first_row: int = 0) -> BlockMask:
    """FlexAttention's block mask: tiles of ``block_rows`` squared that are empty are skipped, and full ones need no
    mask.

    ``ranges`` are those of the query rows, of which the first is ``first_row``; the keys are those of all rows up to
    the last of them.

    Arithmetic on the ranges sorts out the tiles here, because torch's ``create_block_mask`` would look at every pair,
    and its compilation costs most of a minute. The kernel evaluates ranges, not labels: those would need six loads per
    pair, and made its forward eight times slower than its backward.
    """
    clean_start, clean_end, own_start = (part.int() for part in ranges)
    num_sequences, num_queries = own_start.shape
    num_keys = first_row + num_queries

    # A lambda, because the tests wrap every def to check its annotations, and FlexAttention traces this one.
    rule = lambda s, _, q, k: (  # noqa: E731
        ((k >= clean_start[s, q]) & (k < clean_end[s, q])) | ((k >= own_start[s, q]) & (k <= q + first_row))
    )
    tile = torch.arange(math.ceil(num_keys / block_rows), device=own_start.device, dtype=torch.int32)
    first_key, after_key = tile * block_rows, ((tile + 1) * block_rows).clamp(max=num_keys)
    row = first_row + torch.arange(num_queries, device=own_start.device, dtype=torch.int32)
    some = torch.zeros(num_sequences, num_queries, len(tile), dtype=torch.bool, device=own_start.device)
    full = torch.zeros_like(some)
    for start, end in ((clean_start, clean_end), (own_start, row.expand_as(own_start) + 1)):
        start, end = start[..., None], end[..., None]
        some |= (start < after_key) & (end > first_key) & (start < end)
        full |= (start <= first_key) & (end >= after_key)
    padding = -num_queries % block_rows
    some = F.pad(some, (0, 0, 0, padding)).unflatten(1, (-1, block_rows)).any(dim=2)
    full = F.pad(full, (0, 0, 0, padding), value=True).unflatten(1, (-1, block_rows)).all(dim=2)
    partial_count, partial_index = _listed(some & ~full)
    full_count, full_index = _listed(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=block_rows,
        mask_mod=rule,
        seq_lengths=(num_queries, num_keys),
    )


def _listed(tiles: Bool[Tensor, "N Q K"]) -> tuple[Int[Tensor, "N 1 Q"], Int[Tensor, "N 1 Q K"]]:
    """How many key tiles each query tile has, and their indices, which come first."""
    index = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return tiles.sum(dim=-1, dtype=torch.int32)[:, None], index.int()[:, None]


# Tiles of the forward kernel. FlexAttention's own choice spills registers with this mask: 2.0 ms against 0.57 ms a
# layer (24 sequences of 4096 rows, 9/3 heads of 64, H200).
_FLEX_OPTIONS: Any = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}


class FlexAttend:
    """FlexAttention. It is compiled with the layer around it if that is compiled, and otherwise alone."""

    def __init__(self, block_mask: BlockMask, num_sequences: int) -> None:
        self.block_mask, self.num_sequences = block_mask, num_sequences

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "S K D"], v: Float[Tensor, "S K D"]
    ) -> Float[Tensor, "T H D"]:
        q, k, v = (_heads_first(x, self.num_sequences) for x in (q, k, v))
        attend, options = flex_attention, _FLEX_OPTIONS if q.is_cuda else None
        if q.is_cuda and not torch.compiler.is_compiling():
            attend = _compiled(flex_attention)
        return _rows_first(attend(q, k, v, block_mask=self.block_mask, enable_gqa=True, kernel_options=options))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


class MagiAttend:
    """MagiAttention's flexible flash attention: the mask as ranges of query rows and key rows.

    This project's tests do not have the package and never run it; they check the ranges and the call's arguments.
    """

    CAUSAL, FULL = 1, 0

    def __init__(self, ranges: RowRanges) -> None:
        from magi_attention.functional import flex_flash_attn_func

        self.attention = flex_flash_attn_func
        num_rows = ranges.own_start.shape[1]
        queries, keys, kinds = [], [], []
        for sequence, own in enumerate(zip(*(part.cpu() for part in ranges), strict=True)):
            offset = sequence * num_rows
            for part in attention_ranges(RowRanges(*own)):
                queries.append((offset + part.query_start, offset + part.query_end))
                keys.append((offset + part.key_start, offset + part.key_end))
                kinds.append(self.CAUSAL if part.causal else self.FULL)
        device = ranges.own_start.device
        self.query_ranges = torch.tensor(queries, dtype=torch.int32, device=device)
        self.key_ranges = torch.tensor(keys, dtype=torch.int32, device=device)
        self.kinds = torch.tensor(kinds, dtype=torch.int32, device=device)

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "T K D"], v: Float[Tensor, "T K D"]
    ) -> Float[Tensor, "T H D"]:
        out, *_ = self.attention(
            q, k, v, q_ranges=self.query_ranges, k_ranges=self.key_ranges, attn_type_map=self.kinds
        )
        return out
