# SPDX-License-Identifier: Apache-2.0
"""Read back and check results of ``wedlm eval``: runs and their samples. Uses only the standard library."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
AUTOREGRESSIVE = "autoregressive"
_SHORT = {"window_size": "W", "entropy_threshold": "τ", "pos_penalty": "λ", "draft_entropy": "H", "temperature": "T"}
# What decides a text, by mode, besides temperature and length.
_TELLING = {
    "streaming": ("window_size", "entropy_threshold", "pos_penalty"),
    "block": ("window_size", "entropy_threshold", "pos_penalty"),
    "block by probability": ("window_size", "remasking_strategy", "confidence_threshold", "denoising_steps"),
    "verified": ("window_size", "draft_entropy"),
    AUTOREGRESSIVE: (),
}


@dataclass(frozen=True)
class Sample:
    """One question and its answer. Lists are empty, and numbers 0, if its kind of task does not have them."""

    doc_id: int
    prompt: str
    target: str
    correct: bool
    text: str
    token_ids: Sequence[int] = ()
    token_steps: Sequence[int] = ()
    finish_reason: str = ""
    forwards: int = 0
    rows: int = 0
    truncated: bool = False


@dataclass(frozen=True)
class TaskResult:
    """A task's score in one run; ``speed`` has the fields that its kind has."""

    name: str
    version: float
    kind: str
    num_samples: int
    num_fewshot: int
    metric: str
    value: float
    stderr: float | None
    speed: Mapping[str, float]
    samples_path: Path


@dataclass(frozen=True)
class Run:
    """A model on some tasks with one set of parameters."""

    path: Path
    key: str
    model: Mapping[str, Any]
    params: Mapping[str, Any]
    chat_template: bool
    protocol: str
    tasks: Mapping[str, TaskResult]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decoding(self) -> str:
        return self.params["decoding"]

    @property
    def label(self) -> str:
        """The mode and its parameters, e.g. "streaming causal W=16 τ=0.4 λ=0.02"."""
        words = [self.decoding]
        if self.decoding == "streaming" and self.params.get("next_token") == "causal":
            words.append("causal")
        by_probability = self.params.get("remasking_strategy", "entropy") != "entropy"
        mode = "block by probability" if self.decoding == "block" and by_probability else self.decoding
        names = [name for name in _TELLING.get(mode, _TELLING["streaming"]) if name in self.params]
        words.extend(describe(name, self.params[name]) for name in names)
        if self.params.get("temperature"):
            words.append(describe("temperature", self.params["temperature"]))
        return " ".join(words)

    @property
    def model_label(self) -> str:
        """Name, adapter, and the digest that distinguishes weights of the same name."""
        adapter = f" + {self.model['adapter']}" if self.model.get("adapter") else ""
        engine = "" if self.engine == "wedlm" else f", {self.engine}"
        return f"{self.model['name']}{adapter} ({self.model['hash'][:8]}, {self.model.get('dtype', '?')}{engine})"

    @property
    def engine(self) -> str:
        return str(self.model.get("engine", "wedlm"))

    def weights(self) -> tuple[str, Any, str]:
        """What two runs must share for one to be the other's AR baseline."""
        return self.model["hash"], self.model.get("dtype"), self.engine


