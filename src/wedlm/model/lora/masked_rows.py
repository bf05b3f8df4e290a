# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors that act on masked rows alone: y = W x + [the row is masked] · scale · B A x.

Observed rows never meet the factors and never see masked rows, so at them the model is its base, bit for bit.

``masked`` says which rows are masked: a flag a row, bool [T] (no shape depends on data: training, captured steps), or
their indices, int64 [M] (only they are computed). None: none is.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

# Of a saved adapter: its peft_type, and the name of the tensor that masked rows start from.
MASKED_TYPE, MASK_EMBEDDING = "MASKED_LORA", "model.mask_embedding"


class MaskedLora(nn.Module):
    """``base_layer`` with the factors ``down`` (C to r) and ``up`` (r to O). The names of its parts are those of peft's
    LoRA but for a prefix, so that nobody takes one for the other."""

    def __init__(
        self, base_layer: nn.Module, down: nn.Module, up: nn.Module, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base_layer, self.masked_lora_A, self.masked_lora_B = base_layer, down, up
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def change(self, x: Tensor) -> Tensor:
        """What is added to the product of masked rows x."""
        hidden = self.masked_lora_A(self.dropout(x))
        return self.masked_lora_B(hidden if self.scale == 1 else hidden * self.scale)

    def forward(self, x: Tensor, masked: Tensor | None) -> Tensor:
        y = self.base_layer(x)
        if masked is None:
            return y
        if masked.dtype == torch.bool:
            return torch.where(masked[:, None], y + self.change(x), y)
        return y.index_add_(0, masked, self.change(x.index_select(0, masked)))


class BlockDiagonal(nn.Module):
    """Several ``up`` side by side, each of its own ``ranks[i]`` columns of the input: that of a fused product."""

    def __init__(self, blocks: Sequence[nn.Module], ranks: Sequence[int]) -> None:
        super().__init__()
        self.blocks, self.ranks = nn.ModuleList(blocks), list(ranks)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = hidden.split(self.ranks, dim=-1)
        return torch.cat([block(part) for block, part in zip(self.blocks, parts, strict=True)], dim=-1)


class NoChange(nn.Module):
    """The ``up`` of a layer without factors, inside a fused product: zeros."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.size)


def product(linear: nn.Module, x: Tensor, masked: Tensor | None) -> Tensor:
    """``linear`` of rows x [T, C], of which ``masked`` are masked."""
    return linear(x, masked) if isinstance(linear, MaskedLora) else linear(x)


def plain(linear: nn.Module) -> nn.Module:
    """The layer without factors."""
    return linear.base_layer if isinstance(linear, MaskedLora) else linear


def put_at_masked(x: Tensor, masked: Tensor, row: Tensor) -> Tensor:
    """x [T, C] with ``row`` [C] at masked rows; x itself may change."""
    row = row.to(x.dtype)
    if masked.dtype == torch.bool:
        return torch.where(masked[:, None], row, x)
    return x.index_copy_(0, masked, row.expand(len(masked), -1))


def linear_of(weight: Tensor) -> nn.Linear:
    """A linear layer of this weight [O, C] without a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight)
    return linear


def add_factors(
    model: nn.Module, layer: str, down: Tensor, up: Tensor, scale: float = 1.0, dropout: float = 0.0
) -> None:
    """Give the linear layer of that name the factors ``down`` [r, C] and ``up`` [O, r], in place."""
    owner, _, leaf = layer.rpartition(".")
    base = model.get_submodule(layer)
    setattr(model.get_submodule(owner), leaf, MaskedLora(base, linear_of(down), linear_of(up), scale, dropout))


def add_beside(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], mask_embedding: Tensor | None) -> None:
    """Put an adapter beside the weights, in their dtype: (down, up) by the weight's name, and the [C] that masked rows
    start from (None: their token's embedding)."""
    for name, (down, up) in factors.items():
        weight = model.get_parameter(name)
        add_factors(model, name.removesuffix(".weight"), down.to(weight), up.to(weight))
    if mask_embedding is not None:
        embedding = model.get_parameter("model.embed_tokens.weight")
        model.get_submodule("model").mask_embedding = nn.Parameter(mask_embedding.to(embedding))


def has_factors(model: nn.Module) -> bool:
    """Whether some layer treats masked rows apart."""
    return any(isinstance(module, MaskedLora) for module in model.modules())
