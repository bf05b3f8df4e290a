# SPDX-License-Identifier: Apache-2.0
"""What a run starts from (model, tokenizer, data) and what it ends with (a directory that loads everywhere)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from wedlm.model import Tokenizer, load_model, load_tokenizer
from wedlm.model.checkpoint import save_tensors
from wedlm.model.config import ModelConfig
from wedlm.model.transformer import Transformer
from wedlm.train.config import TrainConfig
from wedlm.train.data import PackedData, load_data
from wedlm.train.lora import add_lora, merged_tensors, save_adapter


@dataclass(frozen=True)
class Setup:
    """``model_config`` is that of the result: it records the mask token and, for WeDLM, the block size."""

    config: TrainConfig
    model_config: ModelConfig
    transformer: Transformer
    tokenizer: Tokenizer
    mask_token_id: int
    train_data: PackedData
    validation_data: PackedData | None

    @property
    def embeddings_frozen(self) -> bool:
        return self.config.lora_rank > 0 or not self.config.train_embeddings

    @classmethod
    def load(cls, config: TrainConfig, accelerator: Accelerator) -> "Setup":
        """Everything read and checked before a step is paid for. ValueError (or CheckpointError) in one sentence."""
        # Trained weights are float32, whatever precision computes; under LoRA the base is only read.
        base = torch.bfloat16 if config.lora_rank and accelerator.mixed_precision == "bf16" else torch.float32
        transformer, model_config = load_model(config.model_path, base)
        tokenizer = load_tokenizer(config.model_path)
        if config.max_seq_length > model_config.max_length:
            raise ValueError(
                f"max_seq_length is {config.max_seq_length}; expected at most the model's {model_config.max_length}"
            )
        wedlm = config.objective == "wedlm"
        mask = config.mask_token_id if config.mask_token_id is not None else model_config.mask_token_id
        assert mask is not None
        if wedlm and not model_config.is_wedlm:
            with torch.no_grad():
                embedding = transformer.model.embed_tokens.weight
                embedding[mask] = embedding.mean(dim=0)
        if wedlm:
            model_config = dataclasses.replace(model_config, mask_token_id=mask, block_size=config.block_size)
        train_data, validation_data = load_data(config, tokenizer, model_config, mask)
        transformer.train()
        if config.lora_rank:
            add_lora(transformer, config)
        elif not config.train_embeddings:
            for module in (transformer.model.embed_tokens, transformer.lm_head):
                module.weight.requires_grad_(False)
        return cls(config, model_config, transformer, tokenizer, mask, train_data, validation_data)


def save_result(setup: Setup, accelerator: Accelerator, model: nn.Module, directory: Path) -> Path:
    """Write the trained model (or, for LoRA that is not merged, the adapter) with its tokenizer. All ranks call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(accelerator.unwrap_model(model), options=options)
    if accelerator.is_main_process:
        mask_embedding = gathered.pop("mask_embedding", None)
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in gathered.items()}
        if setup.config.lora_rank and not setup.config.merge_lora:
            save_adapter(tensors, mask_embedding, setup, directory)
        else:
            merged = merged_tensors(tensors, setup.config) if setup.config.lora_rank else tensors
            _save_model(merged, mask_embedding, setup, directory)
        setup.tokenizer.save(directory)
    accelerator.wait_for_everyone()
    return directory


def _save_model(tensors: dict[str, Tensor], mask_embedding: Tensor | None, setup: Setup, directory: Path) -> None:
    if mask_embedding is not None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][setup.mask_token_id] = mask_embedding.to(tensors[name].dtype)
    dtype = getattr(torch, setup.config.save_dtype)
    save_tensors({name: tensor.to(dtype) for name, tensor in tensors.items()}, setup.model_config, directory)
