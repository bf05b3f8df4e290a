# SPDX-License-Identifier: Apache-2.0
"""A tiny AR checkpoint that has learnt fifty answers, so that its greedy answers end, and a file of its questions."""

import sys
from pathlib import Path

from typer.testing import Result

from tests.cli.command import wedlm
from tests.train.tiny_run import questions, save_base, train, write_chats

FAST = ["--device", "cpu", "--threads", "1"]
SMALL = ["--max-tokens", "32", "--rank", "8", "--block-size", "8", "--learning-rate", "1e-2", "--held-out", "6"]
SHORT = ["--steps", "12", "--set", "max_seq_length=128", "--set", "save_steps=4"]


def make_base(directory: Path) -> tuple[Path, Path]:
    """(checkpoint, file of prompts)"""
    raw = save_base(directory / "raw", hidden_size=64, mask_token_id=None)
    options = {"objective": "autoregressive", "max_steps": 50, "learning_rate": 6e-3, "max_seq_length": 128}
    batch = {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "warmup_ratio": 0.05,
        "weight_decay": 0.0,
    }
    base = train(raw, write_chats(directory / "data.jsonl", 50), directory / "ar", **options, **batch, logging_steps=40)
    prompts = directory / "prompts.txt"
    prompts.write_text("".join(f"{question}\n" for question, _ in questions(50)))
    return base, prompts


def words(base: Path, output: Path, *more: str | Path) -> list[str]:
    return ["accelerate", str(base), "--output", str(output), *FAST, *SMALL, *SHORT, *map(str, more)]


def accelerate(base: Path, output: Path, *more: str | Path) -> Result:
    return wedlm(*words(base, output, *more))


def killed_at(place: str, count: int, *arguments: str) -> list[str]:
    """A command that runs ``wedlm`` and kills itself at the ``count``-th call of a function: module:name."""
    module, name = place.split(":")
    program = (
        "import functools, importlib, os, signal, sys, torch\n"
        "torch.set_num_threads(1)\n"
        f"owner = importlib.import_module({module!r})\n"
        f"*path, name = {name!r}.split('.')\n"
        "for part in path: owner = getattr(owner, part)\n"
        "inner, calls = getattr(owner, name), [0]\n"
        "def outer(*a, **k):\n"
        "    calls[0] += 1\n"
        f"    if calls[0] == {count}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return inner(*a, **k)\n"
        "setattr(owner, name, outer)\n"
        "from wedlm.cli import main; main()"
    )
    return [sys.executable, "-c", program, *arguments]
