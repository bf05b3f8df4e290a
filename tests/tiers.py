# SPDX-License-Identifier: Apache-2.0
"""Which cases of a test run in every test run, and which in the long one alone."""

import pytest

from wedlm.algorithm.params import DECODINGS

_QUICK = ("streaming", "verified")  # masked rows that decide, and masked rows that are checked
EACH_DECODING = [name if name in _QUICK else pytest.param(name, marks=pytest.mark.long) for name in DECODINGS]
