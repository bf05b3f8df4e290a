# SPDX-License-Identifier: Apache-2.0
"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from wedlm.train.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the trained parameters; vectors (norms, biases, the mask's own embedding) do not decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=device.type == "cuda",
    )


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """The rate of step 0 .. num_steps - 1: a linear warm-up from just above 0, then down to ``min_learning_rate``."""
    warmup = math.ceil(num_steps * config.warmup_ratio)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    left = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    low = config.min_learning_rate
    return low + (config.learning_rate - low) * left[config.lr_scheduler_type]
