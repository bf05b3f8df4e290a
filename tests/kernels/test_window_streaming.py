# SPDX-License-Identifier: Apache-2.0
"""Random histories of streaming and block windows: the kernels against the algorithm, step by step."""

import random
from dataclasses import fields

import pytest
import torch

pytest.importorskip("triton")
from wedlm.algorithm.params import NEXT_TOKENS, DecodeParams
from wedlm.algorithm.reorder import pack_rows, topological_order
from wedlm.algorithm.window import RowResults, WindowParams, WindowState, extend, update_windows
from wedlm.kernels import window_streaming
from wedlm.kernels.step_output import first_logprob
from wedlm.kernels.window_streaming import streaming_rows, update_streaming

MASK, COLUMNS, TRASH, PAGE_SIZE = 50, 32, 999, 4


def windows(rng: random.Random, num_slots: int, device) -> tuple[WindowState, WindowParams, torch.Tensor]:
    """Fresh windows by slot, the last one empty, with their parameters and page tables."""
    params = [
        DecodeParams(
            rng.choice(["streaming", "block"]),
            window_size=rng.choice([1, 3, 4, 9, 16]),
            entropy_threshold=rng.choice([None, 0.2, 0.6, 5.0]),
            pos_penalty=rng.choice([0.0, 0.02, 0.3]),
            next_token=rng.choice(NEXT_TOKENS),
            max_positions=rng.choice([30, 60, 500]),
            suffix_length=rng.choice([0, 0, 2, 7]),
        )
        for _ in range(num_slots - 2)
    ]
    # Two that fill by what their masked rows agree on, and the empty one.
    params += [
        DecodeParams("streaming", 9, 0.6, next_token="causal"),
        DecodeParams("streaming", 4, 5.0, next_token="causal"),
    ]
    params += [DecodeParams("streaming")]
    state = WindowState.empty(num_slots + 1, COLUMNS, device)
    for slot, one in enumerate(params[:-1]):
        state.cached[slot] = one.suffix_length + rng.randint(0, 9)
        state.width[slot] = one.width(0, one.max_positions - int(state.cached[slot]))
        state.filled[slot, 0] = one.has_anchor
    table = torch.randperm((num_slots + 1) * 150, device=device).view(num_slots + 1, 150)
    return state, WindowParams.stack(params, device), table


def of_slots(params: WindowParams, index: torch.Tensor) -> WindowParams:
    values = (getattr(params, f.name) for f in fields(params))
    return WindowParams(*(v[index] if isinstance(v, torch.Tensor) else v for v in values))


def check_step(rng: random.Random, state, params, table, index, device) -> None:
    """One step of the windows ``index``; ``state`` moves on."""
    own = of_slots(params, index)
    expected, run = extend(state.take(index), own)
    real = int(expected.width.sum())
    packed = pack_rows(expected.width, real)
    column = topological_order(expected.filled, expected.width)[packed.sequence, packed.row]
    at = (packed.sequence, column)
    run_of_row, width_of_row = run[packed.sequence], expected.width[packed.sequence]
    is_next = own.causal[packed.sequence] & (column == run_of_row - 1) & (run_of_row < width_of_row)
    wanted = (~expected.filled[at] | is_next).nonzero()[:, 0]
    capacity, num_logits = real + rng.randint(0, 300), len(wanted) + rng.randint(0, 5)
    rows = streaming_rows(state, params, index, table, PAGE_SIZE, capacity, num_logits, MASK, TRASH)
    keys = expected.cached[packed.sequence] + packed.row
    pages = table[index][packed.sequence, keys // PAGE_SIZE]
    assert torch.equal(rows.tokens[:real], torch.where(expected.filled[at], expected.tokens[at], MASK))
    assert torch.equal(rows.positions[:real], (expected.cached - own.suffix_length)[packed.sequence] + column)
    assert torch.equal(rows.slots[:real], pages * PAGE_SIZE + keys % PAGE_SIZE)
    assert rows.slots[real:].tolist() == [TRASH] * (capacity - real)
    assert rows.tokens[real:].tolist() == [MASK] * (capacity - real)
    assert not rows.positions[real:].any()
    assert torch.equal(rows.logits_indices[: len(wanted)], wanted)
    assert torch.equal(rows.sequence[: len(wanted)], packed.sequence[wanted])
    assert torch.equal(rows.target[: len(wanted)], rows.positions[wanted] + is_next[wanted])
    for padded in (rows.logits_indices, rows.sequence, rows.target):
        assert not padded[len(wanted) :].any()
    assert torch.equal(rows.num_rows, expected.width)
    assert torch.equal(rows.cached, expected.cached)
    assert torch.equal(rows.run, run)

    choice = torch.randint(0, 3, (num_logits,), device=device)  # rows agree now and then
    entropy = torch.randint(0, 8, (num_logits,), device=device) / 7  # many are equal
    entropy[torch.rand(num_logits, device=device) < 0.1] = torch.nan
    logprobs = torch.randn(num_logits, device=device)
    grid = [torch.zeros(expected.tokens.shape, dtype=x.dtype, device=device) for x in (choice, entropy, logprobs)]
    masked, following = ~is_next[wanted], is_next[wanted]
    for x, y in zip(grid, (choice, entropy, logprobs), strict=True):
        x[packed.sequence[wanted][masked], column[wanted][masked]] = y[: len(wanted)][masked]
    first = packed.sequence[wanted][following], column[wanted][following] + 1
    grid[1][first] = torch.where(grid[0][first] == choice[: len(wanted)][following], grid[1][first], torch.inf)
    for x, y in ((grid[0], choice), (grid[2], logprobs)):
        x[first] = y[: len(wanted)][following]
    after, emitted = update_windows(expected, run, RowResults(*grid), own)
    ints = update_streaming(state, params, index, rows, choice, entropy, logprobs)
    floats = ints[:, first_logprob(ints.shape) :].view(torch.float32)
    now = state.take(index)
    assert torch.equal(now.cached, after.cached)
    assert torch.equal(now.width, after.width)
    assert torch.equal(now.filled, after.filled)
    assert torch.equal(now.tokens[now.filled], after.tokens[after.filled])
    assert torch.equal(now.logprobs[now.filled], after.logprobs[after.filled])
    assert torch.equal(ints[:, :4], torch.stack((emitted.count, expected.width, after.cached, 0 * run), dim=1))
    for s, count in enumerate(emitted.count.tolist()):
        assert torch.equal(ints[s, 4 : 4 + count], emitted.tokens[s, :count])
        assert torch.equal(floats[s, :count], emitted.logprobs[s, :count])


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.long) for seed in (0, 1))])
def test_histories(device, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_slots = 6
    state, params, table = windows(rng, num_slots, device)
    for _ in range(15):
        chosen = rng.sample(range(num_slots), rng.randint(1, num_slots)) + [num_slots] * rng.randint(0, 2)
        check_step(rng, state, params, table, torch.tensor(chosen, device=device), device)


def test_more_sequences_than_a_tile(device, monkeypatch):
    monkeypatch.setattr(window_streaming, "_SEQUENCES_PER_TILE", 4)
    rng = random.Random(9)
    torch.manual_seed(9)
    state, params, table = windows(rng, 11, device)
    for _ in range(3):
        check_step(rng, state, params, table, torch.tensor(rng.sample(range(12), 12), device=device), device)
