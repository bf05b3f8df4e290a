# SPDX-License-Identifier: Apache-2.0
"""Attention over paged keys on GPUs, by our Triton kernel; plans from the host's lists or from tensors on the device.

The twin is ``PagedSdpa``. Takes the q, k, v product itself, so that norm, RoPE and the write to the cache are one
kernel (``wedlm.kernels.rope``).
"""

import torch
from torch import Tensor

from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.kernels.attention import PagedRows, paged_attention
from wedlm.kernels.rope import norm_rope_write


class PagedAttend:
    """Attention of one step's rows. ``slots`` [T]: where each row's key goes (a slot nobody reads, for padding)."""

    def __init__(self, cache: KVCache, rows: PagedRows, slots: Tensor) -> None:
        self.cache, self.rows, self.slots = cache, rows, slots

    def __call__(
        self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor, float] | None, /
    ) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        q = norm_rope_write(qkv, cos, sin, self.slots, norms, keys, values)
        return paged_attention(q, keys, values, self.rows)


def plan_paged(cache: KVCache, batch: ExtendBatch) -> PagedAttend:
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
    visibility = batch.visibility
    rows = PagedRows(
        row_start=first.to(device),
        num_rows=counts.to(device),
        cached=starts.to(device),
        table_row=torch.arange(len(counts), device=device),
        page_table=table.to(device),
        page_size=page_size,
        max_rows=max(batch.counts),
        max_keys=int((starts + counts).max()),
        shared=None if visibility is None else visibility.shared,
        own_start=None if visibility is None else visibility.own_start,
    )
    return PagedAttend(cache, rows, slots.to(device))


def _sequences(batch: ExtendBatch) -> zip:
    return zip(batch.pages, batch.starts, batch.counts, strict=True)
