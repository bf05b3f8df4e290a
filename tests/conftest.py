# SPDX-License-Identifier: Apache-2.0
"""Set-up of all tests: shapes in signatures are checked in the layers that state them, except in long runs."""

import pytest
import torch
from jaxtyping import install_import_hook

# params.py states no shapes, and beartype's random draws would disturb hypothesis, which builds those.
_CHECKED = [
    "algorithm.reorder",
    "algorithm.sample",
    "algorithm.select",
    "algorithm.verify",
    "algorithm.window",
    "attention",
]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # one test process per core
    if config.option.markexpr != "long":  # the checks cost five times the work of a stub model's step
        install_import_hook([f"wedlm.{name}" for name in _CHECKED], "beartype.beartype")
