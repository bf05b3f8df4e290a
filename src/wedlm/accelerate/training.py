# SPDX-License-Identifier: Apache-2.0
"""Stage 3: run the trainer. This module makes its configuration and writes it next to the results, for you to read or
to give to ``wedlm train``."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from wedlm.accelerate.settings import Settings
from wedlm.engine.factory import release_memory
from wedlm.engine.resolve_options import make_current
from wedlm.train.config import TrainConfig, load_config
from wedlm.train.trainer import Trainer

_EPOCHS = {"cpu": 3.0, "cuda": 12.0}  # an epoch of 2,000 answers takes two hours there, seconds here
# Settings that a run cannot have otherwise, and those that it makes itself.
_OURS = {
    "model_path": "MODEL",
    "output_dir": "--output",
    "train_data": "--prompts or --data",
    "objective": "nothing else: masked rows are trained",
    "lora_rows": "nothing else: masked rows are trained",
    "merge_lora": "nothing else: masked rows are trained",
    "enable_ar_loss": "nothing else: masked rows are trained",
    "mask_token_id": "--mask-token-id",
    "lora_rank": "--rank",
    "block_size": "--block-size",
    "learning_rate": "--learning-rate",
    "num_train_epochs": "--epochs",
    "max_steps": "--steps",
}


def training_config(
    settings: Settings, data: Path, output: Path, mask_token_id: int, longest: int, device: torch.device
) -> TrainConfig:
    """Make the trainer's configuration; ``longest`` is the model's length. Raises ValueError.

    The settings it shares with recipes/smollm2_135m/masked_lora.yaml were measured there; lengths and batches fit the
    device.
    """
    on_gpu = device.type == "cuda"
    processes = num_processes(settings, device)
    values: dict[str, Any] = {
        "model_path": settings.model,
        "objective": "wedlm",
        "output_dir": str(output),
        "cache_dir": str(output / "tokens"),
        "train_data": [str(data)],
        "mask_token_id": mask_token_id,
        "block_size": settings.block_size,
        "suffix_noise": 1.0,
        "entropy_weight": 1.0,
        "enable_ar_loss": False,
        "lora_rank": settings.lora_rank,
        "lora_rows": "masked",
        "merge_lora": False,
        "learning_rate": settings.learning_rate,
        "min_learning_rate": settings.learning_rate / 30,
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "num_train_epochs": settings.epochs or _EPOCHS.get(device.type, _EPOCHS["cpu"]),
        "max_steps": settings.steps or 0,
        "max_seq_length": min(1024 if on_gpu else 512, longest),
        "per_device_train_batch_size": 4 if on_gpu else 1,
        "gradient_accumulation_steps": max(1, (16 if on_gpu else 4) // ((4 if on_gpu else 1) * processes)),
        "bf16": on_gpu,
        "seed": settings.seed,
        "logging_steps": 10 if on_gpu else 5,
        "save_steps": 100 if on_gpu else 10,
        "save_total_limit": 1,
        "save_dtype": "float32",
        "tensorboard": False,
    }
    for name in settings.trainer:
        if name in _OURS:
            raise ValueError(f"--set {name} is given, which this command decides; expected {_OURS[name]}")
    return load_config(None, {**values, **settings.trainer})


def num_processes(settings: Settings, device: torch.device) -> int:
    """One process for each GPU, unless the user says otherwise."""
    if settings.processes is not None:
        return settings.processes
    return torch.cuda.device_count() if str(device) == "cuda" else 1


def train(config: TrainConfig, file: Path, device: torch.device, processes: int) -> Path:
    """Train, or continue training, and return the adapter's directory. Raises ValueError, and KeyboardInterrupt after
    Ctrl-C; a single process has then saved a checkpoint."""
    file.write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")
    if processes > 1:
        _launch(file, device, processes)
        return Path(config.output_dir) / "final"
    try:
        with _trains_on(device):
            return Trainer(config).run()
    finally:
        release_memory()  # of the trainer and its optimiser, which an engine wants next


@contextmanager
def _trains_on(device: torch.device) -> Iterator[None]:
    """Make accelerate train on this kind of device. By itself it takes a GPU if there is one, unless the environment
    says otherwise."""
    before = os.environ.get("ACCELERATE_USE_CPU")
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    make_current(device)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("ACCELERATE_USE_CPU", None)
        else:
            os.environ["ACCELERATE_USE_CPU"] = before


def _launch(file: Path, device: torch.device, processes: int) -> None:
    """Run ``wedlm train`` in this many processes, through accelerate's launcher."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--cpu", "--num_cpu_threads_per_process", "1"] if device.type == "cpu" else ["--multi_gpu"]
    code = subprocess.run([*command, "-m", "wedlm.train", str(file)], check=False).returncode
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise ValueError(
            f"training in {processes} processes ended with exit code {code}, see their messages above; the same "
            "command continues from the last checkpoint"
        )


def copy_adapter(final: Path, target: Path) -> None:
    """Copy the finished adapter in one step, so that ``target`` is complete or does not exist."""
    building = target.with_name(f".{target.name}")
    shutil.rmtree(building, ignore_errors=True)
    shutil.copytree(final, building)
    shutil.rmtree(target, ignore_errors=True)
    building.replace(target)
