# SPDX-License-Identifier: Apache-2.0
"""``wedlm accelerate``: turns options into a run, and shows its progress on the terminal."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from wedlm.accelerate.settings import Settings
from wedlm.cli.loading import set_threads
from wedlm.cli.options import EngineOptions, Only, Threads, command, option, values_of
from wedlm.cli.terminal import err, note, out, status

DATA, TRAINING = "What the model is asked", "Training and measurement"
_HOME: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Settings)}
_QUIET_SECONDS = 30.0  # between two lines of progress without a terminal


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The prompts, and the length of answers."""

    prompts: Annotated[
        list[Path] | None,
        option('Your prompts: a text file, one a line, or JSON lines with {"prompt": ...}; may be repeated.', DATA),
    ] = None
    data: Annotated[
        list[Path] | None,
        option("Or conversations as wedlm train reads them, whose questions are asked; may be repeated.", DATA),
    ] = None
    num_prompts: Annotated[int | None, option("Largest number of prompts. [all; default mixture 2,000]", DATA)] = None
    held_out: Annotated[int, option("Prompts to measure on; at most a quarter of yours.", DATA)] = _HOME["held_out"]
    max_prompt_tokens: Annotated[int, option("Leave out longer prompts.", DATA)] = _HOME["max_prompt_tokens"]
    max_tokens: Annotated[int, option("Largest number of tokens of an answer.", DATA)] = _HOME["max_tokens"]
    seed: Annotated[int, option("Seed of the choice of prompts and of the noise.", DATA)] = _HOME["seed"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The adapter, how long it is trained, and how it is measured."""

    rank: Annotated[int, option("Rank of the LoRA: a larger one learns more and costs more.", TRAINING)] = _HOME[
        "lora_rank"
    ]
    block_size: Annotated[int, option("Positions that a step looks ahead, in training.", TRAINING)] = _HOME[
        "block_size"
    ]
    learning_rate: Annotated[float, option("Peak rate of AdamW.", TRAINING)] = _HOME["learning_rate"]
    epochs: Annotated[float | None, option("How often training sees each answer. [CPU 3, GPU 12]", TRAINING)] = None
    steps: Annotated[int | None, option("Length of training in steps, instead of --epochs.", TRAINING)] = None
    set: Annotated[
        list[str] | None, option("KEY=VALUE: any other setting of wedlm train; may be repeated.", TRAINING)
    ] = None
    processes: Annotated[int | None, option("Processes that train together. [one per GPU; CPU 1]", TRAINING)] = None
    rows: Annotated[int, option("Largest number of rows of a step in the measurement.", TRAINING)] = _HOME["rows"]
    mask_token_id: Annotated[
        int | None, option("Token that stands for masked positions. [as wedlm init chooses it]", TRAINING)
    ] = None


@command
def accelerate(
    *,
    model: Annotated[str, typer.Argument(help="AR checkpoint: directory, .gguf file, hub id, or 'demo-base'.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter, the report and everything in between.")],
    data: DataOptions,
    training: TrainingOptions,
    engine: Annotated[EngineOptions, Only("dtype", "quantization", "device")],
    threads: Threads = None,
) -> None:
    """Make your model faster without changing its text: train an adapter for masked rows on its own answers.

    \b
    Examples:
    wedlm accelerate demo-base --output ./faster
    wedlm accelerate ./my-model --prompts my_prompts.txt --output ./faster
    wedlm accelerate ./my-model --data my_chats.jsonl --steps 600 --output ./faster

    Five stages: prompts, answers, training, measurement, report. Ctrl-C saves, and the same command continues
    where it stopped. docs/accelerate.md explains the stages.
    """
    set_threads(threads)
    run_accelerate(model, output, data, training, engine)


def run_accelerate(
    model: str, output: Path, data: DataOptions, training: TrainingOptions, engine: EngineOptions
) -> None:
    """Run all unfinished stages and print the report's path. Raises ValueError."""
    with status("Loading torch ..."):
        from wedlm.model.formats.resolve import locate
        from wedlm.plotting import need_matplotlib
        from wedlm.train.optional_deps import ALWAYS, require

        for package in ALWAYS:
            require(package)
        need_matplotlib()
        from wedlm.accelerate.report import summary, usage
        from wedlm.accelerate.run import Run
        from wedlm.train.config import parse_overrides
    values = values_of(data, training)
    values |= {name: tuple(values[name] or ()) for name in ("prompts", "data")}
    overrides = parse_overrides([f"--{one}" for one in values.pop("set") or []])
    settings = Settings(
        model=model, output=output, engine=engine, trainer=overrides, lora_rank=values.pop("rank"), **values
    )
    locate(model)
    with _Shown() as shown:
        run = Run(settings, shown)
        try:
            report = run.run()
        except KeyboardInterrupt:
            shown.finish()
            note("stopped; the same command continues from here", "yellow")
            raise
    note(summary(run.facts()))
    for line in usage(settings):
        note(line)
    out.print(str(report), markup=False, soft_wrap=True)


class _Shown:
    """Progress with the time left: a bar on a terminal, elsewhere an occasional line."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what, self._began, self._first, self._told = "", 0.0, 0, 0.0

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(self, *_: Any) -> None:
        self.finish()

    def stage(self, number: int, text: str) -> None:
        self.finish()
        note(f"stage {number} of 5: {text}", "bold")

    def note(self, text: str) -> None:
        note(text)

    def progress(self, what: str, done: int, total: int, speed: str = "") -> None:
        now = time.monotonic()
        if what != self._what:
            self.finish()
            self._what, self._began, self._first, self._told = what, now, done, now
            if err.is_terminal:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
                times = (TextColumn("{task.fields[speed]}"), TimeElapsedColumn(), TimeRemainingColumn())
                self._bar = Progress(*columns, *times, console=err, transient=True, refresh_per_second=2)
                self._task = self._bar.add_task(what, total=total, completed=done, speed="")
                self._bar.start()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, speed=speed)
        elif now - self._told >= _QUIET_SECONDS or done == total:
            self._told = now
            left = (now - self._began) / (done - self._first) * (total - done) if done > self._first else None
            words = [f"{what}: {done} of {total}", speed, "" if left is None else f"{left:.0f} s left"]
            note(", ".join(word for word in words if word))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._what = None, ""
