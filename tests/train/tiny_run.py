# SPDX-License-Identifier: Apache-2.0
"""A tiny AR checkpoint with a chat tokenizer, a small chat file, and runs of the trainer over them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train.chat_data import chat_tokenizer
from wedlm.model import ModelConfig, Transformer, save_model
from wedlm.train.config import TrainConfig, load_config
from wedlm.train.trainer import Trainer

# Words that are single tokens of the tests' tokenizer.
WORDS = ("cat", "mat", "one", "two", "three", "sat", "on")


def questions(count: int) -> list[tuple[str, str]]:
    """(question, answer) pairs in which every answer is another one; letters of a question stand for words."""
    pairs = []
    for i in range(count):
        first, second, times = i % 7, i // 7 % 7, i % 3
        question = f"box {'abcdefg'[first]} {'abcdefg'[second]} {'xyz'[times]}"
        pairs.append((question, f"it is {WORDS[first]} and {WORDS[second]}" + " really" * times))
    return pairs


def write_chats(path: Path, count: int) -> Path:
    rows = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in questions(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def add_texts(path: Path) -> Path:
    """Plain text at the end of a file."""
    with path.open("a") as file:
        file.writelines(json.dumps({"text": "one two three cat sat on mat " * n}) + "\n" for n in (1, 2, 3))
    return path


def save_base(directory: Path, hidden_size: int = 32, num_layers: int = 2, **overrides: Any) -> Path:
    """An AR checkpoint of random weights whose mask token would be <|unused|>."""
    tokenizer = chat_tokenizer()
    end = tokenizer.token_id("<|im_end|>")
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": tokenizer.backend.get_vocab_size() + 4,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_layers": num_layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": hidden_size // 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_ids": (end,),
        "mask_token_id": tokenizer.token_id("<|unused|>"),
    }
    config = ModelConfig(**{**values, **overrides})
    torch.manual_seed(0)
    save_model(Transformer(config), config, directory)
    tokenizer.save(directory)
    return directory


def config_of(base: Path, data: Path, output: Path, **settings: Any) -> TrainConfig:
    """A short float32 run on the CPU; ``settings`` override."""
    values = {
        "model_path": str(base),
        "train_data": str(data),
        "output_dir": str(output),
        "cache_dir": str(output.parent / "cache"),
        "max_seq_length": 64,
        "block_size": 8,
        "suffix_noise": 0.5,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 100,
        "save_dtype": "float32",
        "bf16": False,
        "tensorboard": False,
    }
    return load_config(None, {**values, **settings})


def train(base: Path, data: Path, output: Path, **settings: Any) -> Path:
    return Trainer(config_of(base, data, output, **settings)).run()


class StopHereError(Exception):
    """A run that ends in the middle."""


def stop_here(trainer: Trainer) -> None:
    raise StopHereError


def poison(trainer: Trainer) -> None:
    """From now on losses are no numbers."""
    with torch.no_grad():
        next(trainer.model.parameters())[5:] = torch.nan


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[Trainer], object]) -> None:
    """What happens before step ``number``, counted from 0, of every run from now on."""
    step = Trainer._step

    def patched(self: Trainer, at: int, micro_batches: Any) -> Any:
        if at == number:
            happens(self)
        return step(self, at, micro_batches)

    monkeypatch.setattr(Trainer, "_step", patched)


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def metrics(output: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Records without what depends on the clock."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows if row["kind"] == kind]
