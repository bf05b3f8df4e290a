# SPDX-License-Identifier: Apache-2.0
"""A LoRA that only acts on masked rows: y = W x + [the row is masked] · scale · B A x.

Observed rows never meet the LoRA and never see masked rows, so for them the model is its base, bit for bit.

``masked`` says which rows are masked, either by a flag per row, bool [T] (no shape depends on data, for training and
captured steps), or by their indices, int64 [M] (only they are computed). None means that no row is masked.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from wedlm.model.lora.row_factors import AdaptedLinear, AdaptedRows

# Of a saved adapter: its peft_type, and the name of the tensor that masked rows start from.
MASKED_TYPE, MASK_EMBEDDING = "MASKED_LORA", "model.mask_embedding"
MaskedParts = tuple[dict[str, tuple[Tensor, Tensor]], Tensor | None]  # (A, scale · B) by weight; the mask's embedding
Masked = Tensor | AdaptedRows | None  # which rows are masked, as above; or this and the adapter of each


class MaskedLora(nn.Module):
    """``base_layer`` with the linear layers ``a`` (C to r) and ``b`` (r to O).

    Its parts are named like those of peft's LoRA, with a prefix, so that neither is mistaken for the other.
    """

    def __init__(
        self, base_layer: nn.Module, a: nn.Module, b: nn.Module, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base_layer, self.masked_lora_A, self.masked_lora_B = base_layer, a, b
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def delta(self, x: Tensor) -> Tensor:
        """scale · B A x, which is added to the base layer's output for masked rows x."""
        hidden = self.masked_lora_A(self.dropout(x))
        return self.masked_lora_B(hidden if self.scale == 1 else hidden * self.scale)

    def forward(self, x: Tensor, masked: Tensor | None) -> Tensor:
        y = self.base_layer(x)
        if masked is None:
            return y
        if masked.dtype == torch.bool:
            return torch.where(masked[:, None], y + self.delta(x), y)
        return y.index_add_(0, masked, self.delta(x.index_select(0, masked)))


class BlockDiagonal(nn.Module):
    """The matrices B of a fused layer: block i reads its own ``ranks[i]`` columns of the input."""

    def __init__(self, blocks: Sequence[nn.Module], ranks: Sequence[int]) -> None:
        super().__init__()
        self.blocks, self.ranks = nn.ModuleList(blocks), list(ranks)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = hidden.split(self.ranks, dim=-1)
        return torch.cat([block(part) for block, part in zip(self.blocks, parts, strict=True)], dim=-1)


class ZeroLora(nn.Module):
    """The matrix B of a layer without a LoRA inside a fused layer; its output is zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros(*hidden.shape[:-1], self.size)


def linear(layer: nn.Module, x: Tensor, masked: Masked) -> Tensor:
    """``layer`` applied to rows x [T, C], of which ``masked`` are masked."""
    if isinstance(layer, AdaptedLinear):
        y = linear(layer.base_layer, x, masked)
        if isinstance(masked, AdaptedRows):
            layer.add_to(y, x, masked.others)
        return y
    if isinstance(masked, AdaptedRows):
        masked = masked.masked
    return layer(x, masked) if isinstance(layer, MaskedLora) else layer(x)


def without_adapters(layer: nn.Module) -> nn.Module:
    """The layer without factors that are chosen by row."""
    return layer.base_layer if isinstance(layer, AdaptedLinear) else layer


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer with nothing but its weight."""
    layer = without_adapters(layer)
    return layer.base_layer if isinstance(layer, MaskedLora) else layer


def put_at_masked(x: Tensor, masked: Tensor, row: Tensor) -> Tensor:
    """x [T, C] with ``row`` [C] at masked rows; x may be changed."""
    row = row.to(x.dtype)
    if masked.dtype == torch.bool:
        return torch.where(masked[:, None], row, x)
    return x.index_copy_(0, masked, row.expand(len(masked), -1))


def linear_of(weight: Tensor) -> nn.Linear:
    """A linear layer of this weight [O, C] without a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def attach_to_layer(
    model: nn.Module, layer: str, a: Tensor, b: Tensor, scale: float = 1.0, dropout: float = 0.0
) -> None:
    """Attach the matrices ``a`` [r, C] and ``b`` [O, r] to the linear layer of that name, in place."""
    owner, _, leaf = layer.rpartition(".")
    base = model.get_submodule(layer)
    setattr(model.get_submodule(owner), leaf, MaskedLora(base, linear_of(a), linear_of(b), scale, dropout))


def attach_masked_lora(
    model: nn.Module, matrices: Mapping[str, tuple[Tensor, Tensor]], mask_embedding: Tensor | None
) -> None:
    """Attach an adapter of masked rows, in the dtype of the weights.

    ``matrices``: (A, B) by the weight's name. ``mask_embedding`` [C]: what masked rows start from (None: the embedding
    of their token).
    """
    for name, (a, b) in matrices.items():
        weight = model.get_parameter(name)
        attach_to_layer(model, name.removesuffix(".weight"), a.to(weight), b.to(weight))
    if mask_embedding is not None:
        embedding = model.get_parameter("model.embed_tokens.weight")
        model.get_submodule("model").mask_embedding = nn.Parameter(mask_embedding.to(embedding))


def masked_lora(model: nn.Module) -> MaskedParts:
    """The adapter of masked rows of a model that is not packed, in the form that ``attach_masked_lora`` takes; ({},
    None) if it has none."""
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLora):
            a, b = (one.get_parameter("weight").detach() for one in (module.masked_lora_A, module.masked_lora_B))
            matrices[f"{name}.weight"] = (a, b * module.scale)
    return matrices, dict(model.named_parameters()).get(MASK_EMBEDDING)


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model without its adapter of masked rows, under their names in a checkpoint."""
    for name, tensor in model.state_dict().items():
        if ".masked_lora_" not in name and name != MASK_EMBEDDING:
            yield name.replace(".base_layer.", "."), tensor


def has_masked_lora(model: nn.Module) -> bool:
    """Whether some layer has a LoRA for masked rows."""
    return any(isinstance(module, MaskedLora) for module in model.modules())
