# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one; otherwise the kernels run in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
