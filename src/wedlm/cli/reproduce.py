# SPDX-License-Identifier: Apache-2.0
"""``wedlm eval reproduce --paper-tables``: the paper's ten sets for a list of models, beside what it published."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wedlm.cli.terminal import needs_extra, note, write

if TYPE_CHECKING:
    from wedlm.cli.eval import ParamOptions, WhatOptions

FILE = "paper_tables.md"
Evaluate = Callable[["WhatOptions", "ParamOptions", str], list[dict[str, Any]]]  # (what, params, model) -> records


def reproduce_tables(what: "WhatOptions", params: "ParamOptions", evaluate: Evaluate) -> None:
    """Evaluate each model in turn and write both tables after each. ValueError for a wrong option.

    WeDLM checkpoints decode as the protocol says, all others by AR, unless ``params`` names a mode.
    """
    with needs_extra("eval"):
        from wedlm.evaluate.data import find_file
    from wedlm.evaluate.paper_tables import DEFAULT_MODELS, SETS, Column, parse_model, tables

    models = [parse_model(text) for text in what.models.split(",") if text.strip()] or list(
        map(parse_model, DEFAULT_MODELS)
    )
    names = [name.strip() for name in what.tasks.split(",") if name.strip()] or list(SETS)
    for name in names:
        if name not in SETS:
            raise ValueError(f"the task {name!r} is not in the paper's tables; expected some of {', '.join(SETS)}")
    if "gpqa" in names and not what.tasks and find_file(what.data_dir, "gpqa_diamond") is None:
        note(f"gpqa is left out: {what.data_dir} has no gpqa_diamond.csv, which its authors give to who asks them")
        names.remove("gpqa")
    what = replace(what, tasks=",".join(names), protocol="paper")
    columns = []
    for number, (model, kind) in enumerate(models, start=1):
        note(f"model {number} of {len(models)}: {model}")
        own = params if params.decoding is not None else replace(params, decoding=_decoding(model))
        (record,) = evaluate(what, own, model)
        columns.append(Column.of(Path(model).name if Path(model).exists() else model, kind, record))
        _free()
        path = what.output / FILE
        path.write_text(tables(columns), encoding="utf-8")
        note(f"wrote {path}")
    write(tables(columns))


def _decoding(model: str) -> str | None:
    """None leaves it to the protocol."""
    from wedlm.model.formats.checkpoint import open_checkpoint

    return None if open_checkpoint(model).config.is_wedlm else "autoregressive"


def _free() -> None:
    """The next model needs the memory of the last, which objects that refer to each other still hold."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
