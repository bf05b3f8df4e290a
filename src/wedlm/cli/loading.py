# SPDX-License-Identifier: Apache-2.0
"""Load a model from options: the one place where commands make an ``LLM``."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wedlm.cli.options import EngineOptions, ModelOptions, changed
from wedlm.cli.terminal import note, status

if TYPE_CHECKING:
    from wedlm import LLM

_MANY_THREADS = 64  # more than the machine has only slow it down, but no such number harms it


def load_llm(model: ModelOptions, engine: EngineOptions) -> "LLM":
    """Load the model on an engine, with a status line. Raises ValueError."""
    return load_llms({model.model: model.model}, model.threads, engine)[model.model]


def load_llms(models: Mapping[str, str], threads: int | None, engine: EngineOptions) -> "dict[str, LLM]":
    """Load models by name on engines that share the machine, as ``load_llm`` does."""
    _check_threads(threads)
    with status(f"Loading {', '.join(models)} ..."):
        from wedlm import LLM
        from wedlm.model.formats.resolve import locate
    for path in models.values():
        locate(path)  # outside the status line: a download shows its own progress
    set_threads(threads)
    with status(f"Loading {', '.join(models)} ..."):
        llms = LLM.together(models, **changed(engine))
    for name, llm in llms.items():
        note(llm.describe() if len(llms) == 1 else f"{name}: {llm.describe()}")
    return llms


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads; None leaves torch's choice. Raises ValueError."""
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
