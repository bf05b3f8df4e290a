# SPDX-License-Identifier: Apache-2.0
"""``wedlm generate --workers ray``: from options to a file of answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from wedlm.cli.options import EngineOptions, ModelOptions, changed
from wedlm.cli.terminal import INTERRUPTED, Interrupt, err, needs_extra, note, progress_bar

if TYPE_CHECKING:
    from wedlm import SamplingParams


@dataclass(frozen=True)
class BatchWork:
    """The prompts, where the answers go, and on how many workers (None: as many as there is room for)."""

    prompts: list[str]
    output: Path
    num_workers: int | None


def run_batch(
    work: BatchWork, model: ModelOptions, engine: EngineOptions, params: "SamplingParams", chat: bool | None
) -> None:
    """Answer the prompts that the file does not answer yet; exit code 1 if some were refused, 130 after Ctrl-C."""
    with needs_extra("workers"):
        import ray
    from wedlm.cluster import share_of
    from wedlm.deploy.batch import Batch, BatchJob

    options = {name: value for name, value in changed(engine).items() if name != "device"}
    job = BatchJob(model.model, options, params, chat)
    is_ours = not ray.is_initialized()
    try:
        share = share_of(engine.device, model.threads, "--workers", engine.tensor_parallel_size)
        num_workers = work.num_workers or max(1, share.most())
        batch = Batch(job, work.prompts, work.output, share, num_workers)
        with Interrupt() as interrupt, progress_bar(err.is_terminal) as bar:
            task = bar.add_task("Generating", total=len(work.prompts))
            batch.run(lambda: interrupt.asked, lambda done: bar.update(task, completed=done))
    finally:
        if is_ours:
            ray.shutdown()
    replaced = f", {batch.num_replaced} workers ended and were replaced" if batch.num_replaced else ""
    note(f"{batch.num_done} of {len(work.prompts)} prompts are answered in {work.output}{replaced}")
    if interrupt.asked:
        note("the same command goes on with the rest")
        raise typer.Exit(INTERRUPTED)
    if batch.num_refused:
        note(f"warning: {batch.num_refused} prompts were refused; their lines say why", "yellow")
        raise typer.Exit(1)
