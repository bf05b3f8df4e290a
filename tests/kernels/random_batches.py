# SPDX-License-Identifier: Apache-2.0
"""Random batches for the attention kernels."""

import random

import torch

from wedlm.attention.base import ExtendBatch, RowVisibility


def random_batch(rng: random.Random, lengths, page_size: int, device, groups: bool):
    needed = [-(-(start + count) // page_size) + rng.randint(0, 2) for start, count in lengths]
    pages = list(range(sum(needed) + 3))
    rng.shuffle(pages)
    tables = [[pages.pop() for _ in range(n)] for n in needed]
    shared, own = [], []
    for _, count in lengths:
        first = rng.randint(1, count)  # rows of the anchor and drafts, then one group after some of them
        for row in range(count):
            shared.append(rng.randint(1, first) if row >= first else 0)
            own.append(rng.randint(first, row) if row >= first else 0)
    visibility = RowVisibility(torch.tensor(shared, device=device), torch.tensor(own, device=device))
    starts, counts = [s for s, _ in lengths], [c for _, c in lengths]
    return ExtendBatch(starts, counts, tables, visibility if groups else None), sum(needed) + 3
