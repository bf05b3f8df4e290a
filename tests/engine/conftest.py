# SPDX-License-Identifier: Apache-2.0
"""A tiny random checkpoint on disk, and an LLM of it, for the tests of a module."""

from pathlib import Path

import pytest

from tests.engine.tiny_llm import save_tiny
from wedlm.engine.llm import LLM


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(directory) -> LLM:
    return LLM(directory, device="cpu", decoding="streaming")
