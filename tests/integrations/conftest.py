# SPDX-License-Identifier: Apache-2.0
"""The plug-in is a package of its own, which is not installed here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "integrations" / "vllm"))
