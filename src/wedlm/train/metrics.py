# SPDX-License-Identifier: Apache-2.0
"""What a run logs: a progress line, ``metrics.jsonl``, TensorBoard and Weights & Biases."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.status import Status
from torch import Tensor

from wedlm.model.formats.save import write_whole
from wedlm.train.batch import AR_GROUP, NUM_DEPTHS, NUM_GROUPS, NUM_RATIOS
from wedlm.train.config import TrainConfig
from wedlm.train.parallel import sum_over_processes

METRICS_FILE = "metrics.jsonl"


def summarise(statistics: Tensor) -> dict[str, Any]:
    """Figures from a sum of ``StepLosses.statistics``: mean cross-entropy (nats) and share of right guesses.

    ``masked_loss`` is the plain mean over masked rows, without the objective's weights, so that runs with different
    weights compare. ``by_depth`` and ``by_ratio`` are lists with None where there was no row.
    """
    count, entropy, right = statistics.double().cpu().unbind(1)

    def means(values: Tensor, part: slice) -> list[float | None]:
        pairs = zip(values[part].tolist(), count[part].tolist(), strict=True)
        return [round(value / number, 5) if number else None for value, number in pairs]

    depths, ratios = slice(1, 1 + NUM_DEPTHS), slice(1 + NUM_DEPTHS, 1 + NUM_DEPTHS + NUM_RATIOS)
    masked = float(count[depths].sum())
    figures: dict[str, Any] = {"ar_loss": means(entropy, slice(AR_GROUP, AR_GROUP + 1))[0]}
    figures["ar_accuracy"] = means(right, slice(AR_GROUP, AR_GROUP + 1))[0]
    if masked:
        figures["masked_loss"] = round(float(entropy[depths].sum()) / masked, 5)
        figures["masked_accuracy"] = round(float(right[depths].sum()) / masked, 5)
        figures["loss_by_depth"], figures["accuracy_by_depth"] = means(entropy, depths), means(right, depths)
        figures["loss_by_ratio"] = means(entropy, ratios)
    return {name: value for name, value in figures.items() if value is not None}


class Meter:
    """Sums over the steps since the last ``flush``, on the device, and their time."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.device = accelerator, accelerator.device
        self._clear()

    def _clear(self) -> None:
        # All statistics in a row, then the loss.
        self.sums = torch.zeros(3 * NUM_GROUPS + 1, device=self.device)
        self.steps = self.tokens = 0
        self.began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside the block is not training and does not count."""
        entered = time.perf_counter()
        yield
        self.began += time.perf_counter() - entered

    def add(self, loss: Tensor, statistics: Tensor, num_clean_tokens: int) -> None:
        self.sums += torch.cat((statistics.flatten(), loss[None]))
        self.steps += 1
        self.tokens += num_clean_tokens

    def state(self) -> dict[str, Any]:
        """What was not flushed yet, over all processes, for a checkpoint, so that a resumed run reports the same."""
        return {"steps": self.steps, "sums": sum_over_processes(self.accelerator, self.sums).tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        if self.accelerator.is_main_process:
            self.sums.copy_(torch.tensor(state["sums"]))

    def flush(self) -> dict[str, Any]:
        """The metrics over all processes since the last flush; the sums start again at zero."""
        sums = sum_over_processes(self.accelerator, self.sums)  # waits for the device, so the clock is read after it
        tokens = sum_over_processes(self.accelerator, torch.tensor(self.tokens, dtype=torch.float64))
        figures: dict[str, Any] = {"loss": float(sums[-1]) / self.steps, **summarise(sums[:-1].view(NUM_GROUPS, 3))}
        figures["tokens_per_second"] = float(tokens) / (time.perf_counter() - self.began)
        if self.device.type == "cuda":
            figures["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        self._clear()
        return figures


class Records:
    """Where figures go. A context manager; use it only on the main process (``active`` False does nothing)."""

    def __init__(self, config: TrainConfig, directory: Path, num_steps: int, active: bool) -> None:
        self.config, self.directory, self.num_steps, self.active = config, directory, num_steps, active
        self.start = 0  # steps done by earlier processes; set it before entering
        self.console = Console(stderr=True)
        self.writer: Any = None
        self.wandb_run: Any = None

    def __enter__(self) -> Self:
        if not self.active:
            return self
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self.task = self.progress.add_task("", total=self.num_steps, figures="")
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier run reported about steps that this one repeats is hidden.
            purge = {"purge_step": self.start + 1} if self.start else {}
            self.writer = SummaryWriter(str(self.directory / "tensorboard"), **purge)
        if self.config.use_wandb:
            self.wandb_run = self._start_wandb()
        self.progress.start()
        return self

    def _start_wandb(self) -> Any:
        import wandb

        if self.config.wandb_host is not None:
            os.environ["WANDB_BASE_URL"] = self.config.wandb_host
        return wandb.init(
            project=self.config.wandb_project,
            entity=self.config.wandb_team,
            group=self.config.wandb_group,
            config=self.config.model_dump(),
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self.active:
            return
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=0 if error is None else 1)

    def log(self, text: str) -> None:
        """Print one line."""
        if self.active:
            self.console.print(text, highlight=False)

    def log_metrics(self, step: int, figures: dict[str, Any], kind: str = "train") -> None:
        """Record the metrics after ``step`` optimiser steps everywhere."""
        if not self.active:
            return
        with (self.directory / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step, **figures}) + "\n")
        scalars = {f"{kind}/{name}": value for name, value in _scalars(figures).items()}
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb_run is not None:
            self.wandb_run.log(scalars, step=step)
        self.log(f"{kind} {step}: {_line(figures)}")

    def update_progress(self, step: int) -> None:
        if self.active:
            self.progress.update(self.task, completed=step)


@contextmanager
def token_progress() -> Iterator[Callable[[str, int, int], None]]:
    """What ``load_data`` calls with (file, lines, tokens) while it tokenises: one line of the terminal.

    Only one of several processes tokenises, so only that one reports.
    """
    with ExitStack() as stack:
        lines: list[Status] = []

        def show(path: str, line: int, tokens: int) -> None:
            if not lines:
                lines.append(stack.enter_context(Console(stderr=True).status("", refresh_per_second=2)))
            if line % 100 == 1:
                lines[0].update(f"{Path(path).name}: line {line:,}; {tokens:,} tokens so far")

        yield show


def rewind(directory: Path, step: int) -> None:
    """Remove the records of ``metrics.jsonl`` after ``step``, which a resumed run writes again."""
    path = directory / METRICS_FILE
    if path.is_file():
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step]
        with write_whole(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``. A kill or a full disk may have cut the last line; raises ValueError for any
    other bad line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not valid JSON; expected one record per line") from error
    return records


def _scalars(figures: dict[str, Any]) -> dict[str, float]:
    """Turn lists into one scalar per entry: loss_by_ratio/3."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, list):
            flat.update({f"{name}/{i}": one for i, one in enumerate(value) if one is not None})
        else:
            flat[name] = value
    return flat


def _line(figures: dict[str, Any]) -> str:
    shown = ("loss", "masked_loss", "ar_loss", "masked_accuracy", "learning_rate", "tokens_per_second", "memory_gb")
    parts = []
    for name in shown:
        value = figures.get(name)
        if value is not None and math.isfinite(value):
            text = (
                f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if name == "learning_rate" else f"{value:.3f}"
            )
            parts.append(f"{name.replace('_', ' ')} {text}")
    return ", ".join(parts)
