# SPDX-License-Identifier: Apache-2.0
"""The loss of one micro-batch: no state besides the weights."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wedlm.algorithm.objective import Teacher, chunked_losses
from wedlm.attention.dual_stream import plan_training_attention
from wedlm.model.layers import Attend
from wedlm.model.transformer import Transformer
from wedlm.train.batch import NUM_GROUPS, TrainBatch
from wedlm.train.lora import without_lora


class StepLosses(NamedTuple):
    """``loss``: this micro-batch's part of the optimiser batch's loss, the only part with a gradient.

    ``statistics`` is [NUM_GROUPS, 3], sums over its rows: how many, cross-entropy in nats, right guesses. Group 0 is
    the AR loss, then masked rows by depth in their block, then masked rows by ratio.
    """

    loss: Tensor
    statistics: Tensor


class TrainingModel(nn.Module):
    """The model with its objective inside, so that data-parallel wrappers see one forward from batch to loss.

    ``mask_embedding`` is the mask token's embedding as a parameter of its own, for runs that train no other embedding;
    None where the embedding itself is trained. ``distill_text``: AR targets of plain text are the distributions of
    ``teacher_model``; of the model without its LoRA if that is None.
    """

    def __init__(
        self,
        transformer: Transformer,
        backend: str,
        mask_token_id: int,
        own_mask_embedding: bool,
        distill_text: bool = False,
        teacher_model: Transformer | None = None,
    ) -> None:
        super().__init__()
        self.transformer, self.distill_text = transformer, distill_text
        # In a tuple it is not a submodule: neither trained nor sharded nor saved.
        self._teacher_model = (teacher_model,)
        self.backend, self.mask_token_id = backend, mask_token_id
        embedding = transformer.model.embed_tokens
        self.mask_embedding: nn.Parameter | None = None
        if own_mask_embedding:
            self.mask_embedding = nn.Parameter(embedding.weight.detach()[mask_token_id].float().clone())
        embedding.register_forward_hook(self._embed)

    def _embed(self, _: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor:
        if self.mask_embedding is not None:
            mask = (inputs[0] == self.mask_token_id)[:, None]
            embedded = torch.where(mask, self.mask_embedding.to(embedded.dtype), embedded)
        # Autocast leaves embeddings in float32, and the residual stream would stay so: twice the memory to move, and
        # not what inference computes.
        kind = embedded.device.type
        return embedded.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else embedded

    def forward(self, batch: TrainBatch) -> StepLosses:
        attend = plan_training_attention(self.backend, batch.labels, batch.row_ranges)
        teacher = self._teacher(batch, attend) if self.distill_text and self.training else None
        hidden_KC = _loss_states(self.transformer, batch, attend)
        # Products are made in the type of the hidden states anyway; autocast would round the sum of losses, too.
        with torch.autocast(hidden_KC.device.type, enabled=False):
            losses = chunked_losses(
                hidden_KC,
                self.transformer.lm_head.get_parameter("weight"),
                batch.target,
                batch.coefficient,
                batch.entropy_coefficient,
                teacher,
                compiled=hidden_KC.is_cuda,
            )
        figures = torch.stack((torch.ones_like(losses.cross_entropy), losses.cross_entropy, losses.correct.float()), 1)
        # One more group than there is, for rows that count in none.
        statistics = figures.new_zeros(NUM_GROUPS + 1, 3)
        statistics.index_add_(0, batch.depth_group, figures).index_add_(0, batch.ratio_group, figures)
        return StepLosses(losses.loss, statistics[:-1])

    @torch.no_grad()
    def _teacher(self, batch: TrainBatch, attend: Attend) -> Teacher:
        (other,) = self._teacher_model
        with nullcontext() if other is not None else without_lora(self.transformer):
            model = self.transformer if other is None else other
            hidden_KC = _loss_states(model, batch, attend)
            return Teacher(hidden_KC, model.lm_head.get_parameter("weight"), batch.is_text)


def _loss_states(transformer: Transformer, batch: TrainBatch, attend: Attend) -> Tensor:
    """Hidden states [K, C], after the final norm, of the rows with a loss."""
    rows = (batch.tokens.flatten(), batch.positions.flatten())
    hidden_TC = transformer.model(*rows, attend, batch.masked.flatten())
    hidden_KC: Tensor = transformer.model.norm(hidden_TC.index_select(0, batch.loss_rows))
    return hidden_KC


def prepare_layers(transformer: Transformer, compile_layers: bool, checkpoint_activations: bool) -> None:
    """Compile each layer (all share one compiled graph), and recompute its activations in the backward pass."""
    for layer in transformer.model.layers:
        forward: Callable[..., Any] = layer.forward
        if compile_layers:
            forward = torch.compile(forward)
        if checkpoint_activations:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        layer.forward = forward
