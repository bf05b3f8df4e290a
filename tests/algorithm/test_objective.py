# SPDX-License-Identifier: Apache-2.0
"""The objective against plain loops over rows, and the chunked loss against the plain one."""

import functools
import math

import pytest
import torch

from tests.algorithm.packings import random_packing
from wedlm.algorithm.dual_stream import DualStream
from wedlm.algorithm.objective import LossTotals, Teacher, chunked_losses, plain_losses, row_coefficients

VOCAB, WIDTH = 61, 8


def cross_entropy(logits: torch.Tensor, target: int) -> float:
    values = [float(x) for x in logits.double()]
    top = max(values)
    return top + math.log(sum(math.exp(x - top) for x in values)) - values[target]


def objective_by_hand(rows: list[DualStream], logits: list[torch.Tensor], ar_weight: float) -> float:
    """Method, section 2: masked loss Σ w·CE / Σ w, AR loss a mean, (masked + a·AR) / (1 + a)."""
    weighted = weights = ar = count = 0.0
    for own, own_logits in zip(rows, logits, strict=True):
        for row in range(len(own.tokens)):
            if own.masked[row]:
                w = 1 / float(own.ratio[row])
                weighted += w * cross_entropy(own_logits[row], int(own.target[row]))
                weights += w
            elif own.is_ar[row]:
                ar += cross_entropy(own_logits[row], int(own.target[row]))
                count += 1
    return (weighted / weights + ar_weight * ar / count) / (1 + ar_weight)


def batch(seeds: range) -> tuple[list[DualStream], list[torch.Tensor], torch.Tensor]:
    """(rows of packed sequences, their hidden states, the projection)"""
    rows = [random_packing(seed).stream for seed in seeds]
    rows = [own for own in rows if own.masked.any()]
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(len(own.tokens), WIDTH, generator=generator) for own in rows]
    return rows, hidden, torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)


def totals_of(rows: list[DualStream]) -> LossTotals:
    return LossTotals(sum(float(own.weight.sum()) for own in rows), sum(float(own.is_ar.sum()) for own in rows))


@pytest.mark.parametrize("ar_weight", [0.0, 0.5, 1.0])
def test_the_objective_is_the_methods(ar_weight):
    rows, hidden, projection = batch(range(12))
    totals = totals_of(rows)
    expected = objective_by_hand(rows, [states @ projection.detach().T for states in hidden], ar_weight)
    for losses in (plain_losses, chunked_losses):
        found = sum(
            losses(states, projection, own.target, row_coefficients(own.weight, own.is_ar, totals, ar_weight)).loss
            for own, states in zip(rows, hidden, strict=True)
        )
        assert found.item() == pytest.approx(expected, abs=1e-5)


def test_the_split_into_micro_batches_changes_nothing():
    rows, hidden, projection = batch(range(12))
    totals = totals_of(rows)
    whole = torch.cat(hidden).requires_grad_()
    target, weight, is_ar = (torch.cat([getattr(own, name) for own in rows]) for name in ("target", "weight", "is_ar"))
    together = plain_losses(whole, projection, target, row_coefficients(weight, is_ar, totals, 1.0)).loss
    expected = torch.autograd.grad(together, (whole, projection))
    parts = [states.requires_grad_() for states in hidden]
    losses = [
        chunked_losses(states, projection, own.target, row_coefficients(own.weight, own.is_ar, totals, 1.0)).loss
        for own, states in zip(rows, parts, strict=True)
    ]
    for loss in losses:
        loss.backward()
    assert sum(loss.item() for loss in losses) == pytest.approx(together.item(), abs=1e-5)
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), expected[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(projection.grad, expected[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("rows", "chunk"), [(50, 16), (48, 16), (5, 16), (0, 16)])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("distills", [False, True])
def test_chunks_change_nothing(rows, chunk, with_entropy, distills):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, WIDTH, generator=generator, requires_grad=True)
    projection = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    target = torch.randint(0, VOCAB, (rows,), generator=generator)
    target[::2] = (hidden @ projection.T).argmax(dim=-1)[::2]  # half of the rows are right
    coefficient, entropy_coefficient = torch.rand(2, rows, generator=generator)
    # The other model is wider.
    other, its_projection = (torch.randn(n, WIDTH + 3, generator=generator) for n in (rows, VOCAB))
    teacher = Teacher(other, its_projection, torch.tensor([1.0, 0.0, 0.3]).repeat(rows)[:rows])
    extra = entropy_coefficient if with_entropy else None, teacher if distills else None
    results = [
        plain_losses(hidden, projection, target, coefficient, *extra),
        chunked_losses(hidden, projection, target, coefficient, *extra, chunk=chunk),
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(3 * result.loss, (hidden, projection)) for result in results]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of is its own
def test_compiling_the_softmax_changes_nothing():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(40, WIDTH, generator=generator).to(device).requires_grad_()
    projection = torch.randn(VOCAB, WIDTH, generator=generator).to(device).requires_grad_()
    target, coefficient = torch.randint(0, VOCAB, (40,), generator=generator).to(device), torch.rand(40).to(device)
    target[::2] = (hidden @ projection.T).argmax(dim=-1)[::2]
    other, its_projection = (torch.randn(n, WIDTH + 3, device=device) for n in (40, VOCAB))
    teacher = Teacher(other, its_projection, torch.tensor([1.0, 0.0, 0.3], device=device).repeat(40)[:40])
    extra = coefficient, teacher
    found = chunked_losses(hidden, projection, target, coefficient, *extra, chunk=16, compiled=True)
    expected = plain_losses(hidden, projection, target, coefficient, *extra)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(losses.loss, (hidden, projection)) for losses in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", ["hidden", "projection"])
def test_what_is_frozen_has_no_gradient(trained):
    tensors = {"hidden": torch.randn(6, WIDTH), "projection": torch.randn(VOCAB, WIDTH)}
    tensors[trained].requires_grad_()
    loss = chunked_losses(**tensors, target=torch.arange(6), coefficient=torch.ones(6), chunk=4).loss
    loss.backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name == trained)


