# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: complete or absent, safetensors and JSON alone, and enough to go on as if nothing had happened.

There is no random state to save: data order, noise and dropout are functions of (seed, step).
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

_PREFIX = "checkpoint-"
_MODEL, _OPTIMIZER, _STATE = "training_model.safetensors", "optimizer.safetensors", "trainer_state.json"
# Gathered from all ranks, onto rank 0's main memory: the same file whatever the parallelism.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def save_checkpoint(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    is_main: bool,
    keep: int,
) -> None:
    """Write ``checkpoint-STEP`` under ``directory`` and drop the oldest beyond ``keep``. All ranks call it.

    It is built beside its place and renamed: a full disk or a kill leaves the previous checkpoint as it was. Raises
    ValueError if it cannot be written.
    """
    tensors = get_model_state_dict(model, options=_WHOLE)
    moments = get_optimizer_state_dict(model, optimizer, options=_WHOLE)["state"]
    if not is_main:
        return
    target = directory / f"{_PREFIX}{step:06d}"
    building = directory / f".{target.name}.{os.getpid()}"
    try:
        building.mkdir(parents=True)
        save_file(_distinct(tensors), building / _MODEL)
        flat = {f"{name}/{key}": value for name, values in moments.items() for key, value in values.items()}
        save_file(_distinct(flat), building / _OPTIMIZER)
        (building / _STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n", encoding="utf-8")
        for path in building.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        building.replace(target)
    except Exception as error:  # safetensors has its own type for a full disk
        raise ValueError(f"{target} cannot be written ({error}); earlier checkpoints are as they were") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    return (_checkpoints(directory) or [None])[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` was given as ``state``, and ``step``."""
    return json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back. All ranks call it; every rank reads the files."""
    tensors = load_file(checkpoint / _MODEL)
    missing = set(get_model_state_dict(model)) - set(tensors)
    shared = {name for name in missing if name.endswith("lm_head.weight")}  # tied: saved once, under the other name
    if missing - shared:
        raise ValueError(f"{checkpoint} lacks {min(missing - shared)}; expected a checkpoint of this model and config")
    for name in shared:
        tensors[name] = tensors[name.removesuffix("lm_head.weight") + "model.embed_tokens.weight"]
    set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True))
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(checkpoint / _OPTIMIZER).items():
        name, _, moment = key.rpartition("/")
        state.setdefault(name, {})[moment] = value
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(
        model,
        optimizer,
        {"state": state, "param_groups": whole["param_groups"]},
        options=StateDictOptions(full_state_dict=True),
    )


def _checkpoints(directory: Path) -> list[Path]:
    found = [path for path in directory.glob(f"{_PREFIX}*") if (path / _STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors; of tied ones the first name alone, since a file holds no tensor twice."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.detach().contiguous()
    return kept
