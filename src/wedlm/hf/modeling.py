# SPDX-License-Identifier: Apache-2.0
"""``WeDLMForCausalLM``: the one model as a ``PreTrainedModel``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from wedlm.algorithm.dual_stream import RowLabels
from wedlm.hf.attend import PaddedCausalAttend, real_rows
from wedlm.hf.configuration import WeDLMConfig
from wedlm.hf.generation import generate
from wedlm.hf.masked_training import IGNORED, masked_loss, take_row_labels, training_attend
from wedlm.model.layers import Attend
from wedlm.model.rope import RotaryEmbedding, inverse_frequencies
from wedlm.model.transformer import DecoderStack


class WeDLMModel(DecoderStack):
    """The model without its output projection. The engine calls it with rows; transformers, and trainers that project
    hidden states themselves, call it with ``input_ids``."""

    def forward(self, *rows: Any, input_ids: Tensor | None = None, **batch: Any) -> Any:
        """``DecoderStack.forward`` of ``rows``; or, for ``input_ids`` [N, R], hidden states [N, R, C] after the final
        norm as ``last_hidden_state``, with the arguments of ``WeDLMForCausalLM.forward``."""
        if input_ids is None:
            return super().forward(*rows, **batch)
        row_labels = take_row_labels(batch)
        if batch.pop("loss_coefficient", None) is not None and torch.is_grad_enabled():
            raise ValueError(
                "the batch is a WeDLMCollator's, and the trainer adds up losses itself; expected "
                "compute_loss_func=masked_loss"
            )
        mask, positions = batch.pop("attention_mask", None), batch.pop("position_ids", None)
        hidden = self.of_batch(input_ids, mask, positions, row_labels)
        _check_unsupported("WeDLMModel", batch)
        return BaseModelOutput(last_hidden_state=self.norm(hidden))

    def of_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        row_labels: RowLabels | None = None,
    ) -> Tensor:
        """Hidden states [N, R, C] before the final norm. With ``row_labels`` these, and not the mask, say which rows
        see each other."""
        real = real_rows(input_ids, attention_mask)
        positions = _positions(input_ids, real, position_ids)
        attend = PaddedCausalAttend(len(input_ids), real) if row_labels is None else training_attend(row_labels)
        return self(input_ids.flatten(), positions.flatten(), attend).unflatten(0, input_ids.shape)


class WeDLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A model whose parameters have the names and values of the checkpoint. Call it for training and AR scoring; decode
    with ``generate``, which is this package's and takes this package's options."""

    config_class = WeDLMConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - the base class declares it so
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    generate = generate  # type: ignore[assignment]

    def __init__(self, config: WeDLMConfig) -> None:
        super().__init__(config)
        sizes = config.model_config()
        self.model = WeDLMModel(sizes)
        self.lm_head = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> "WeDLMForCausalLM":
        """Load a model as in transformers, from directories and hub ids of every model type that this package reads.

        It only reads safetensors. Saving writes the model type that was read.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError(f"use_safetensors is {kwargs['use_safetensors']!r}; expected True: pickles are not read")
        if not isinstance(config, WeDLMConfig):
            where = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs}
            values, _ = WeDLMConfig.get_config_dict(pretrained_model_name_or_path, **where)
            config = WeDLMConfig.from_dict(values if config is None else config.to_dict())
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **rest: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits [N, R, V] of ``input_ids`` [N, R], causal over rows whatever their positions.

        ``attention_mask`` [N, R] is 0 for padding, on either side. ``position_ids`` [N, R] or [R] (for RoPE) may come
        in any order, as topological reordering needs; by default real rows count from 0. ``labels`` [N, R] give the
        shifted AR loss over rows (-100: not counted). ``logits_to_keep``: return only the last so many rows' logits.

        A batch from ``WeDLMCollator`` (whose special entries are in ``rest``) gives the loss of both streams and no
        logits.
        """
        row_labels = take_row_labels(rest)
        if row_labels is not None:
            rows = self.model.of_batch(input_ids, attention_mask, position_ids, row_labels)
            output = CausalLMOutput(
                loss=self._loss_of_rows(rows, rest.pop("shift_labels"), rest.pop("loss_coefficient"))
            )
            _check_unsupported(type(self).__name__, rest)
            if labels is not None:  # otherwise the caller's masked_loss does it
                output.loss = masked_loss(output, labels, num_items_in_batch)
            return output if return_dict is not False else output.to_tuple()
        _check_unsupported(type(self).__name__, rest)
        hidden = self.model.of_batch(input_ids, attention_mask, position_ids)
        logits = self.lm_head(self.model.norm(hidden[:, -logits_to_keep:] if logits_to_keep else hidden))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        output = CausalLMOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()

    def _loss_of_rows(self, hidden_NRC: Tensor, targets_NR: Tensor, coefficients_NR: Tensor) -> Tensor:
        """Σ coefficient · cross-entropy over the rows with a target."""
        counts = targets_NR != IGNORED
        logits_KV = self.lm_head(self.model.norm(hidden_NRC[counts]))
        entropies_K = nn.functional.cross_entropy(logits_KV.float(), targets_NR[counts], reduction="none")
        return (entropies_K * coefficients_NR[counts]).sum()

    def rows(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Tensor:
        """``Transformer.forward`` over this model's modules, which the engine calls."""
        hidden_TC = self.model(tokens_T, positions_T, attend, masked)
        hidden_LC = hidden_TC if logits_rows is None else hidden_TC[logits_rows]
        return self.lm_head(self.model.norm(hidden_LC))

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Tensor] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        self.gradient_checkpointing = enable  # where transformers looks
        self.model.recompute = (gradient_checkpointing_func, every_n_layers) if enable else None

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers loads into a model without memory and then leaves unsaved buffers as they happen to be.
        if isinstance(module, RotaryEmbedding):
            module.inv_freq = inverse_frequencies(self.config.model_config())[0].to(module.inv_freq.device)


_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


def _check_unsupported(name: str, given: Mapping[str, Any]) -> None:
    for option, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"{option} is {value!r}, which {name} does not support; expected None")


def _positions(input_ids: Tensor, real: Tensor | None, position_ids: Tensor | None) -> Tensor:
    if position_ids is not None:
        if position_ids.shape not in (input_ids.shape, input_ids.shape[1:], (1, input_ids.shape[1])):
            shapes = (list(position_ids.shape), list(input_ids.shape))
            raise ValueError(f"position_ids has shape {shapes[0]}; expected {shapes[1]}, that of input_ids")
        return position_ids.expand(input_ids.shape)
    if real is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    return (real.long().cumsum(1) - 1).clamp(min=0)
