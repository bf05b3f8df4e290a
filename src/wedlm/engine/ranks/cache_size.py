# SPDX-License-Identifier: Apache-2.0
"""What every rank's key/value cache is like, which rank 0 decides."""

from dataclasses import dataclass

import numpy as np
import torch

from wedlm.attention.base import FP8

_CACHE_TYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)


@dataclass(frozen=True)
class CacheSize:
    """Of every rank's key/value cache, and whether steps run on our kernels."""

    num_pages: int
    page_size: int
    dtype: torch.dtype
    on_kernels: bool


def cache_arrays(size: CacheSize) -> list[np.ndarray]:
    """As a message; ``read_cache`` undoes it."""
    numbers = [size.num_pages, size.page_size, _CACHE_TYPES.index(size.dtype), size.on_kernels]
    return [np.array(numbers, dtype=np.int64)]


def read_cache(arrays: list[np.ndarray]) -> CacheSize:
    num_pages, page_size, dtype, on_kernels = arrays[0].tolist()
    return CacheSize(num_pages, page_size, _CACHE_TYPES[dtype], bool(on_kernels))
