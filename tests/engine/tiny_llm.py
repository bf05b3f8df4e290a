# SPDX-License-Identifier: Apache-2.0
"""An ``LLM`` around a tiny random checkpoint on disk, whose tokens are mostly single ASCII characters."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from wedlm.engine.llm import LLM, GenerationOutput
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import ModelConfig, Tokenizer, Transformer, save_model

CHARACTERS = [chr(c) for c in range(33, 127)] + [
    "Ġ",
    "Ċ",
    "Ã",
    "©",
]  # byte-level for space, line feed and é's two bytes
END, USER, ASSISTANT, MASK = (len(CHARACTERS) + i for i in range(4))
VOCAB, LENGTH = MASK + 3, 128
SLOT_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values, layers, key heads, head dimension, float32
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS = ["Hello", "abc abc abc", "The quick brown fox jumps over the lazy dog.", "x", "1 2 3 4 5 6 7 8 9", "é caf"]


def tiny_tokenizer(chat: bool = True) -> Tokenizer:
    backend = Backend(BPE({c: i for i, c in enumerate(CHARACTERS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|end|>", "<|user|>", "<|assistant|>")])
    return Tokenizer(backend, {"default": CHAT_TEMPLATE} if chat else None, {"eos_token": "<|end|>"})


def save_tiny(directory: Path, chat: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """A WeDLM checkpoint, float32. Weights are large enough that predictions differ in confidence."""
    values: dict[str, Any] = {
        "model_type": "wedlm",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": LENGTH,
        "qk_norm": True,
        "mask_token_id": MASK,
        "eos_token_ids": (END,),
        "decoding": "auto",
    }
    config = ModelConfig(**{**values, **overrides})
    torch.manual_seed(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.35)
    save_model(model, config, directory)
    tiny_tokenizer(chat).save(directory)
    return directory


def check_empty(llm: LLM) -> None:
    """Nothing runs, waits or holds memory."""
    engine = llm.engine
    assert not engine.has_work
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert not engine.runner.windows.slots
    assert not engine.runner.windows.top_logprobs
    engine.pool.check_integrity()
    assert engine.pool.num_available == engine.pool.num_pages
    assert not llm._busy
    assert not llm._abandoned


def alone(llm: LLM, prompt: str | list[int], params: SamplingParams | None = None) -> GenerationOutput:
    """The output of one prompt with nothing beside it."""
    check_empty(llm)
    (output,) = llm.generate([prompt], params)
    check_empty(llm)
    return output
