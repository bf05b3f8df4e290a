# SPDX-License-Identifier: Apache-2.0
"""The only model: a Llama-style decoder over packed rows, whose attention is an argument.

Shape suffixes: T rows, L rows whose logits are wanted, C hidden size, D head dimension, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from wedlm.attention.base import Attend
from wedlm.model.config import ModelConfig
from wedlm.model.layers import DecoderLayer, RMSNorm
from wedlm.model.lora.masked_rows import Masked, put_at_masked
from wedlm.model.lora.row_factors import AdaptedRows
from wedlm.model.rope import RotaryEmbedding


class DecoderStack(nn.Module):
    """Embedding, layers and final norm. It is a separate class because checkpoints name these ``model.…``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        if not embedding.is_meta:  # Drawing on meta imports torch's compiler, over a second, and draws nothing.
            nn.init.normal_(embedding, std=0.02)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        # [C], what masked rows start from in place of their token's embedding; set with a LoRA for masked rows.
        self.mask_embedding: nn.Parameter | None = None
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        # Calls every n-th layer in a way of its own, torch.utils.checkpoint's for one; set by trainers.
        self.recompute: tuple[Callable[..., Tensor], int] | None = None

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, masked: Masked = None) -> Tensor:
        """Hidden states [T, C] after the last layer, before the final norm."""
        x_TC, cos_TD, sin_TD = self.embed(tokens_T, positions_T, masked)
        for layer, module in enumerate(self.layers):
            rest = (x_TC, cos_TD, sin_TD, attend, layer, masked)
            if self.recompute is None or layer % self.recompute[1]:
                x_TC = module(*rest)
            else:
                x_TC = self.recompute[0](module, *rest)
        return x_TC

    def embed(self, tokens_T: Tensor, positions_T: Tensor, masked: Masked) -> tuple[Tensor, Tensor, Tensor]:
        """What the layers take: embeddings [T, C], and RoPE's cosines and sines [T, D]."""
        x_TC = self.embed_tokens(tokens_T)
        if isinstance(masked, AdaptedRows):
            x_TC, masked = masked.embed(x_TC), masked.masked
        if masked is not None and self.mask_embedding is not None:
            x_TC = put_at_masked(x_TC, masked, self.mask_embedding)
        return x_TC, *self.rotary(positions_T, x_TC.dtype)


class AdapterSource(Protocol):
    """The adapters of a model: ``wedlm.model.inference.adapter_bank``."""

    version: int

    def rows(self, adapters_T: Tensor, masked: Tensor | None) -> AdaptedRows:
        """What layers must know about rows with these adapters, given their slots."""
        ...


class Transformer(nn.Module):
    """Rows in, logits out; its ``state_dict`` has exactly the tensor names of a Hugging Face checkpoint.

    The model knows nothing of sequences, caches or masks: rows are packed one after the other in any order, RoPE uses
    the position given for each, and ``attend`` decides which rows and cached keys a row sees.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.adapters: AdapterSource | None = None  # set where adapters are loaded by name

    def tie_weights(self) -> None:
        """Let the output projection share the embedding's parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
        adapters_T: Tensor | None = None,
    ) -> Tensor:
        """Logits [L, V] in the model's dtype.

        ``tokens_T`` and ``positions_T`` are int64 [T]. ``logits_rows``, int64 [L], picks the rows to project, in the
        wanted order; None means all rows. ``attend(layer, q_THD, k_TKD, v_TKD) -> out_THD`` gets RoPE already applied.
        ``masked`` (bool [T], or int64 [M] indices) says which rows are masked, which only matters if an adapter of
        masked rows is loaded; None means no row. ``adapters_T``, int64 [T], has the slot of each row's adapter, 0 for
        none; None means that no row has one.
        """
        rows: Masked = masked
        if adapters_T is not None:
            assert self.adapters is not None, "rows have adapters, and none was loaded"
            rows = self.adapters.rows(adapters_T, masked)
        hidden_TC = self.model(tokens_T, positions_T, attend, rows)
        return self.logits(hidden_TC if logits_rows is None else hidden_TC[logits_rows])

    def logits(self, hidden_LC: Tensor) -> Tensor:
        """Final norm and output projection of hidden states as ``model`` returns them: logits [L, V]."""
        if len(hidden_LC) == 0:
            # A prompt's chunk wants no logits; its step must not pay for reading the largest matrix.
            return hidden_LC.new_empty(0, self.config.vocab_size)
        return self.lm_head(self.model.norm(hidden_LC))
