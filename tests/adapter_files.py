# SPDX-License-Identifier: Apache-2.0
"""Small random adapters on disk, in the forms that are served by name."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from wedlm.model import ModelConfig, Transformer
from wedlm.model.lora.masked_rows import MASK_EMBEDDING, MASKED_TYPE
from wedlm.model.lora.peft import CONFIG_FILE, MASKED_FOLDER, WEIGHTS_FILE

KINDS = ("lora", "masked", "both")


def write_adapter(directory: Path, config: ModelConfig, kind: str, seed: int, rank: int = 4, size: float = 0.3) -> Path:
    """A random adapter of that kind for a model of ``config``; the larger ``size``, the larger the change. Its
    directory."""
    if kind == "both":
        write_adapter(directory, config, "lora", seed, rank, size)
        write_adapter(directory / MASKED_FOLDER, config, "masked", seed + 1000, rank, size)
        return directory
    rng = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(config)
    prefix = "masked_" if kind == "masked" else ""
    tensors = {}
    for name, weight in model.named_parameters():
        if name.startswith("model.layers.") and name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.{prefix}lora_A.weight"] = size * torch.randn(rank, weight.shape[1], generator=rng)
            tensors[f"{module}.{prefix}lora_B.weight"] = size * torch.randn(weight.shape[0], rank, generator=rng)
    if kind == "masked":
        tensors[f"base_model.model.{MASK_EMBEDDING}"] = torch.randn(config.hidden_size, generator=rng)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE)
    peft_type = MASKED_TYPE if kind == "masked" else "LORA"
    config_file = {"peft_type": peft_type, "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "bias": "none"}
    (directory / CONFIG_FILE).write_text(json.dumps(config_file), encoding="utf-8")
    return directory
