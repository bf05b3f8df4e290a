# SPDX-License-Identifier: Apache-2.0
"""Attention through torch's scaled_dot_product_attention: any device, and the oracle of every other backend."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from wedlm.attention.base import LARGEST, ExtendBatch, KVCache, RowVisibility

# Sequences with at most this many rows share one padded call. Longer ones (prompt chunks) are cut into blocks with a
# call each: a block's mask stays small, and it does not touch keys that only later rows see.
_MAX_ROWS_PADDED = 64
_ROWS_PER_BLOCK = 256


class CausalAttend:
    """Plain causal attention over the rows themselves, without a cache: one sequence, rows in any positions."""

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "T K D"], v: Float[Tensor, "T K D"]
    ) -> Float[Tensor, "T H D"]:
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1)


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of one sequence: from ``offset`` in the packed rows, with ``start`` keys before the first.

    ``slots`` are the physical slots of all keys that the last of them sees.
    """

    offset: int
    start: int
    count: int
    slots: Int[Tensor, " J"]


@dataclass(frozen=True)
class _Group:
    """Sequences whose rows run in one padded call of N sequences, R rows and J keys."""

    rows: Int[Tensor, "N R"]  # packed row index; a padded row repeats the sequence's last
    slots: Int[Tensor, "N J"] | slice  # a slice where one sequence's slots are contiguous: no copy of its keys
    visible: Bool[Tensor, "N 1 R J"] | None  # None: every row sees every key (one sequence, one row)
    packed: Int[Tensor, " M"]  # where in the packed rows the outputs go, M real rows
    real: Bool[Tensor, "N R"]


