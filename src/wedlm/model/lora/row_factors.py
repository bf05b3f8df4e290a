# SPDX-License-Identifier: Apache-2.0
"""Adapters that are chosen row by row: y = W x + B A x with the row's own A and B, none merged into W.

An adapter has factors for every row of its requests, only for their masked rows, or both.
``wedlm.model.inference.adapter_bank`` knows which adapters exist and where their factors lie; this module has what a
layer needs of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Product = Callable[[Tensor, Tensor], Tensor]
Matrices = Mapping[str, tuple[Tensor, Tensor]]  # (A [r, C], B [O, r] with its scale) by the weight's name


@dataclass(frozen=True)
class RowFactors:
    """An adapter as it was read: factors of ``every`` row and of ``masked`` rows only, and what masked rows start from
    ([C]; None: as without the adapter).

    ``mask_token_id`` and ``block_size`` are those that it was trained with; None if it does not say. ``prepared``: what
    the target model has already made from the matrices; None if nothing.
    """

    every: Matrices = field(default_factory=dict)
    masked: Matrices = field(default_factory=dict)
    mask_embedding: Tensor | None = None
    mask_token_id: int | None = None
    block_size: int | None = None
    prepared: object = None

    @property
    def has_masked_rows(self) -> bool:
        """Whether it has its own factors for masked rows, which then replace those of the model."""
        return bool(self.masked) or self.mask_embedding is not None

    @property
    def rank(self) -> int:
        """The largest of both kinds together."""
        return _rank(self.every) + _rank(self.masked)


def _rank(matrices: Matrices) -> int:
    return max((len(a) for a, _ in matrices.values()), default=0)


@dataclass(frozen=True)
class AdaptedRows:
    """What layers must know about the T rows of a step in which some have adapters.

    ``masked``: flags or indices of the rows that the model's own LoRA for masked rows acts on; None: none. ``others``
    [T, R]: which of all adapters' R columns do not belong to the row. ``starts`` [T]: the row starts from its
    ``embedding`` [T, C].
    """

    masked: Tensor | None
    others: Tensor
    starts: Tensor
    embedding: Tensor

    def embed(self, x: Tensor) -> Tensor:
        """x [T, C] with the embedding of an adapter at the masked rows that have one."""
        return torch.where(self.starts[:, None], self.embedding, x)


class AdaptedLinear(nn.Module):
    """``base_layer``, whose outputs are those of several layers side by side, with the factors of all adapters.

    ``a`` [P, R, C]: for each of the P layers, the matrices A of all adapters one after the other. ``b``: for each layer
    the matrices B [O, R]. A row gets its own columns, and no size depends on which rows have which.
    """

    def __init__(self, base_layer: nn.Module, sizes: list[int], a: Tensor) -> None:
        super().__init__()
        self.base_layer, self.sizes = base_layer, sizes
        self.a, self.b = a, [a.new_zeros(size, a.shape[1]) for size in sizes]

    def add_to(self, y: Tensor, x: Tensor, others: Tensor, product: Product | None = None) -> None:
        """Add to the outputs y [T, O] of rows x [T, C], in place, what their adapters give. ``product`` (x [T, K],
        weight [N, K]) None takes the library's."""
        hidden = (product or F.linear)(x, self.a.flatten(0, 1)).unflatten(1, (len(self.sizes), -1))
        hidden.masked_fill_(others[:, None], 0)
        at = 0
        for part, (size, b) in enumerate(zip(self.sizes, self.b, strict=True)):
            own = y[:, at : at + size]
            if product is None:
                own.addmm_(hidden[:, part], b.T)
            else:
                own += product(hidden[:, part].contiguous(), b)
            at += size
