# SPDX-License-Identifier: Apache-2.0
"""Tiny random models in pairs: transformers' and ours, with equal weights."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from wedlm.model import ModelConfig, Transformer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# name -> (model type of the twin in transformers, its config, what the WeDLM config says instead)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("qwen2", {}, {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}, {}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 16}, {}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True}, {}),
    "llama": ("llama", {}, {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "llama3-rope": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, {}),
    "linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {}),
    "yarn-rope": ("qwen2", {"rope_theta": 1e6, "rope_scaling": YARN_ROPE, "max_position_embeddings": 32768}, {}),
    "wedlm-qwen2.5": ("qwen2", {"rope_theta": 1e6}, {"attention_bias": True, "qk_norm": False, "mask_token_id": 90}),
    "wedlm-qwen3": ("qwen3", {"head_dim": 16}, {"attention_bias": False, "qk_norm": True, "mask_token_id": 90}),
}


def hf_config(name: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of our side of a case."""
    twin, overrides, wedlm = copy.deepcopy(CASES[name])
    values = {**_SHAPE, "model_type": twin, **overrides, **changes}
    return {**values, **wedlm, "model_type": "wedlm"} if wedlm else values


def hf_model(name: str, **changes: Any) -> PreTrainedModel:
    """The twin in transformers, float32, with random weights, norms and biases."""
    twin, overrides, _ = copy.deepcopy(CASES[name])  # transformers writes into the dictionaries it is given
    config = AutoConfig.for_model(twin, **{**_SHAPE, **overrides, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in parameter_name else 0.0, std=0.2)
    return model


def our_model(name: str, **changes: Any) -> Transformer:
    """Our side of a case with the twin's weights; ``changes`` of both configs."""
    model = Transformer(ModelConfig.from_hf(hf_config(name, **changes))).eval()
    model.load_state_dict(hf_model(name, **changes).state_dict())
    return model


def causal_attend(layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    """All rows are one sequence; each sees itself and the rows before it."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def logits_of(model: Transformer, tokens: list[int] | Tensor) -> Tensor:
    """Logits [T, V] of one sequence at positions 0, 1, 2, …"""
    tokens_T = torch.as_tensor(tokens)
    with torch.inference_mode():
        return model(tokens_T, torch.arange(len(tokens_T)), causal_attend)


def rewrite(path: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a file by name; None drops one."""
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)
