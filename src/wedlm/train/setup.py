# SPDX-License-Identifier: Apache-2.0
"""What a run starts from (model, tokenizer, data) and what it ends with (a directory that loads everywhere)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from wedlm.model import Tokenizer, load_model, load_tokenizer
from wedlm.model.config import ModelConfig
from wedlm.model.formats.checkpoint import save_tensors
from wedlm.model.init_checkpoint import check_mask_token_id, choose_mask_token_id, mean_of_others, set_mask_embedding
from wedlm.model.transformer import Transformer
from wedlm.train.config import TrainConfig
from wedlm.train.data import PackedData, load_data
from wedlm.train.lora import add_lora, add_masked_lora, merged_tensors, save_adapter
from wedlm.train.metrics import token_progress


@dataclass(frozen=True)
class Setup:
    """``model_config`` is that of the result: for WeDLM it records mask token and block size. In AR training
    ``mask_token_id`` is -1, which is no token. ``teacher_model`` is the config's, frozen."""

    config: TrainConfig
    model_config: ModelConfig
    transformer: Transformer
    teacher_model: Transformer | None
    tokenizer: Tokenizer
    mask_token_id: int
    train_data: PackedData
    validation_data: PackedData | None

    @property
    def embeddings_frozen(self) -> bool:
        return self.config.lora_rank > 0 or not self.config.train_embeddings

    @classmethod
    def load(cls, config: TrainConfig, accelerator: Accelerator) -> "Setup":
        """Read and check everything before any step is run. Raises ValueError (or CheckpointError) in one sentence."""
        # Trained weights are float32, whatever precision computes; under LoRA the base is only read.
        base = torch.bfloat16 if config.lora_rank and config.bf16 else torch.float32
        transformer, model_config = load_model(config.model_path, base)
        if model_config.sees_by_block:
            raise ValueError(
                f"model_path is {config.model_path}, of type {model_config.model_type!r}; expected a causal "
                "model, whose weights the dual-stream objective trains"
            )
        tokenizer = load_tokenizer(config.model_path)
        if config.max_seq_length > model_config.max_length:
            raise ValueError(
                f"max_seq_length is {config.max_seq_length}; expected at most the model's {model_config.max_length}"
            )
        teacher_model = _load_teacher(config, model_config)
        mask, base_config = -1, model_config  # no token
        if config.objective == "wedlm":
            model_config = _with_mask_token(transformer, model_config, tokenizer, config)
            mask = model_config.mask_token_id if model_config.mask_token_id is not None else mask
        with token_progress() as progress:
            train_data, validation_data = load_data(config, tokenizer, model_config, mask, progress)
        transformer.train()
        if config.lora_rank:
            torch.manual_seed(config.seed)  # a LoRA starts the same in every process and every run
            if config.lora_rows == "masked":
                add_masked_lora(transformer, config, _first_mask_embedding(transformer, base_config, mask, tokenizer))
            else:
                add_lora(transformer, config)
        elif not config.train_embeddings:
            for module in (transformer.model.embed_tokens, transformer.lm_head):
                module.weight.requires_grad_(False)
        return cls(config, model_config, transformer, teacher_model, tokenizer, mask, train_data, validation_data)


def _load_teacher(config: TrainConfig, model_config: ModelConfig) -> Transformer | None:
    if config.teacher_model is None:
        return None
    teacher, teacher_config = load_model(config.teacher_model, torch.bfloat16 if config.bf16 else torch.float32)
    if teacher_config.vocab_size != model_config.vocab_size or teacher_config.max_length < config.max_seq_length:
        raise ValueError(
            f"teacher_model is {config.teacher_model!r}, of {teacher_config.vocab_size} tokens and length "
            f"{teacher_config.max_length}; expected {model_config.vocab_size} tokens and max_seq_length "
            f"({config.max_seq_length}) at least"
        )
    teacher.requires_grad_(False)
    return teacher


def _with_mask_token(
    transformer: Transformer, model_config: ModelConfig, tokenizer: Tokenizer, config: TrainConfig
) -> ModelConfig:
    """The config with a mask token and a block size. A mask token that was never trained gets its embedding.

    Raises ValueError if text needs the token that ``config`` names.
    """
    known, asked = model_config.mask_token_id, config.mask_token_id
    mask = known if asked is None else asked
    if mask is None:
        mask = choose_mask_token_id(model_config, tokenizer)
    if not (model_config.is_wedlm and mask == known):
        check_mask_token_id(mask, model_config, tokenizer)
        if config.lora_rows == "masked":  # whose base stays as it is
            return dataclasses.replace(model_config, mask_token_id=mask, block_size=config.block_size)
        weight = transformer.lm_head.get_parameter("weight")
        frozen = config.lora_rank > 0 or not config.train_embeddings
        output_row = weight.detach()[mask].clone() if frozen and not model_config.tie_word_embeddings else None
        set_mask_embedding(transformer, mask, min(tokenizer.vocab_size, model_config.vocab_size))
        if output_row is not None:  # of what is frozen, the mask's embedding alone changes: an adapter holds no more
            with torch.no_grad():
                weight[mask] = output_row
    return dataclasses.replace(model_config, mask_token_id=mask, block_size=config.block_size)


def _first_mask_embedding(transformer: Transformer, base: ModelConfig, mask: int, tokenizer: Tokenizer) -> Tensor:
    """What masked rows start from: the base's mask embedding if it has a trained one, else the mean of its tokens'."""
    weight = transformer.model.embed_tokens.weight.detach()
    if base.is_wedlm and mask == base.mask_token_id:
        return weight[mask].float()
    return mean_of_others(weight, mask, min(tokenizer.vocab_size, base.vocab_size))


def save_result(setup: Setup, accelerator: Accelerator, model: nn.Module, directory: Path) -> Path:
    """Write the trained model (or, for LoRA that is not merged, the adapter) with its tokenizer. All ranks call it.

    Raises ValueError if it cannot be written.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered: Any = get_model_state_dict(accelerator.unwrap_model(model), options=options)
    if accelerator.is_main_process:
        mask_embedding = gathered.pop("mask_embedding", None)
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in gathered.items()}
        try:
            _write_result(tensors, mask_embedding, setup, directory)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{directory} cannot be written ({error}); the last checkpoint is complete: with room on the disk the "
                "same command writes the result"
            ) from error
    accelerator.wait_for_everyone()
    return directory


def _write_result(tensors: dict[str, Tensor], mask_embedding: Tensor | None, setup: Setup, directory: Path) -> None:
    if setup.config.lora_rank and not setup.config.merge_lora:
        save_adapter(tensors, mask_embedding, setup.config, setup.model_config, directory)
    else:
        merged = merged_tensors(tensors, setup.config) if setup.config.lora_rank else tensors
        _save_model(merged, mask_embedding, setup, directory)
    setup.tokenizer.save(directory)


def _save_model(tensors: dict[str, Tensor], mask_embedding: Tensor | None, setup: Setup, directory: Path) -> None:
    if mask_embedding is not None:
        name = "model.embed_tokens.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][setup.mask_token_id] = mask_embedding.to(tensors[name].dtype)
    dtype = getattr(torch, setup.config.save_dtype)
    save_tensors({name: tensor.to(dtype) for name, tensor in tensors.items()}, setup.model_config, directory)
