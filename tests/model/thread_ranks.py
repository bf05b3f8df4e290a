# SPDX-License-Identifier: Apache-2.0
"""Ranks of tensor parallelism as threads of this process: the same parts of the model, another way to meet."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from wedlm.engine.ranks.group import add_up


class ThreadRanks:
    """``SumOverRanks`` of each thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._given: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> "_OneRank":
        return _OneRank(self, rank)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What ``work(rank)`` gives, all ranks at once."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, range(self.size)))


class _OneRank:
    def __init__(self, ranks: ThreadRanks, rank: int) -> None:
        self.ranks, self.rank = ranks, rank

    def parts(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._gather(add_up(x, dtype) if x.ndim == 3 else x)

    def _gather(self, x: Tensor) -> Tensor:
        ranks = self.ranks
        ranks._given[self.rank] = x
        ranks._barrier.wait()
        parts = torch.stack([part for part in ranks._given if part is not None])
        ranks._barrier.wait()
        return parts

    def sum(self, x: Tensor) -> Tensor:
        return add_up(self._gather(x))
