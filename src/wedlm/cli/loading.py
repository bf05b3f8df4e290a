# SPDX-License-Identifier: Apache-2.0
"""From options to a loaded model: the one place where commands make an ``LLM``."""

import os
from typing import TYPE_CHECKING

from wedlm.cli.options import EngineOptions, ModelOptions, changed
from wedlm.cli.terminal import note, status

if TYPE_CHECKING:
    from wedlm import LLM

_MANY_THREADS = 64  # more than the machine has only slow it down, but no such number harms it


def load_llm(model: ModelOptions, engine: EngineOptions) -> "LLM":
    """The model on an engine, with a status line while it loads. Raises ValueError."""
    _check_threads(model.threads)
    with status(f"Loading {model.model} ..."):
        from wedlm import LLM
        from wedlm.model.formats.resolve import locate
    locate(model.model)  # outside the status line: a download shows its own progress
    set_threads(model.threads)
    with status(f"Loading {model.model} ..."):
        llm = LLM(model.model, **changed(engine))
    note(llm.describe())
    return llm


def set_threads(threads: int | None) -> None:
    """CPU threads of torch; None leaves its choice. Raises ValueError."""
    _check_threads(threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    most = max(_MANY_THREADS, os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise ValueError(f"threads is {threads}; expected at most {most}")
