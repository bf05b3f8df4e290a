# SPDX-License-Identifier: Apache-2.0
"""Each kernel against the plain torch operations that it replaces."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from tests.kernels.comparing import DTYPES, close, summable
from tests.model.tiny import our_model
from wedlm.algorithm.sample import ban_tokens, entropy_and_logsumexp
from wedlm.kernels.embed import embed
from wedlm.kernels.logits import greedy_rows
from wedlm.kernels.low_rank import Blocks, add_low_rank
from wedlm.kernels.matmul import Tiling, few_rows_product
from wedlm.kernels.norm import add_rms_norm, silu_mul
from wedlm.kernels.rope import norm_rope_write
from wedlm.model.rope import RotaryEmbedding, rotate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [None, 1, 3])
def test_add_rms_norm(device, dtype, parts):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 96, device=device, dtype=dtype), torch.randn(96, device=device, dtype=dtype)
    delta = None
    if parts is not None:
        delta = torch.randn(parts, 5, 96, device=device) if parts > 1 else torch.randn(5, 96, device=device).to(dtype)
    total, normed = add_rms_norm(x, delta, weight, 1e-5)
    added = x if delta is None else x + (delta.sum(0).to(dtype) if parts > 1 else delta)
    close(total, added, dtype)
    close(normed, F.rms_norm(added, (96,), weight, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(device, dtype):
    torch.manual_seed(0)
    rotary = RotaryEmbedding(our_model("yarn-rope").config).to(device)
    weight = torch.randn(50, 1100, device=device).to(dtype)
    tokens, positions = torch.tensor([3, 49, 0], device=device), torch.tensor([0, 5, 20_000], device=device)
    x, cos, sin = embed(tokens, positions, weight, rotary.inv_freq, rotary.attention_factor)
    assert torch.equal(x, weight[tokens])
    for actual, expected in zip((cos, sin), rotary(positions, dtype), strict=True):
        close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(device, dtype):
    torch.manual_seed(0)
    gate_up = torch.randn(3, 2 * 1100, device=device, dtype=dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    close(silu_mul(gate_up), F.silu(gate) * up, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_norm_rope_write(device, dtype, normed, parts):
    torch.manual_seed(0)
    num_rows, heads, kv_heads, d = 5, 6, 2, 16
    width = (heads + 2 * kv_heads) * d
    qkv = torch.randn(parts, num_rows, width, device=device)
    qkv = qkv.to(dtype)[0] if parts == 1 else qkv
    angles = torch.randn(num_rows, d // 2, device=device)
    cos, sin = torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([-angles.sin(), angles.sin()], -1).to(dtype)
    weights = torch.randn(2, d, device=device).to(dtype)
    keys, values = (torch.zeros(40, kv_heads, d, device=device, dtype=dtype) for _ in range(2))
    slots = torch.tensor([7, 3, 39, 0, 12], device=device)
    norms = (weights[0], weights[1], 1e-6) if normed else None
    q = norm_rope_write(qkv, cos, sin, slots, norms, keys, values)
    whole = (qkv if parts == 1 else qkv.sum(0).to(dtype)).view(num_rows, -1, d)
    expected_q, expected_k, expected_v = whole.split((heads, kv_heads, kv_heads), dim=1)
    if normed:
        expected_q = F.rms_norm(expected_q, (d,), weights[0], 1e-6)
        expected_k = F.rms_norm(expected_k, (d,), weights[1], 1e-6)
    close(q, rotate(expected_q, cos, sin), dtype, 2)
    close(keys[slots], rotate(expected_k, cos, sin), dtype, 2)
    close(values[slots], expected_v, dtype)  # the interpreter truncates where devices round
    others = torch.ones(40, dtype=torch.bool)
    others[slots.cpu()] = False
    assert not keys[others.to(device)].any()
    assert not values[others.to(device)].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, pytest.param(5, marks=pytest.mark.long), 16, 33])
@pytest.mark.parametrize(
    "tiling",
    [Tiling(32, 64), Tiling(32, 64, splits=2), Tiling(16, 32, splits=3), Tiling(32, 64, splits=2, rows=16)],
    ids=["one", "halves", "uneven", "blocks"],
)
def test_few_rows_product(device, dtype, num_rows, tiling):
    torch.manual_seed(0)
    x = summable(torch.randn(num_rows, 320, device=device, dtype=dtype), 1 / 8)
    weight = summable(torch.randn(100, 320, device=device, dtype=dtype) / 18, 1 / 128)
    out = few_rows_product(x, weight, tiling)
    if tiling.splits > 1:
        assert out.shape == (tiling.splits, num_rows, 100)
        assert out.dtype == torch.float32
        out = out.sum(0)
    close(out, x.float() @ weight.float().T, dtype)
    # A row's sums do not depend on its company.
    alone = few_rows_product(x[-1:], weight, tiling)
    assert torch.equal(alone.sum(0)[0] if tiling.splits > 1 else alone[0], out[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_gated_product(device, dtype):
    torch.manual_seed(0)
    x = torch.randn(7, 128, device=device, dtype=dtype)
    weight = torch.randn(2 * 72, 128, device=device, dtype=dtype) / 11
    gate, up = (x @ weight.T).chunk(2, dim=-1)
    close(few_rows_product(x, weight, Tiling(32, 64), gated=True), F.silu(gate) * up, dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "with_ends"), [(3, False), (70, True), (3, True), pytest.param(70, False, marks=pytest.mark.long)]
)
def test_greedy_rows(device, dtype, num_rows, with_ends):
    torch.manual_seed(0)
    vocab, mask = 9001, 17
    logits = (torch.randn(num_rows, vocab, device=device) * 4).to(dtype)
    logits[0, mask] = 60  # the mask token would win
    logits[1, [5, 9, 8999]] = 50  # equal logits: the lowest id
    logits[2, 100:] = -torch.inf
    sequence = torch.arange(num_rows, device=device) % 2
    stop_tokens = torch.tensor([[5, -1], [9, 5]], device=device)
    min_eos_position = torch.tensor([10, 4], device=device)
    target = torch.arange(num_rows, device=device) % 8
    eos_ban = (target, sequence, min_eos_position, stop_tokens) if with_ends else None
    choice, entropy, logprob = greedy_rows(logits, mask, eos_ban)
    raw = logits.float()
    expected_entropy, logsumexp = entropy_and_logsumexp(raw)
    banned = target < min_eos_position[sequence] if with_ends else torch.zeros_like(target, dtype=torch.bool)
    allowed = ban_tokens(raw.clone(), mask, stop_tokens[sequence], banned)
    assert torch.equal(choice, allowed.max(dim=-1)[1])
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-4, atol=1e-4)
    expected = raw.gather(1, choice[:, None])[:, 0] - logsumexp
    torch.testing.assert_close(logprob, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 70])
@pytest.mark.parametrize("parts", [None, 8])
@pytest.mark.parametrize("ranks", [(5,), (64, 0, 20)], ids=str)
def test_add_low_rank(device, dtype, num_rows, parts, ranks):
    torch.manual_seed(0)
    sizes = (72, 40, 130)[: len(ranks)]
    matrices = [torch.randn(size, rank, device=device).to(dtype) for size, rank in zip(sizes, ranks, strict=True)]
    out = torch.randn(num_rows, sum(sizes), device=device).to(dtype)
    hidden = torch.randn(*((parts,) if parts else ()), num_rows, sum(ranks), device=device) / 4
    hidden = hidden if parts else hidden.to(dtype)
    masked = torch.arange(num_rows, device=device) % 3 == 1
    masked[-1] = num_rows != 3  # at 70 it is alone in its block of rows
    whole = hidden.sum(0).to(dtype) if parts else hidden
    delta = torch.block_diag(*(one.float() for one in matrices)) @ whole.float().T
    expected = torch.where(masked[:, None], out.float() + delta.T, out.float())
    before = out.clone()
    add_low_rank(out, hidden, Blocks.of(matrices), masked)
    close(out, expected, dtype)
    assert torch.equal(out[~masked], before[~masked])
