# SPDX-License-Identifier: Apache-2.0
"""Random histories of verified windows: the kernels against the algorithm, step by step."""

import random
from dataclasses import fields

import pytest
import torch

pytest.importorskip("triton")
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.reorder import pack_rows
from wedlm.algorithm.verify import row_layout
from wedlm.algorithm.window import RowResults, WindowParams, WindowState, num_drafts, update_windows
from wedlm.kernels.step_output import first_logprob
from wedlm.kernels.window_verified import update_verified, verified_rows

MASK, COLUMNS, TRASH = 50, 32, 999


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (0, 2, 3))])
def test_histories(device, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_slots, page_size = 6, 4
    params = [
        DecodeParams(
            rng.choice(["verified", "autoregressive"]),
            window_size=rng.choice([1, 3, 4, 9, 16, 25, 32]),
            draft_entropy=rng.choice([0.0, 0.7, 5.0]),
            max_positions=rng.choice([30, 60, 500]),
        )
        for _ in range(num_slots)
    ]
    stacked = WindowParams.stack(params, device)
    state = WindowState.empty(num_slots + 1, COLUMNS, device)
    for slot, one in enumerate(params):
        state.cached[slot] = rng.randint(0, 9)
        state.width[slot] = one.width(0, one.max_positions - int(state.cached[slot]))
        state.filled[slot, 0] = True
    table = torch.randperm(num_slots * 150, device=device).view(num_slots, 150)
    table = torch.cat([table, torch.zeros_like(table[:1])])
    for _ in range(25):
        chosen = rng.sample(range(num_slots), rng.randint(1, num_slots)) + [num_slots] * rng.randint(0, 2)
        index = torch.tensor(chosen, device=device)
        expected = state.take(index)
        real = int(expected.width.sum())
        capacity = real + rng.randint(0, 5)
        rows = verified_rows(state, index, table, page_size, capacity, MASK, TRASH)
        packed = pack_rows(expected.width, real)
        at = (packed.sequence, packed.row)
        verifies = torch.ones_like(expected.width, dtype=torch.bool)
        layout = row_layout(expected.filled, expected.width, verifies)
        filled = expected.filled[at]
        positions = expected.cached[packed.sequence] + layout.offset[at]
        keys = expected.cached[packed.sequence] + packed.row
        assert torch.equal(rows.tokens[:real], torch.where(filled, expected.tokens[at], MASK))
        assert torch.equal(rows.positions[:real], positions)
        assert torch.equal(rows.target[:real], positions + filled)
        assert torch.equal(rows.sequence[:real], packed.sequence)
        assert torch.equal(rows.shared[:real], layout.shared[at])
        assert torch.equal(rows.own_start[:real], layout.own_start[at])
        pages = table[index][packed.sequence, keys // page_size]
        assert torch.equal(rows.slots[:real], pages * page_size + keys % page_size)
        assert rows.slots[real:].tolist() == [TRASH] * (capacity - real)
        assert torch.equal(rows.num_rows, expected.width)
        assert torch.equal(rows.cached, expected.cached)

        choice = torch.randint(0, 3, (capacity,), device=device)  # few tokens, so that drafts are often right
        entropy, logprobs = torch.rand(capacity, device=device), torch.randn(capacity, device=device)
        grid = [torch.zeros(expected.tokens.shape, dtype=x.dtype, device=device) for x in (choice, entropy, logprobs)]
        for x, y in zip(grid, (choice, entropy, logprobs), strict=True):
            x[at] = y[:real]
        own = WindowParams.stack([params[min(slot, num_slots - 1)] for slot in chosen], device)
        after, emitted = update_windows(expected, torch.zeros_like(index), RowResults(*grid), own)
        slots = WindowParams(**{
            f.name: (lambda v: torch.cat([v, v[:1]]) if isinstance(v, torch.Tensor) else v)(getattr(stacked, f.name))
            for f in fields(stacked)
        })  # fmt: skip
        ints = update_verified(state, slots, index, rows, choice, entropy, logprobs)
        floats = ints[:, first_logprob(ints.shape) :].view(torch.float32)
        now = state.take(index)
        assert torch.equal(now.cached, after.cached)
        assert torch.equal(now.width, after.width)
        assert torch.equal(now.filled, after.filled)
        assert torch.equal(now.tokens[now.filled], after.tokens[after.filled])
        assert torch.equal(ints[:, 3], num_drafts(expected, own))
        assert torch.equal(ints[:, 0], emitted.count)
        assert torch.equal(ints[:, 2], after.cached)
        for s, count in enumerate(emitted.count.tolist()):
            assert torch.equal(ints[s, 4 : 4 + count], emitted.tokens[s, :count])
            assert torch.equal(floats[s, :count], emitted.logprobs[s, :count])
