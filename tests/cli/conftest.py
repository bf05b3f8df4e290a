# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk for the command line."""

import signal
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Python's own answer to Ctrl-C. Started in the background, it and all its children would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
