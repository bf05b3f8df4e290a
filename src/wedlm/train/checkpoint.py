# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: complete or absent, only safetensors and JSON, and enough to continue as if nothing had
happened.

No random state has to be saved, because data order, noise and dropout are functions of (seed, step).
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from wedlm.train import deepspeed

_PREFIX = "checkpoint-"
_MODEL, _OPTIMIZER, _STATE = "training_model.safetensors", "optimizer.safetensors", "trainer_state.json"
# Gathered from all ranks, onto rank 0's main memory: the same file whatever the parallelism.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    is_main: bool,
    keep: int,
) -> None:
    """Write ``checkpoint-STEP`` under ``directory`` and remove the oldest beyond ``keep``. All ranks call it.

    It is built under a temporary name and then renamed, so a full disk or a kill leaves the previous checkpoint
    untouched. Raises ValueError if it cannot be written.
    """
    tensors, moments = _whole_state(model, optimizer)
    if not is_main:  # the others took part in gathering, and hold nothing
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
            _flush(path)
        _flush(building)
        shutil.rmtree(target, ignore_errors=True)
        building.replace(target)
        _flush(directory)
    except Exception as error:  # safetensors has its own type for a full disk
        raise ValueError(f"{target} cannot be written ({error}); earlier checkpoints are untouched") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    for old in _checkpoints(directory)[:-keep]:
        _remove(old)


def _whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, dict[str, dict[str, Tensor]]]:
    """(weights by name, the optimiser's tensors by parameter and name)"""
    engine: Any = model
    if deepspeed.is_engine(model):
        return get_model_state_dict(engine.module, options=_WHOLE), deepspeed.moments(engine)
    tensors: Any = get_model_state_dict(model, options=_WHOLE)  # its type admits much besides tensors
    gathered: Any = get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    return tensors, gathered.get("state", {})  # which processes but the first do not get


def remove_unfinished(directory: Path) -> None:
    """Remove what is left of runs that ended while they wrote or removed a checkpoint."""
    for path in directory.glob(f".{_PREFIX}*"):
        shutil.rmtree(path)
    for path in directory.glob(f"{_PREFIX}*"):
        if path.name.removeprefix(_PREFIX).isdecimal() and not (path / _STATE).is_file():
            shutil.rmtree(path)


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint with the highest step."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The ``state`` given to ``save_checkpoint``, with ``step``."""
    return json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights and moments. All ranks call it, and every rank reads the files. Raises ValueError if they are
    damaged."""
    tensors: dict[str, Any] = dict(_read(checkpoint / _MODEL))
    engine: Any = model if deepspeed.is_engine(model) else None
    if engine is not None:
        deepspeed.make_state(engine)
        model = engine.module
    missing = set(get_model_state_dict(model)) - set(tensors)
    shared = {name for name in missing if name.endswith("lm_head.weight")}  # tied: saved once, under the other name
    if missing - shared:
        raise ValueError(f"{checkpoint} lacks {min(missing - shared)}; expected a checkpoint of this model and config")
    for name in shared:
        tensors[name] = tensors[name.removesuffix("lm_head.weight") + "model.embed_tokens.weight"]
    set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True))
    state: dict[str, Any] = {}
    for key, value in _read(checkpoint / _OPTIMIZER).items():
        name, _, moment = key.rpartition("/")
        state.setdefault(name, {})[moment] = value
    if engine is not None:
        deepspeed.restore(engine, state)
        return
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    set_optimizer_state_dict(
        model,
        optimizer,
        {"state": state, "param_groups": whole["param_groups"]},
        options=StateDictOptions(full_state_dict=True),
    )


def _checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints, the latest last."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if (path / _STATE).is_file()]
    numbered = [path for path in found if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, its state first, because without that it does not count as a checkpoint, whatever else is
    left."""
    (checkpoint / _STATE).unlink()
    shutil.rmtree(checkpoint)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a whole checkpoint: delete {path.parent.name} to continue "
            "from the one before"
        ) from error


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors; of tied ones only the first name, since a file holds no tensor twice."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.detach().contiguous()
    return kept
