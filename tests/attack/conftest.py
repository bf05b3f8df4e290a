# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from tests.engine.tiny_llm import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))
