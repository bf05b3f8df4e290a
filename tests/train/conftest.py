# SPDX-License-Identifier: Apache-2.0
"""What several tests of training share."""

import pytest

from tests.train.plain_loop import small_transformer
from wedlm.model import Transformer


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return small_transformer()
