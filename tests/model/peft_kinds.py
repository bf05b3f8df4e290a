# SPDX-License-Identifier: Apache-2.0
"""Kinds of LoRA that peft trains, with random values."""

from typing import Any

import torch

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# name -> (model, options of LoraConfig)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 3}),
    "all-tied": ("llama-tied", {"target_modules": ALL_LINEAR}),
    "qwen3": ("qwen3-wide-heads", {"target_modules": ALL_LINEAR, "bias": "none"}),
    "rank-stabilised": ("llama", {"target_modules": ALL_LINEAR, "use_rslora": True, "lora_alpha": 6}),
    "patterns": (
        "llama",
        {
            "target_modules": ALL_LINEAR,
            "rank_pattern": {"k_proj": 2, r"layers\.1\.mlp\..*": 6},
            "alpha_pattern": {"k_proj": 20, "self_attn.q_proj": 5},
        },
    ),
    "some-layers": ("llama", {"target_modules": ["down_proj"], "layers_to_transform": [1]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "token-rows": ("llama", {"target_modules": ["o_proj"], "trainable_token_indices": [7, 90, 5]}),
    "token-rows-tied": ("llama-tied", {"target_modules": ["o_proj"], "trainable_token_indices": [7, 90]}),
    "token-rows-by-module": (
        "llama",
        {"target_modules": ["o_proj"], "trainable_token_indices": {"embed_tokens": [7], "lm_head": [3, 8]}},
    ),
    "whole-modules": ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "biases": ("llama-biases", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
}


def trained(model: torch.nn.Module) -> None:
    """Give what peft would train random values: as it initialises them they change nothing."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
