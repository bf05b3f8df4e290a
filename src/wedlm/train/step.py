# SPDX-License-Identifier: Apache-2.0
"""The loss of one micro-batch, without any state besides the weights."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wedlm.algorithm.objective import Teacher, chunked_losses
from wedlm.attention.dual_stream import StreamPlan, plan_training_attention
from wedlm.model.transformer import Transformer
from wedlm.train.batch import NUM_GROUPS, TrainBatch
from wedlm.train.lora import without_lora


class StepLosses(NamedTuple):
    """``loss``: this micro-batch's part of the optimiser batch's loss, the only part with a gradient.

    ``statistics`` is [NUM_GROUPS, 3], sums over its rows: their number, cross-entropy in nats, right guesses. Group 0
    is the AR loss, then come masked rows by depth in their block, then masked rows by ratio.
    """

    loss: Tensor
    statistics: Tensor


class TrainingModel(nn.Module):
    """The model with its objective inside, so that data-parallel wrappers see one forward from batch to loss.

    ``mask_embedding`` is the mask token's embedding as a separate parameter, for runs that train no other embedding;
    None if the embedding itself is trained. ``distill_text``: AR targets of plain text are the distributions of
    ``teacher_model``, or if that is None, of the model without its LoRA. ``distill_masked`` is the share of the model's
    own AR distribution in the targets of masked rows.
    """

    def __init__(
        self,
        transformer: Transformer,
        backend: str,
        mask_token_id: int,
        own_mask_embedding: bool,
        distill_text: bool = False,
        teacher_model: Transformer | None = None,
        distill_masked: float = 0.0,
    ) -> None:
        super().__init__()
        self.transformer, self.distill_text, self.distill_masked = transformer, distill_text, distill_masked
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
        hidden_TC = hidden_states(self.transformer, batch, self.backend)
        norm = self.transformer.model.norm
        teacher = self._teacher(batch, hidden_TC) if self.training else None
        hidden_KC = norm(hidden_TC.index_select(0, batch.loss_rows))
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
    def _teacher(self, batch: TrainBatch, hidden_TC: Tensor) -> Teacher | None:
        """The teacher. ``hidden_TC`` are the model's own hidden states."""
        if self.distill_masked:
            norm, has_one = self.transformer.model.norm, batch.ar_row >= 0
            own_KC = norm(hidden_TC.index_select(0, batch.ar_row.clamp(min=0)))
            return Teacher(own_KC, self.transformer.lm_head.get_parameter("weight"), has_one * self.distill_masked)
        if not self.distill_text:
            return None
        (other,) = self._teacher_model
        with nullcontext() if other is not None else without_lora(self.transformer):
            model = self.transformer if other is None else other
            other_TC = hidden_states(model, batch, self.backend)
            other_KC = model.model.norm(other_TC.index_select(0, batch.loss_rows))
            return Teacher(other_KC, model.lm_head.get_parameter("weight"), batch.is_text.float())


def hidden_states(transformer: Transformer, batch: TrainBatch, backend: str) -> Tensor:
    """Hidden states [T, C], before the final norm, of all rows."""
    if batch.num_clean_rows and backend != "magi":
        return _states_of_streams(transformer, batch, backend)
    attend = plan_training_attention(backend, batch.labels, batch.row_ranges)
    rows = (batch.tokens.flatten(), batch.positions.flatten())
    hidden_TC: Tensor = transformer.model(*rows, attend, batch.masked.flatten())
    return hidden_TC


def _states_of_streams(transformer: Transformer, batch: TrainBatch, backend: str) -> Tensor:
    """``hidden_states`` with the clean stream computed separately and without gradients, because it sees nothing that
    is trained.

    Both streams go through a layer before the next one, so that only one layer's clean keys are held at a time.
    """
    decoder, end = transformer.model, batch.num_clean_rows
    plan = StreamPlan(backend, batch.labels, batch.row_ranges, end)
    tokens, positions, masked = batch.tokens, batch.positions, batch.masked[:, end:].flatten()
    with torch.no_grad():
        clean_TC, *clean_rotary = decoder.embed(tokens[:, :end].flatten(), positions[:, :end].flatten(), None)
    predicted_TC, *rotary = decoder.embed(tokens[:, end:].flatten(), positions[:, end:].flatten(), masked)
    for layer in decoder.layers:
        clean_attend, attend = plan.layer()
        # The number of a layer is for attends that serve all of them; one number means one compiled graph.
        with torch.no_grad():
            clean_TC = layer(clean_TC, *clean_rotary, clean_attend, 0, None)
        predicted_TC = layer(predicted_TC, *rotary, attend, 0, masked)
    parts = [part.unflatten(0, (len(tokens), -1)) for part in (clean_TC, predicted_TC)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def prepare_layers(transformer: Transformer, compile_layers: bool, checkpoint_activations: bool) -> None:
    """Compile each layer (all share one compiled graph), and recompute its activations in the backward pass."""
    for layer in transformer.model.layers:
        forward: Callable[..., Any] = layer.forward
        if compile_layers:
            forward = torch.compile(forward)
        if checkpoint_activations:
            forward = functools.partial(checkpoint, forward, use_reentrant=False)
        layer.forward = forward
