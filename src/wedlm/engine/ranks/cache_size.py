# SPDX-License-Identifier: Apache-2.0
"""The size and type of every rank's key/value cache, which rank 0 decides."""

from dataclasses import dataclass

import numpy as np
import torch

from wedlm.attention.base import FP8

_CACHE_TYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)


@dataclass(frozen=True)
class CacheSize:
    """The size of every rank's key/value cache. ``on_kernels``: whether steps run on our kernels; the other ranks then
    need a table of the pages of ``num_slots`` windows and the mask token's id."""

    num_pages: int
    page_size: int
    dtype: torch.dtype
    on_kernels: bool
    num_slots: int
    max_model_len: int
    mask_token_id: int


def cache_arrays(size: CacheSize) -> list[np.ndarray]:
    """The size as a message; ``read_cache`` undoes this."""
    numbers = [
        size.num_pages, size.page_size, _CACHE_TYPES.index(size.dtype), size.on_kernels,
        size.num_slots, size.max_model_len, size.mask_token_id,
    ]  # fmt: skip
    return [np.array(numbers, dtype=np.int64)]


def read_cache(arrays: list[np.ndarray]) -> CacheSize:
    num_pages, page_size, dtype, on_kernels, *rest = arrays[0].tolist()
    return CacheSize(num_pages, page_size, _CACHE_TYPES[dtype], bool(on_kernels), *rest)
