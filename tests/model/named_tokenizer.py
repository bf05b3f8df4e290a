# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint whose tokenizer GGUF has a name for."""

from pathlib import Path

import torch

from tests.engine.tiny_llm import CHARACTERS, save_tiny
from wedlm.model import ModelConfig, Tokenizer, load_model, save_model
from wedlm.model.formats.gguf_tokenizer import _pre_tokenizer

TEMPLATES = {"default": "{{ messages[0].content }}<|assistant|>", "tool_use": "{{ tools }}"}


def save_smollm_like(directory: Path, kind: str = "smollm", **changes) -> Path:
    """A WeDLM checkpoint with a tokenizer that GGUF has a name for, in bfloat16."""
    from tokenizers import AddedToken, decoders
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    directory = save_tiny(directory, **changes)
    vocab = {c: i for i, c in enumerate([*CHARACTERS, "th", "the"])}
    backend = Backend(BPE(vocab, [("t", "h"), ("th", "e")], ignore_merges=kind == "llama-bpe"))
    backend.pre_tokenizer, backend.decoder = _pre_tokenizer(kind), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|end|>", "<|assistant|>")])
    tokenizer = Tokenizer(backend, TEMPLATES, {"eos_token": "<|end|>"})
    tokenizer.save(directory)
    end = tokenizer.token_id("<|end|>")
    model, config = load_model(directory, torch.bfloat16)
    values = {**{name: getattr(config, name) for name in config.__slots__}, "eos_token_ids": (end, 5)}
    config = ModelConfig(**values)
    save_model(model, config, directory)
    return directory
