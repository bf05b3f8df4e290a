# SPDX-License-Identifier: Apache-2.0
"""The choices a user has about a run, and which of them decide the result of a stage. Does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wedlm.engine.options import EngineOptions

ADAPTER = "adapter"  # the folder of the result, under the output
# Of EngineOptions: what the engines of a run have.
ENGINE = ("dtype", "quantization", "device")
_LEAST_ROWS = 4  # for one draft


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run, checked on construction (ValueError). Lengths are in tokens; None takes the device's
    default.

    ``prompts``: files of prompts. ``data``: files of conversations whose questions become the prompts. Without either,
    the default mixture is used. ``trainer``: settings that replace those of ``training.py``.
    """

    model: str
    output: Path
    prompts: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    num_prompts: int | None = None
    held_out: int = 64
    max_prompt_tokens: int = 512
    max_tokens: int = 256
    lora_rank: int = 128
    block_size: int = 8
    learning_rate: float = 2e-3
    epochs: float | None = None
    steps: int | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 16
    mask_token_id: int | None = None
    seed: int = 0
    processes: int | None = None
    engine: EngineOptions

    def __post_init__(self) -> None:
        if self.prompts and self.data:
            raise ValueError("--prompts and --data are both given; expected one of them, or neither")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("--epochs and --steps are both given; expected one of them, or neither")
        least = {"num_prompts": 4, "held_out": 1, "max_prompt_tokens": 1, "max_tokens": 1, "steps": 1, "processes": 1}
        for name, value in (least | {"rows": _LEAST_ROWS}).items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"--{name.replace('_', '-')} is {given}; expected at least {value}")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"--epochs is {self.epochs}; expected a number above 0")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"--output is {self.output}, which is a file; expected a directory")

    @property
    def engine_options(self) -> dict[str, Any]:
        """The options for every engine of the run."""
        return {name: getattr(self.engine, name) for name in ENGINE}


# Which options decide what a stage makes: they may not change once it has begun.
DECIDES: dict[str, tuple[str, ...]] = {
    "prompts": ("model", "prompts", "data", "num_prompts", "held_out", "max_prompt_tokens", "seed"),
    "answers": ("max_tokens", "dtype", "quantization"),
    "training": ("lora_rank", "block_size", "learning_rate", "epochs", "steps", "mask_token_id", "trainer"),
    "measurement": ("rows",),
}


def decisions(settings: Settings, stage: str) -> dict[str, Any]:
    """The options that decide a stage, as they are kept in JSON."""
    values: dict[str, Any] = {}
    for name in DECIDES[stage]:
        value = getattr(settings.engine if name in ENGINE else settings, name)
        if isinstance(value, tuple):
            value = [str(path) for path in value]
        values[name] = dict(value) if isinstance(value, Mapping) else value
    return values


def check_unchanged(stage: str, made_with: Mapping[str, Any], wanted: Mapping[str, Any], output: Path) -> None:
    """Raises ValueError, in one sentence, naming the first option that differs from the value that the stage began
    with."""
    for name, value in wanted.items():
        before = made_with.get(name)
        if before != value:
            fault = f"{_option(name)} is {_shown(value)} and was {_shown(before)}"
            if name == "content":
                fault = "a file of prompts is not what it was"
            raise ValueError(
                f'{fault} when the stage "{stage}" in {output} was begun; expected the same, or another --output'
            )


def _option(name: str) -> str:
    options = {"model": "MODEL", "lora_rank": "--rank", "trainer": "--set"}
    return options.get(name, f"--{name.replace('_', '-')}")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name}={one}" for name, one in value.items()]
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