class PagedSdpa:
    """``Attend`` of one step over a paged cache."""

    def __init__(self, cache: KVCache, batch: ExtendBatch) -> None:
        self.cache = cache
        device, page_size = cache.keys.device, cache.page_size
        slots = [
            _slots(pages, start + count, page_size)
            for pages, start, count in zip(batch.pages, batch.starts, batch.counts, strict=True)
        ]
        new_slots = [s[start:] for s, start in zip(slots, batch.starts, strict=True)]
        all_new = torch.cat(new_slots)
        self.new_slots, self.new_span = all_new.to(device), _span(all_new)
        short, groups, offset = [], [], 0
        for start, count, own in zip(batch.starts, batch.counts, slots, strict=True):
            if 0 < count <= _MAX_ROWS_PADDED:
                short.append(_Rows(offset, start, count, own))
            else:
                for row in range(0, count, _ROWS_PER_BLOCK):
                    num_rows = min(_ROWS_PER_BLOCK, count - row)
                    seen = -(-(start + row + num_rows) // batch.block_length) * batch.block_length
                    groups.append([_Rows(offset + row, start + row, num_rows, own[:seen])])
            offset += count
        if short:
            groups.append(short)
        self.groups = [_plan_group(members, device, batch.visibility, batch.block_length) for members in groups]
        self.masks: list[Tensor | None] = []

    def __call__(
        self, layer: int, q: Float[Tensor, "T H D"], k: Float[Tensor, "T K D"], v: Float[Tensor, "T K D"]
    ) -> Float[Tensor, "T H D"]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        scales = self.cache.scales(layer)
        if scales is not None:
            keys, values = (
                self._scaled(part, scale, new) for part, scale, new in zip((keys, values), scales, (k, v), strict=True)
            )
        elif self.new_span is not None:
            keys[self.new_span], values[self.new_span] = k, v
        else:
            keys.index_copy_(0, self.new_slots, k)
            values.index_copy_(0, self.new_slots, v)
        if not self.masks:  # once a step: all layers have the same heads
            self.masks = [_fold_mask(group.visible, q.shape[1] // k.shape[1], q.dtype) for group in self.groups]
        if len(self.groups) == 1 and self.groups[0].rows.shape[0] == 1:
            return _attend(q[None], keys, values, self.groups[0], self.masks[0])[0]
        out = torch.empty_like(q)
        for group, mask in zip(self.groups, self.masks, strict=True):
            out[group.packed] = _attend(q[group.rows], keys, values, group, mask)[group.real]
        return out

    def _scaled(self, cached: Tensor, scale: Tensor, new: Float[Tensor, "T K D"]) -> Float[Tensor, "A K D"]:
        """Write new keys or values in FP8 or int8, and return all of the layer's as they are read, which is slow."""
        largest = new.float().abs().amax(dim=-1).clamp(min=1e-30)
        top = torch.full_like(largest, LARGEST[cached.dtype])
        rounded = new.float() * (top / largest)[..., None]
        rounded = (rounded if cached.is_floating_point() else rounded.round()).to(cached.dtype)
        cached.view(torch.uint8)[self.new_slots] = rounded.view(torch.uint8)
        scale[self.new_slots] = largest / top
        return (cached.float() * scale[..., None]).to(new.dtype)


def _fold_mask(
    visible: Bool[Tensor, "N 1 R J"] | None, share: int, dtype: torch.dtype
) -> Float[Tensor, "N 1 G J"] | None:
    """An additive mask whose rows are repeated for the ``share`` query heads of a key head, G = share · R."""
    if visible is None:
        return None
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return mask.repeat(1, 1, share, 1)


def _slots(pages: list[int], num_slots: int, page_size: int) -> Int[Tensor, " J"]:
    """Physical slots of the logical slots 0 .. num_slots - 1."""
    first = torch.tensor(pages, dtype=torch.long)[:, None] * page_size
    return (first + torch.arange(page_size)).flatten()[:num_slots]


def _span(slots: Int[Tensor, " J"]) -> slice | None:
    """The slots as a slice if they are consecutive, because reading and writing them then needs no index."""
    first, last = int(slots[0]), int(slots[-1])
    consecutive = last - first + 1 == len(slots) and bool((slots.diff() == 1).all())
    return slice(first, last + 1) if consecutive else None


def _plan_group(
    members: list[_Rows], device: torch.device, visibility: RowVisibility | None, block_length: int
) -> _Group:
    counts = torch.tensor([member.count for member in members])
    starts = torch.tensor([member.start for member in members])
    offsets = torch.tensor([member.offset for member in members])
    row = torch.arange(int(counts.max()))
    rows = offsets[:, None] + torch.minimum(row, counts[:, None] - 1)
    real = row < counts[:, None]
    if len(members) == 1:
        padded = members[0].slots[None]
        span = _span(padded[0])
    else:
        # A padded key repeats the sequence's first slot; no row sees it.
        padded = torch.nn.utils.rnn.pad_sequence([m.slots for m in members], batch_first=True, padding_value=-1)
        padded, span = torch.where(padded < 0, padded[:, :1], padded), None
    visible = None
    if len(members) > 1 or len(row) > 1:
        limit = starts[:, None] + row
        if block_length > 1:
            num_keys = torch.tensor([len(member.slots) for member in members])
            limit = torch.minimum((limit // block_length + 1) * block_length, num_keys[:, None]) - 1
        key = torch.arange(padded.shape[1])
        visible = (key <= limit[..., None])[:, None].to(device)
        if visibility is not None:
            new = (key - starts[:, None]).to(device)[:, None, None]  # index among the new rows, < 0 where cached
            shared, own = (
                part[rows.to(device)][:, None, :, None] for part in (visibility.shared, visibility.own_start)
            )
            visible &= (new < shared) | (new >= own) | (new < 0)
    return _Group(
        rows=rows.to(device),
        slots=padded.to(device) if span is None else span,
        visible=visible,
        packed=rows[real].to(device),
        real=real.to(device),
    )


def _attend(
    q: Float[Tensor, "N R H D"],
    keys: Float[Tensor, "A K D"],
    values: Float[Tensor, "A K D"],
    group: _Group,
    mask: Float[Tensor, "N 1 G J"] | None,
) -> Float[Tensor, "N R H D"]:
    num_sequences, num_rows, num_heads, head_dim = q.shape
    if isinstance(group.slots, slice):
        k, v = keys[None, group.slots], values[None, group.slots]
    else:
        k, v = keys[group.slots], values[group.slots]
    num_kv_heads = k.shape[2]
    share = num_heads // num_kv_heads
    # The query heads of one key head become rows of it, so that no key is repeated: [N K share·R D].
    if num_rows == 1:  # they lie so already, and a single row is too short a time for copies
        q = q.view(num_sequences, num_kv_heads, share, head_dim)
    else:
        q = q.view(num_sequences, num_rows, num_kv_heads, share, head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    if num_rows == 1:
        return out.reshape(num_sequences, 1, num_heads, head_dim)
    out = out.view(num_sequences, num_kv_heads, share, num_rows, head_dim)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)
