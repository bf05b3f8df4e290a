# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk for the command line."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.engine.tiny_llm import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "wedlm"))


@pytest.fixture(scope="module")
def ar_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Not adapted, without a chat template, and with room for thousands of tokens."""
    changes = {"model_type": "qwen3", "max_position_embeddings": 60000}
    return str(save_tiny(tmp_path_factory.mktemp("tiny") / "ar", chat=False, **changes))


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command with pipes to all its streams. A test that fails leaves no process behind."""
    started: list[subprocess.Popen[str]] = []

    def begin(command: list[str], **options: Any) -> subprocess.Popen[str]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, text=True, **pipes, **options))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None and not pipe.closed:
                with suppress(BrokenPipeError):
                    pipe.close()
