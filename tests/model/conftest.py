# SPDX-License-Identifier: Apache-2.0
"""One thread for tiny models: on a busy machine, threads that wait for each other cost far more than they give."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
