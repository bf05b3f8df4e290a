# SPDX-License-Identifier: Apache-2.0
"""The settings of an evaluation: decoding parameters, protocols, and grids of them. Imports neither torch nor the
harness."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wedlm.algorithm.params import DecodeParams

if TYPE_CHECKING:
    from wedlm.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Params:
    """The decoding of a run, under the names that the command line and the result files use."""

    decoding: str = "verified"
    window_size: int = DecodeParams.window_size
    entropy_threshold: float | None = DecodeParams.entropy_threshold
    pos_penalty: float = DecodeParams.pos_penalty
    next_token: str = DecodeParams.next_token
    draft_entropy: float = DecodeParams.draft_entropy
    temperature: float = DecodeParams.temperature
    top_p: float = DecodeParams.top_p
    top_k: int = DecodeParams.top_k
    seed: int = 0
    max_tokens: int = 512
    remasking_strategy: str | None = None
    confidence_threshold: float = DecodeParams.confidence_threshold
    denoising_steps: int | None = None

    def __post_init__(self) -> None:
        self.sampling_params()

    def sampling_params(self) -> "SamplingParams":
        """The parameters for the engine. Raises ValueError naming field, value and expectation."""
        from wedlm.engine.sampling_params import SamplingParams

        return SamplingParams(
            decoding=self.decoding,  # type: ignore[arg-type]
            wedlm_window_size=self.window_size,
            wedlm_entropy_threshold=self.entropy_threshold,
            wedlm_pos_penalty_factor=self.pos_penalty,
            wedlm_next_token=self.next_token,  # type: ignore[arg-type]
            wedlm_draft_entropy=self.draft_entropy,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            max_tokens=self.max_tokens,
            remasking_strategy=self.remasking_strategy,  # type: ignore[arg-type]
            confidence_threshold=self.confidence_threshold,
            denoising_steps=self.denoising_steps,
        )

    def record(self) -> dict[str, Any]:
        """The parameters by name, for results and their keys. Newer parameters appear only if they differ from their
        default, so that results of earlier versions keep their keys."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        later = ("next_token", "remasking_strategy", "confidence_threshold", "denoising_steps")
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in later or value != defaults[name]}

    @property
    def max_rows(self) -> int:
        """The most rows that a sequence takes per step."""
        if self.decoding == "autoregressive":
            return 1
        return self.window_size if self.decoding in ("auto", "verified") else 2 * self.window_size


PARAM_NAMES = tuple(field.name for field in dataclasses.fields(Params))
# Decoding of the quality tables of arXiv 2512.22737.
_PAPER: dict[str, Any] = {
    "decoding": "streaming",
    "window_size": 6,
    "entropy_threshold": None,
    "pos_penalty": 0.10,
    "temperature": 0.1,
    "max_tokens": 512,
}
# What a protocol says differently from the defaults. "paper" also asks as the paper does (``protocol_tasks``).
PROTOCOLS: dict[str, dict[str, Any]] = {"default": {}, "paper": _PAPER, "paper-decoding": _PAPER}


@dataclass(frozen=True)
class Settings:
    """What all runs of an evaluation share, besides decoding."""

    tasks: tuple[str, ...]
    data_dir: Path
    output: Path
    protocol: str = "default"
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        known = task_names()
        if not self.tasks:
            raise ValueError(f"no task is given; expected some of {', '.join(known)}")
        for name in self.tasks:
            if name not in known:
                raise ValueError(f"the task {name!r} is unknown; expected some of {', '.join(known)}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks is {','.join(self.tasks)}; expected each task once")
        for name, value, low in (("limit", self.limit, 1), ("num_fewshot", self.num_fewshot, 0)):
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; expected at least {low}")
        if not self.data_dir.is_dir():
            raise ValueError(
                f"--data-dir is {self.data_dir}, which is not a directory; expected that of the data files"
            )


TASKS_DIRECTORY = Path(__file__).parent / "tasks"


def task_names() -> list[str]:
    """The names of all tasks, from their files."""
    return sorted(path.stem for path in TASKS_DIRECTORY.glob("*.yaml"))


def protocol_tasks(protocol: str, names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that a protocol means by these names: the paper's version of a task if there is one."""
    twins = set(task_names()) if protocol == "paper" else set()
    return tuple(f"{name}_paper" if f"{name}_paper" in twins else name for name in names)


def make_params(protocol: str, chosen: Mapping[str, Any]) -> Params:
    """A protocol's parameters, with those that the user chose. Raises ValueError for an unknown protocol."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    return Params(**{**PROTOCOLS[protocol], **chosen})


def parse_value(name: str, text: str) -> Any:
    """Read a parameter's value as the user wrote it. Raises ValueError."""
    if name == "entropy_threshold" and text.lower() == "none":
        return None
    kinds = {"int": int, "str": str, "int | None": int, "str | None": str}
    kind: Callable[[str], Any] = kinds.get(str(_TYPES[name]), float)
    try:
        return kind(text)
    except ValueError:
        expected = "an integer" if kind is int else "a number or none" if name == "entropy_threshold" else "a number"
        raise ValueError(f"{name} is {text!r}; expected {expected}") from None


_TYPES = {field.name: getattr(field.type, "__name__", field.type) for field in dataclasses.fields(Params)}


def parse_sweep(options: Sequence[str]) -> list[dict[str, Any]]:
    """The runs of a grid, in which the first option varies slowest: ``["window_size=4,8", "temperature=0,1"]`` makes
    four.

    Without an option there is one run that changes nothing. Raises ValueError for anything but ``key=value,value`` with
    a known key.
    """
    axes: dict[str, list[Any]] = {}
    for option in options:
        name, equals, values = option.partition("=")
        name = name.strip().replace("-", "_")
        if name not in PARAM_NAMES:
            raise ValueError(f"--sweep is {option!r}; expected key=value,value with a key of {', '.join(PARAM_NAMES)}")
        if not equals or not all(value.strip() for value in values.split(",")):
            raise ValueError(f"--sweep is {option!r}; expected {name}=value,value")
        if name in axes:
            raise ValueError(f"--sweep names {name} twice; expected all its values in one option")
        axes[name] = list(dict.fromkeys(parse_value(name, value.strip()) for value in values.split(",")))
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
