# SPDX-License-Identifier: Apache-2.0
"""``wedlm eval reproduce --paper-tables``: runs the paper's ten sets for a list of models, beside the published
figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wedlm.cli.terminal import needs_extra, note, write

FILE = "paper_tables.md"
# (model, tasks with commas between, decoding or None for the protocol's) -> the run's record
Evaluate = Callable[[str, str, str | None], dict[str, Any]]


def reproduce_tables(
    models: Sequence[str], tasks: Sequence[str], data_dir: Path, output: Path, decoding: str | None, evaluate: Evaluate
) -> None:
    """Evaluate each model in turn and write both tables to ``output`` after each. Raises ValueError for a wrong option.

    Empty ``models`` means the paper's, empty ``tasks`` all of them. WeDLM checkpoints decode by the protocol, those
    that see by blocks by their blocks, and all others by AR, unless ``decoding`` names a mode.
    """
    with needs_extra("eval"):
        from wedlm.engine.factory import release_memory
        from wedlm.evaluate.data import find_file
    from wedlm.evaluate.paper_tables import DEFAULT_MODELS, SETS, Column, parse_model, tables

    chosen = [parse_model(text) for text in models or DEFAULT_MODELS]
    names = list(tasks or SETS)
    for name in names:
        if name not in SETS:
            raise ValueError(f"the task {name!r} is not in the paper's tables; expected some of {', '.join(SETS)}")
    if not tasks and find_file(data_dir, "gpqa_diamond") is None:
        note(f"gpqa is left out: {data_dir} has no gpqa_diamond.csv, which its authors give to those who ask")
        names.remove("gpqa")
    columns = []
    for number, (model, kind) in enumerate(chosen, start=1):
        note(f"model {number} of {len(chosen)}: {model}")
        record = evaluate(model, ",".join(names), decoding or _decoding(model))
        columns.append(Column.of(Path(model).name if Path(model).exists() else model, kind, record))
        release_memory()
        path = output / FILE
        path.write_text(tables(columns), encoding="utf-8")
        note(f"wrote {path}")
    write(tables(columns))


def _decoding(model: str) -> str | None:
    """The mode; None leaves it to the protocol, or to the checkpoint."""
    from wedlm.model.formats.checkpoint import open_checkpoint

    config = open_checkpoint(model).config
    return None if config.is_wedlm or config.sees_by_block else "autoregressive"
