# SPDX-License-Identifier: Apache-2.0
"""The training objective (paper section 3.3): masked loss, AR loss, and their mixture.

The objective is one sum over rows, Σ coefficient · cross-entropy, whose coefficients are known before the forward. This
makes the loss of an optimiser batch independent of how it is split over devices and accumulation steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


class LossTotals(NamedTuple):
    """Denominators over the whole optimiser batch: Σ w of masked rows, and the number of rows with an AR target."""

    weight: float
    num_ar: float


def row_coefficients(
    weight: Float[Tensor, " R"], is_ar: Bool[Tensor, " R"], totals: LossTotals, ar_loss_weight: float
) -> Float[Tensor, " R"]:
    """Coefficients c with Σ c · CE = (Σ w·CE / Σ w + a · mean AR CE) / (1 + a), where a = ``ar_loss_weight``.

    ``weight`` is 0 except at masked rows. A batch without masked rows trains only AR, and one without AR targets only
    the masked loss: the missing term and its share of the denominator disappear.
    """
    a = ar_loss_weight if totals.num_ar else 0.0
    masked_share = 1.0 if totals.weight else 0.0
    scale = masked_share + a
    if not scale:
        return torch.zeros_like(weight)
    coefficients = weight * (masked_share / (totals.weight or 1.0) / scale)
    return coefficients + is_ar.to(weight.dtype) * (a / (totals.num_ar or 1.0) / scale)


class Teacher(NamedTuple):
    """A model whose distributions replace target tokens.

    ``hidden`` are its hidden states, ``projection`` its output projection. A row's target is ``share`` times the
    teacher's distribution plus 1 - ``share`` times its token. The CE with a distribution, Σ -p_teacher · log p, is its
    KL divergence up to a constant.
    """

    hidden: Float[Tensor, "N D"]
    projection: Float[Tensor, "V D"]
    share: Float[Tensor, " N"]


class RowLosses(NamedTuple):
    """``loss`` = Σ coefficient · CE + Σ entropy_coefficient · H of correct rows; only this has a gradient. Also, for
    each row, the CE (nats) of the target and whether the logits' arg max is the target."""

    loss: Float[Tensor, ""]
    cross_entropy: Float[Tensor, " N"]
    correct: Bool[Tensor, " N"]


def plain_losses(
    hidden: Float[Tensor, "N C"],
    projection: Float[Tensor, "V C"],
    target: Int[Tensor, " N"],
    coefficient: Float[Tensor, " N"],
    entropy_coefficient: Float[Tensor, " N"] | None = None,
    teacher: Teacher | None = None,
) -> RowLosses:
    """The definition of the losses, with all logits in memory at once: the slow twin of ``chunked_losses``.

    ``entropy_coefficient`` weighs the entropy H (nats) of rows whose arg max is the target already. A correct guess is
    pushed to be confident, so that parallel decoding may take it; a wrong one is left to the cross-entropy (as in
    dParallel, arXiv 2509.26488). None leaves this term out.
    """
    logits = (hidden @ projection.T).float()
    cross_entropy = F.cross_entropy(logits, target, reduction="none")
    correct = logits.argmax(dim=-1) == target
    log_probs = torch.log_softmax(logits, dim=-1)
    wanted = cross_entropy
    if teacher is not None:
        other = torch.softmax((teacher.hidden @ teacher.projection.detach().T).float(), dim=-1)
        wanted = torch.lerp(cross_entropy, -(other * log_probs).sum(dim=-1), teacher.share)
    loss = wanted @ coefficient
    if entropy_coefficient is not None:
        loss = loss - (log_probs.exp() * log_probs).sum(dim=-1) @ (entropy_coefficient * correct)
    return RowLosses(loss, cross_entropy.detach(), correct)


