# SPDX-License-Identifier: Apache-2.0
"""The native forward's tests need the compiled library: where WEDLM_REQUIRE_NATIVE is 1, its absence is a failure."""

import os

import pytest

from wedlm.native import is_available
from wedlm.native.library import paths

AVAILABLE = is_available() or os.environ.get("WEDLM_REQUIRE_NATIVE") == "1"
# Instruction sets that run here, the portable one (the twin of all others) last.
PATHS = [path.name for path in paths() if path.runs] if AVAILABLE else ["portable"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not AVAILABLE:
        for item in items:
            if "tests/native" in item.path.as_posix() and item.path.name != "test_missing.py":
                item.add_marker(pytest.mark.skip(reason="the native library was not built: no C++ compiler"))
