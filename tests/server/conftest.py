# SPDX-License-Identifier: Apache-2.0
"""A tiny model behind a server, for the tests of a module."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.tiny_llm import save_tiny
from tests.server.running import Running, serving
from wedlm import LLM


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    """For a server of the test's own."""
    return LLM(directory, device="cpu", max_num_seqs=16)


@pytest.fixture(scope="module")
def reference(directory: Path) -> LLM:
    """For what the texts must be."""
    return LLM(directory, device="cpu")


@pytest.fixture(scope="module")
def running(directory: Path) -> Iterator[Running]:
    with serving(LLM(directory, device="cpu", max_num_seqs=16)) as one:
        yield one
        one.settled()