@pytest.mark.parametrize("losses", [plain_losses, functools.partial(chunked_losses, chunk=2)])
def test_gradients_are_those_of_finite_differences(losses):
    """Logits are rounded to float32 on the way, hence the wide steps."""
    generator = torch.Generator().manual_seed(2)
    hidden, projection = (torch.randn(n, 4, generator=generator, dtype=torch.double) for n in (5, 7))
    coefficient, entropy_coefficient = torch.rand(2, 5, generator=generator)

    def loss(h: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return losses(h, p, torch.arange(5), coefficient, entropy_coefficient).loss.double()

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), projection.requires_grad_()), eps=1e-2, atol=1e-3)


def test_entropy_counts_in_right_rows_alone():
    hidden, projection = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 1])  # of row 0; row 1 is a tie, whose arg max is 0
    zero, one = torch.zeros(2), torch.ones(2)
    p = 1 / (1 + math.exp(-1.0))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert plain_losses(hidden, projection, right, zero, one).loss.item() == pytest.approx(entropy, abs=1e-6)
    assert plain_losses(hidden, projection, wrong, zero, one).loss.item() == 0


def test_a_distilled_row_rests_at_the_other_models_distribution():
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(6)).requires_grad_()
    projection, one = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(7)), torch.ones(3)
    same = Teacher(hidden.detach().clone(), projection, torch.tensor([1.0, 1.0, 0.0]))
    losses = plain_losses(hidden, projection, torch.arange(3), one, teacher=same)
    losses.loss.backward()
    assert hidden.grad[:2].abs().max() < 1e-5 < hidden.grad[2].abs().max()
    # What is reported stays the target's cross-entropy.
    assert torch.equal(losses.cross_entropy, plain_losses(hidden, projection, torch.arange(3), one).cross_entropy)


def test_a_tie_has_one_arg_max():
    """In bfloat16 the best logits often tie, and counting each of them as right would flatter the model."""
    hidden, projection = torch.ones(3, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    arguments = hidden, projection, torch.arange(3), torch.ones(3)
    assert plain_losses(*arguments).correct.tolist() == [False, True, False]
    assert chunked_losses(*arguments).correct.tolist() == [False, True, False]


def test_a_batch_without_masked_rows_is_the_mean_ar_loss():
    rows = [own for own in (random_packing(seed).stream for seed in range(60)) if not own.masked.any()]
    rows = [own for own in rows if own.is_ar.any()][:3]
    assert rows
    generator = torch.Generator().manual_seed(3)
    projection = torch.randn(VOCAB, WIDTH, generator=generator)
    found, every = 0.0, []
    for own in rows:
        hidden = torch.randn(len(own.tokens), WIDTH, generator=generator)
        coefficient = row_coefficients(own.weight, own.is_ar, totals_of(rows), 0.3)
        found += chunked_losses(hidden, projection, own.target, coefficient).loss.item()
        logits = hidden @ projection.T
        every += [cross_entropy(logits[r], int(own.target[r])) for r in range(len(logits)) if own.is_ar[r]]
    assert found == pytest.approx(sum(every) / len(every), abs=1e-5)


def test_products_in_bfloat16_leave_sums_in_float32():
    """Hidden states in bfloat16 over weights in float32, as under autocast: each gradient has its tensor's type."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(64, WIDTH, generator=generator).bfloat16().requires_grad_()
    projection = torch.randn(VOCAB, WIDTH, generator=generator).bfloat16().float().requires_grad_()
    target, coefficient = torch.arange(64) % VOCAB, torch.full((64,), 1 / 64)
    found = chunked_losses(hidden, projection, target, coefficient, chunk=16)
    found.loss.backward()
    assert found.loss.dtype == found.cross_entropy.dtype == torch.float32
    wide = hidden.detach().float().requires_grad_(), projection.detach().clone().requires_grad_()
    expected = plain_losses(*wide, target, coefficient)
    expected.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-2, rtol=1e-2)
    for mine, reference in zip((hidden, projection), wide, strict=True):
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.float(), reference.grad, atol=2e-3, rtol=3e-2)


def test_a_missing_part_takes_no_share():
    weight, is_ar = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([False, False, True])
    only_masked = row_coefficients(weight, ~is_ar & False, LossTotals(3.0, 0.0), 1.0)
    assert only_masked.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    only_ar = row_coefficients(weight * 0, is_ar, LossTotals(0.0, 4.0), 0.3)
    assert only_ar.tolist() == pytest.approx([0, 0, 1 / 4])
    assert row_coefficients(weight * 0, is_ar & False, LossTotals(0.0, 0.0), 1.0).tolist() == [0, 0, 0]
    both = row_coefficients(weight, is_ar, LossTotals(3.0, 1.0), 0.5)
    assert both.tolist() == pytest.approx([2 / 3 / 1.5, 1 / 3 / 1.5, 0.5 / 1.5])
