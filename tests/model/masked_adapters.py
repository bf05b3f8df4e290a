# SPDX-License-Identifier: Apache-2.0
"""Small adapters of masked rows, as the trainer writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wedlm.model import Transformer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def random_lora(model: Transformer, rank: int = 3, layers: str = "proj.weight") -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(5)
    return {
        name: (0.3 * torch.randn(rank, weight.shape[1]), 0.3 * torch.randn(weight.shape[0], rank))
        for name, weight in model.named_parameters()
        if name.endswith(layers) and name.startswith("model.layers.")
    }


def write_adapter(directory: Path, model: Transformer, alpha: float = 6.0) -> Path:
    """What the trainer writes: matrices of rank 3, scaled by alpha / 3."""
    tensors = {f"{PREFIX}model.mask_embedding": torch.linspace(-1, 1, model.config.hidden_size)}
    for weight, (a, b) in random_lora(model).items():
        module = PREFIX + weight.removesuffix(".weight")
        tensors |= {f"{module}.masked_lora_A.weight": a, f"{module}.masked_lora_B.weight": b}
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / WEIGHTS)
    values = {"peft_type": "MASKED_LORA", "r": 3, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (directory / CONFIG).write_text(json.dumps(values))
    return directory
