# SPDX-License-Identifier: Apache-2.0
"""Attention over paged keys on GPUs: by our Triton kernel, and for long prompt chunks by FlashAttention-3 where it is
installed. It is planned from the host's lists or from tensors on the device.

The twin is ``PagedSdpa``. It takes the q, k, v product itself, so that norm, RoPE and the write to the cache are one
kernel (``wedlm.kernels.rope``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.attention.flash import plan_flash
from wedlm.kernels.attention import PagedRows, paged_attention
from wedlm.kernels.fp8 import Unscaled
from wedlm.kernels.rope import norm_rope_write

# A prompt's chunk and a window of few rows want different tiles, so they are different launches.
_SHORT_ROWS = 32


class PagedAttend:
    """Attention of one step's rows, each sequence in one of ``groups``, that of chunks last. ``slots`` [T]: where each
    row's key goes (for padding, a slot that is never read). ``fixed`` is as in ``paged_attention``; only our kernel
    has an order of sums that does not depend on other rows."""

    def __init__(self, cache: KVCache, groups: Sequence[PagedRows], slots: Tensor, fixed: bool = False) -> None:
        self.cache, self.groups, self.slots, self.fixed = cache, groups, slots, fixed
        self.flash = None if fixed else plan_flash(cache, groups, len(slots))
        self._own_groups = groups if self.flash is None else groups[:-1]

    def __call__(
        self,
        layer: int,
        qkv: Tensor | Unscaled,
        cos: Tensor,
        sin: Tensor,
        norms: tuple[Tensor, Tensor, float] | None,
        /,
    ) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        scales = self.cache.scales(layer)
        q = norm_rope_write(qkv, cos, sin, self.slots, norms, keys, values, self.fixed, scales)
        # FlashAttention makes its own tensor of all rows; our kernel then writes the other sequences' rows into it.
        out = torch.empty_like(q) if self.flash is None else self.flash(q, keys, values)
        for rows in self._own_groups:
            paged_attention(q, keys, values, rows, out, self.fixed, scales)
        return out


def plan_paged(cache: KVCache, batch: ExtendBatch, fixed: bool = False) -> PagedAttend:
    """The plan of a batch that the host describes (prompt chunks, and windows beside them)."""
    device, page_size = cache.keys.device, cache.page_size
    counts, starts = torch.tensor(batch.counts), torch.tensor(batch.starts)
    used = [pages[: -(-(start + count) // page_size)] for pages, start, count in _sequences(batch)]
    width = max(len(pages) for pages in used)
    table = torch.tensor([pages + [0] * (width - len(pages)) for pages in used])
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first = counts.cumsum(0) - counts
    logical = torch.arange(len(sequence)) - first[sequence] + starts[sequence]
    slots = table[sequence, logical // page_size] * page_size + logical % page_size
    members: tuple[list[int], list[int]] = [], []  # short, long
    for s, count in enumerate(batch.counts):
        members[count > _SHORT_ROWS].append(s)
    visibility, device_table = batch.visibility, table.to(device)
    groups = [
        PagedRows(
            row_start=first[group].to(device),
            num_rows=counts[group].to(device),
            cached=starts[group].to(device),
            table_row=torch.tensor(group, device=device),
            page_table=device_table,
            page_size=page_size,
            max_rows=int(counts[group].max()),
            max_keys=int((starts + counts)[group].max()),
            shared=None if visibility is None else visibility.shared,
            own_start=None if visibility is None else visibility.own_start,
        )
        for group in members
        if group
    ]
    return PagedAttend(cache, groups, slots.to(device), fixed)


def _sequences(batch: ExtendBatch) -> zip:
    return zip(batch.pages, batch.starts, batch.counts, strict=True)