def chunked_losses(
    hidden: Float[Tensor, "N C"],
    projection: Float[Tensor, "V C"],
    target: Int[Tensor, " N"],
    coefficient: Float[Tensor, " N"],
    entropy_coefficient: Float[Tensor, " N"] | None = None,
    teacher: Teacher | None = None,
    chunk: int = 8192,
    compiled: bool = False,
) -> RowLosses:
    """``plain_losses`` without ever holding more than ``chunk`` rows of logits.

    The vocabulary's logits are the largest tensor of training. Since coefficients are known in advance, each chunk's
    gradient is computed right after its logits, in the forward, and the logits are dropped. Products run in
    ``hidden``'s dtype; the projection's gradient adds up in float32. ``compiled`` fuses the softmax (CUDA).
    """
    loss, cross_entropy, correct = _ChunkedLosses.apply(
        hidden, projection, target, coefficient, entropy_coefficient, teacher, chunk, compiled
    )
    return RowLosses(loss, cross_entropy, correct)


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 - autograd sees tensors only where each is an argument
        ctx: Any,
        hidden: Tensor,
        projection: Tensor,
        target: Tensor,
        coefficient: Tensor,
        entropy_coefficient: Tensor | None,
        teacher: Teacher | None,
        chunk: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = projection.to(hidden.dtype)
        wanted = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wanted[0] else None
        weight_grad = torch.zeros_like(projection, dtype=torch.float32) if wanted[1] else None
        cross_entropy = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        other_weight = weight if teacher is None else teacher.projection.to(teacher.hidden.dtype)
        softmax = _compiled_softmax_losses() if compiled else _softmax_losses
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.T
            entropy_part = None if entropy_coefficient is None else entropy_coefficient[part]
            other = None if teacher is None else teacher.hidden[part] @ other_weight.T
            share = None if teacher is None else teacher.share[part]
            part_loss, cross_entropy[part], correct[part], logits_grad = softmax(
                logits, target[part], coefficient[part], entropy_part, other, share
            )
            loss += part_loss
            if hidden_grad is not None:
                hidden_grad[part] = logits_grad @ weight
            if weight_grad is not None:
                weight_grad += logits_grad.T @ hidden[part]
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(projection.dtype))
        ctx.mark_non_differentiable(cross_entropy, correct)
        return loss, cross_entropy, correct

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * loss_grad.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * loss_grad.to(weight_grad.dtype),
            *[None] * 6,
        )


def _softmax_losses(
    logits: Float[Tensor, "N V"],
    target: Int[Tensor, " N"],
    coefficient: Float[Tensor, " N"],
    entropy_coefficient: Float[Tensor, " N"] | None,
    other: Float[Tensor, "N V"] | None,
    share: Float[Tensor, " N"] | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Bool[Tensor, " N"], Float[Tensor, "N V"]]:
    """(loss, cross-entropy, whether the arg max is the target, gradient of the loss with respect to the logits)."""
    wide = logits.float()
    log_probs = wide - torch.logsumexp(wide, dim=-1, keepdim=True)
    probs = log_probs.exp()
    cross_entropy = -log_probs.gather(1, target[:, None])[:, 0]
    correct = wide.argmax(dim=-1) == target
    goal = (torch.arange(logits.shape[1], device=logits.device) == target[:, None]).float()
    wanted = cross_entropy
    if other is not None and share is not None:
        goal = torch.lerp(goal, torch.softmax(other.float(), dim=-1), share[:, None])
        wanted = -(goal * log_probs).sum(dim=-1)
    gradient = (probs - goal) * coefficient[:, None]
    # No product of vectors: autocast would make that one in bfloat16.
    loss = (wanted * coefficient).sum()
    if entropy_coefficient is not None:
        penalty = entropy_coefficient * correct
        entropy = -(probs * log_probs).sum(dim=-1)
        loss = loss + (entropy * penalty).sum()
        gradient = gradient - probs * (log_probs + entropy[:, None]) * penalty[:, None]
    return loss, cross_entropy, correct, gradient.to(logits.dtype)


@functools.cache
def _compiled_softmax_losses() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Compile ``_softmax_losses`` at first use, because importing the compiler takes over a second."""
    return torch.compile(_softmax_losses)
