# SPDX-License-Identifier: Apache-2.0
"""Adapters by name for a packed model, in slots: each row of a step may have a different one.

All adapters of a layer form two matrices, all A side by side and all B side by side, so that a step multiplies by each
once, whichever adapters its rows have. An adapter has its own columns there, as many as its largest rank.
"""

import torch
from torch import Tensor, nn

from wedlm.model.layers import MLP, Attention
from wedlm.model.lora.masked_rows import base_layer, has_masked_lora
from wedlm.model.lora.row_factors import AdaptedLinear, AdaptedRows, RowFactors
from wedlm.model.transformer import Transformer

_ROUNDED_TO = 16  # columns: an adapter's sums are added up in the same order wherever it lies
_PACKED = {  # and the layers that each is made of
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


class AdapterBank:
    """The factors of up to ``num_slots`` adapters, in slots 1 to ``num_slots``, for ``model``, which is packed.

    ``version`` changes when memory does; captured steps of the model must then be captured again. Everything else is
    written in place. Do not use it while another thread prepares a step.
    """

    def __init__(self, model: Transformer, num_slots: int) -> None:
        self.model = model
        self.version = 0
        weight = model.model.embed_tokens.weight
        size, device = model.config.hidden_size, weight.device
        self._columns: dict[int, tuple[int, int]] = {}  # by slot: the first, and the one behind the last
        self._layers: list[tuple[list[str], AdaptedLinear]] = []  # with the names of the weights in each
        self._num_columns = 0
        # By twice the slot, and one more for masked rows: the columns that are not the row's.
        self._others = torch.ones(2 * num_slots + 2, 0, dtype=torch.bool, device=device)
        # By slot: what masked rows start from, whether they do, and whether they meet the model's own factors for them.
        self._embedding = torch.zeros(num_slots + 1, size, dtype=weight.dtype, device=device)
        self._has_embedding = torch.zeros(num_slots + 1, dtype=torch.bool, device=device)
        self._meets_own = torch.ones(num_slots + 1, dtype=torch.bool, device=device)
        self._has_masked_lora = has_masked_lora(model) or model.model.mask_embedding is not None

    @torch.inference_mode()
    def rows(self, adapters: Tensor, masked: Tensor | None) -> AdaptedRows:
        """What layers must know about rows with adapters in these slots, int64 [T]; ``masked`` is as in
        ``Transformer``.

        With flags of masked rows, or none, no size depends on data.
        """
        flags = masked
        if masked is None:
            flags = torch.zeros_like(adapters, dtype=torch.bool)
        elif masked.dtype != torch.bool:
            flags = torch.zeros_like(adapters, dtype=torch.bool).index_fill_(0, masked, True)
        assert flags is not None
        own = None
        if masked is not None and self._has_masked_lora:
            meets = self._meets_own[adapters]
            own = masked & meets if masked.dtype == torch.bool else masked[meets[masked]]
        others = self._others[2 * adapters + flags]
        return AdaptedRows(own, others, flags & self._has_embedding[adapters], self._embedding[adapters])

    def prepare(self, factors: RowFactors) -> RowFactors:
        """Does nothing, because nothing here takes time."""
        return factors

    @torch.inference_mode()
    def put(self, slot: int, factors: RowFactors) -> None:
        """Put an adapter, whose shapes are the model's, into a free slot. Raises ValueError, with nothing changed, if
        memory runs out."""
        assert slot not in self._columns, f"slot {slot} is taken"
        if not self._layers:
            self._wrap()
        first, end = self._free_columns(-(-max(factors.rank, 1) // _ROUNDED_TO) * _ROUNDED_TO)
        if end > self._num_columns:
            try:
                self._resize(end)
            except RuntimeError as error:  # torch's, of a device's memory and of the host's
                raise ValueError(f"there is not enough memory for the adapter, of rank {factors.rank}") from error
        every = max((len(a) for a, _ in factors.every.values()), default=0)
        for names, layer in self._layers:
            layer.a[:, first:end] = 0
            for part, name in enumerate(names):
                layer.b[part][:, first:end] = 0
                for matrices, at in ((factors.every, first), (factors.masked, first + every)):
                    if name in matrices:
                        a, b = matrices[name]
                        layer.a[part, at : at + len(a)] = a.to(layer.a)
                        layer.b[part][:, at : at + len(a)] = b.to(layer.a)
        others = torch.ones(2, self._num_columns, dtype=torch.bool)
        others[0, first : first + every] = False
        others[1, first:end] = False
        self._others[2 * slot : 2 * slot + 2] = others.to(self._others.device)
        self._meets_own[slot] = not factors.has_masked_rows
        self._has_embedding[slot] = factors.mask_embedding is not None
        if factors.mask_embedding is not None:
            self._embedding[slot] = factors.mask_embedding.to(self._embedding)
        self._columns[slot] = first, end

    @torch.inference_mode()
    def drop(self, slot: int) -> None:
        """Free a slot. All memory goes with the last one."""
        del self._columns[slot]
        self._others[2 * slot : 2 * slot + 2] = True
        self._meets_own[slot], self._has_embedding[slot] = True, False
        if not self._columns:
            self._resize(0)

    def _free_columns(self, count: int) -> tuple[int, int]:
        """The first place for this many columns, perhaps after all existing ones."""
        at = 0
        for first, end in sorted(self._columns.values()):
            if first - at >= count:
                break
            at = end
        return at, at + count

    def _resize(self, num_columns: int) -> None:
        """Allocate memory for this many columns, and copy the present ones. All of it exists before any is replaced."""
        kept = min(num_columns, self._num_columns)
        larger = []
        for _, layer in self._layers:
            a = layer.a.new_zeros(len(layer.a), num_columns, layer.a.shape[2])
            a[:, :kept] = layer.a[:, :kept]
            b = [one.new_zeros(len(one), num_columns) for one in layer.b]
            for new, old in zip(b, layer.b, strict=True):
                new[:, :kept] = old[:, :kept]
            larger.append((a, b))
        others = torch.ones(len(self._others), num_columns, dtype=torch.bool, device=self._others.device)
        others[:, :kept] = self._others[:, :kept]
        for (_, layer), (a, b) in zip(self._layers, larger, strict=True):
            layer.a, layer.b = a, b
        self._others, self._num_columns = others, num_columns
        self.version += 1

    def _wrap(self) -> None:
        """Add room for factors to each packed layer, once."""
        assert self.model.adapters is None, "the model has the adapters of another engine"
        dtype = self.model.model.embed_tokens.weight.dtype
        for index, block in enumerate(self.model.model.layers):
            for packed, parts in _PACKED.items():
                owner, leaf = block.get_submodule(packed.partition(".")[0]), packed.partition(".")[2]
                linear = getattr(owner, leaf)
                sizes, depth = _sizes(owner, leaf, linear)
                empty = torch.zeros(len(parts), 0, depth, dtype=dtype, device=self._others.device)
                adapted = AdaptedLinear(linear, sizes, empty)
                setattr(owner, leaf, adapted)
                self._layers.append(([f"model.layers.{index}.{part}.weight" for part in parts], adapted))
        self.model.adapters = self


def _sizes(owner: nn.Module, leaf: str, linear: nn.Module) -> tuple[list[int], int]:
    """The outputs of each of the layers that ``linear`` is made of, and its inputs."""
    base = base_layer(linear)
    size, depth = int(base.out_features), int(base.in_features)  # type: ignore[arg-type]
    if isinstance(owner, Attention) and leaf == "qkv_proj":
        return list(owner.qkv_sizes), depth
    if isinstance(owner, MLP) and leaf == "gate_up_proj":
        return [size // 2, size // 2], depth
    return [size], depth
