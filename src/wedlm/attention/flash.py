# SPDX-License-Identifier: Apache-2.0
"""Attention of prompt chunks by FlashAttention-3, on Hopper GPUs where its package is installed (the module
``flash_attn_interface``, built from the folder ``hopper`` of FlashAttention's repository).

The twins are our own kernel and ``PagedSdpa``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from wedlm.attention.base import KVCache
from wedlm.kernels.attention import PagedRows

# Its tiles have 128 rows or more: sequences with fewer new rows would leave most of a tile empty.
FEWEST_ROWS = 128
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Flash:
    """``call``: the package's ``flash_attn_with_kvcache``, or None if our kernel computes all attention. ``fault``: why
    an installed package cannot be used; empty if it works, is not installed, or does not apply here."""

    call: Callable[..., Tensor] | None = None
    fault: str = ""


class FlashRows:
    """Attention of ``rows``, planned once a step of ``num_rows`` packed rows. No size depends on what lies on the
    device, so a CUDA graph can hold plan and calls.

    The package takes sequences that follow each other without a gap. What lies before, between and after those of
    ``rows`` counts as sequences without keys.
    """

    def __init__(self, call: Callable[..., Tensor], rows: PagedRows, num_rows: int) -> None:
        self._call, self._page_size, self._num_rows = call, rows.page_size, num_rows
        stops = rows.row_start + rows.num_rows
        edges = F.pad(torch.stack((rows.row_start, stops), dim=1).flatten(), (1, 0))  # gap, sequence, gap, ...
        self._edges = F.pad(edges, (0, 1), value=num_rows).int()
        keys = (rows.cached + rows.num_rows).int()
        self._num_keys = F.pad(F.pad(keys[:, None], (1, 0)).flatten(), (0, 1))
        pages = rows.page_table[rows.table_row].int()[:, None].expand(-1, 2, -1).flatten(0, 1)
        self._pages = torch.cat((pages, pages[:1]))  # those of gaps are never read

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of q [T, H, D] over a layer's keys and values [A, K, D], in which those of the rows are already
        written: a new [T, H, D]. Other rows than those planned get any numbers."""
        shape = (-1, self._page_size, *keys.shape[1:])
        return self._call(
            q,
            keys.view(shape),
            values.view(shape),
            cache_seqlens=self._num_keys,
            page_table=self._pages,
            cu_seqlens_q=self._edges,
            max_seqlen_q=self._num_rows,
            softmax_scale=q.shape[-1] ** -0.5,
            causal=True,  # the last row sees all of its sequence's keys, each row before it one less
        )


def plan_flash(cache: KVCache, groups: Sequence[PagedRows], num_rows: int) -> FlashRows | None:
    """The plan for the last of a step's groups, which is that of the chunks if it has any. None: it has fewer than
    ``FEWEST_ROWS`` rows a sequence, or a visibility of its own, or the package cannot be used."""
    if not groups:
        return None
    rows = groups[-1]
    before = num_rows if rows.within is None else rows.within
    if rows.shared is not None or min(rows.max_rows, before // len(rows.num_rows)) < FEWEST_ROWS:
        return None
    _, _, kv_heads, head_dim = cache.keys.shape
    call = find_flash(cache.keys.device, cache.keys.dtype, kv_heads, head_dim, cache.page_size).call
    return None if call is None else FlashRows(call, rows, num_rows)


def find_flash(device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int, page_size: int) -> Flash:
    """Whether the package can be used for a cache of this kind. It is imported only where it might be, and tried once,
    because builds may lack types, head dimensions and paged keys."""
    if dtype not in DTYPES or not _is_hopper(device):
        return Flash()
    return _tried(device, dtype, kv_heads, head_dim, page_size)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache
@torch.inference_mode()
def _tried(device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int, page_size: int) -> Flash:
    try:
        from flash_attn_interface import flash_attn_with_kvcache as call

        num_rows = 2 * FEWEST_ROWS
        keys = torch.zeros(-(-num_rows // page_size) * page_size, kv_heads, head_dim, dtype=dtype, device=device)
        pages = torch.arange(len(keys) // page_size, device=device)[None]
        zero, count = (torch.full((1,), number, device=device) for number in (0, num_rows))
        rows = PagedRows(zero, count, zero, zero, pages, page_size, num_rows, num_rows)
        q = keys[:num_rows].repeat_interleave(2, dim=1)  # of several heads a key head, as models have
        if not bool(FlashRows(call, rows, num_rows)(q, keys, keys).isfinite().all()):  # which waits for it
            raise ArithmeticError("attention over zeros is not finite")
    except Exception as error:  # whatever another package's import or kernels raise: users get it in one line
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn_interface":
            return Flash()
        text = str(error).strip().partition("\n")[0]
        return Flash(fault=f"{type(error).__name__}: {text}")
    return Flash(call)