def describe(name: str, value: Any) -> str:
    """A parameter in short, e.g. "τ=0.4"."""
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return f"{_SHORT.get(name, name)}={text}"


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs of some result folders, each once, sorted by model, mode and parameters. Raises ValueError."""
    runs: dict[str, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a directory; expected the output folder of wedlm eval")
        paths = sorted(folder.glob("point-*.json"))
        if not paths:
            raise ValueError(f"{folder} has no point-*.json; expected the output folder of a finished wedlm eval")
        for path in paths:
            run = read_run(path)
            runs.setdefault(run.key, run)
    return sorted(runs.values(), key=lambda run: (run.model_label, run.decoding != AUTOREGRESSIVE, run.label))


def read_run(path: Path) -> Run:
    """Read a ``point-<key>.json``. Raises ValueError naming the file and the field."""
    record = _object(_read(path), str(path))
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has format {record.get('format')!r}; expected {FORMAT}")
    where = str(path)
    tasks = {
        name: _task(path, name, _object(task, f"{where}: tasks.{name}"))
        for name, task in _get(record, "tasks", dict, where).items()
    }
    if not tasks:
        raise ValueError(f"{path} has no tasks; expected at least one")
    model, params = _get(record, "model", dict, where), _get(record, "params", dict, where)
    for name in ("name", "hash"):
        _get(model, name, str, f"{where}: model")
    _get(params, "decoding", str, f"{where}: params")
    return Run(
        path=path,
        key=_get(record, "key", str, where),
        model=model,
        params=params,
        chat_template=bool(record.get("chat_template", False)),
        protocol=str(record.get("protocol", "")),
        tasks=tasks,
        environment=record.get("environment") or {},
    )


def _task(path: Path, name: str, record: Mapping[str, Any]) -> TaskResult:
    where = f"{path}: tasks.{name}"
    stderr = record.get("stderr")
    if stderr is not None:
        stderr = _number(record, "stderr", where)
    file_name = _get(record, "samples_file", str, where)
    if Path(file_name).name != file_name:
        raise ValueError(f"{where}.samples_file is {file_name!r}; expected the name of a file in the same folder")
    speed = {key: _number(record["speed"], key, where) for key in _get(record, "speed", dict, where)}
    kind = _get(record, "kind", str, where)
    if kind not in ("generate", "likelihood"):
        raise ValueError(f"{where}.kind is {kind!r}; expected generate or likelihood")
    return TaskResult(
        name=name,
        version=_number(record, "version", where),
        kind=kind,
        num_samples=_get(record, "num_samples", int, where),
        num_fewshot=int(record.get("num_fewshot") or 0),
        metric=_get(record, "metric", str, where),
        value=_number(record, "value", where),
        stderr=stderr,
        speed=speed,
        samples_path=path.with_name(file_name),
    )


def read_samples(task: TaskResult) -> list[Sample]:
    """The samples of a task, in the file's order. Raises ValueError naming the file and the line."""
    path = task.samples_path
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected the samples of {task.name} next to the run's file")
    samples, seen = [], set()
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        sample = _sample(_object(_parse(line, where), where), where, task.kind)
        if sample.doc_id in seen:
            raise ValueError(f"{where} is a second sample of question {sample.doc_id}; expected one of each")
        seen.add(sample.doc_id)
        samples.append(sample)
    if len(samples) != task.num_samples:
        raise ValueError(f"{path} has {len(samples)} samples; expected {task.num_samples}, as the run's file says")
    return samples


def _sample(record: Mapping[str, Any], where: str, kind: str) -> Sample:
    text = _get(record, "text", str, where) if kind == "generate" else _choice(record, where)
    ids, steps = _integers(record, "token_ids", where), _integers(record, "token_steps", where)
    if len(ids) != len(steps):
        raise ValueError(f"{where} has {len(ids)} token_ids and {len(steps)} token_steps; expected as many of both")
    return Sample(
        doc_id=_get(record, "doc_id", int, where),
        prompt=_get(record, "prompt", str, where),
        target=_get(record, "target", str, where),
        correct=_get(record, "correct", bool, where),
        text=text,
        token_ids=ids,
        token_steps=steps,
        finish_reason=str(record.get("finish_reason", "")),
        forwards=int(record.get("forwards", 0)),
        rows=int(record.get("rows", 0)),
        truncated=bool(record.get("truncated", False)),
    )


def _choice(record: Mapping[str, Any], where: str) -> str:
    """The chosen continuation is a likelihood task's answer."""
    choices, chosen = _get(record, "choices", list, where), _get(record, "chosen", int, where)
    if not 0 <= chosen < len(choices):
        raise ValueError(f"{where}: chosen is {chosen}; expected the index of one of {len(choices)} choices")
    return str(choices[chosen])


def _integers(record: Mapping[str, Any], name: str, where: str) -> list[int]:
    values = _get(record, name, list, where) if name in record else []
    if not all(type(value) is int for value in values):
        raise ValueError(f"{where}: {name} holds something else than integers; expected a list of integers")
    return values


def _get(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in record:
        raise ValueError(f"{where} has no {name}; expected {_name(kind)}")
    if not isinstance(record[name], kind) or (kind is int and isinstance(record[name], bool)):
        raise ValueError(f"{where}: {name} is {_clip(record[name])}; expected {_name(kind)}")
    return record[name]


def _number(record: Mapping[str, Any], name: str, where: str) -> float:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {name} is {_clip(value)}; expected a number")
    return float(value)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_clip(value)}; expected a JSON object")
    return value


def _name(kind: type) -> str:
    return {str: "a string", int: "an integer", bool: "true or false", dict: "an object", list: "a list"}[kind]


def _clip(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a point-*.json of wedlm eval")
    return _parse(_text(path), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 at byte {error.start}; expected text in that encoding") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not valid JSON (column {error.colno}: {error.msg}); expected a JSON object"
        ) from None
