# SPDX-License-Identifier: Apache-2.0
"""The model: its shape, its forward pass, its checkpoints and its tokenizer."""

from wedlm.model.config import ModelConfig, RopeScaling
from wedlm.model.errors import CheckpointError, DemoModelError
from wedlm.model.formats.checkpoint import load_model, save_model
from wedlm.model.formats.tokenizer import Tokenizer, load_tokenizer
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.transformer import Transformer

__all__ = [
    "CheckpointError",
    "DemoModelError",
    "ModelConfig",
    "RopeScaling",
    "Tokenizer",
    "Transformer",
    "load_model",
    "load_tokenizer",
    "pack_for_inference",
    "save_model",
]
