# SPDX-License-Identifier: Apache-2.0
"""Models of common shapes with random weights: what a step costs does not depend on their values."""

from typing import Any

from wedlm.engine.random_model import random_model as random_model
from wedlm.model import ModelConfig

MASK_TOKEN_ID, END_TOKEN_ID, FIRST_TEXT_ID = 3, 2, 10
_COMMON = {"hidden_act": "silu", "eos_token_id": END_TOKEN_ID, "bos_token_id": 0, "mask_token_id": MASK_TOKEN_ID}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    },
    "qwen3-32b": {
        "model_type": "qwen3", "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 1e5,
    },
    "tiny": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1200,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    },
}  # fmt: skip


def shape_config(shape: str) -> ModelConfig:
    """The config of a shape. Raises ValueError naming the known shapes."""
    if shape not in SHAPES:
        raise ValueError(f"--shape is {shape!r}; expected one of {', '.join(SHAPES)}")
    return ModelConfig.from_hf({**_COMMON, **SHAPES[shape]})
