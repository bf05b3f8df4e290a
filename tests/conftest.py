# SPDX-License-Identifier: Apache-2.0
"""Shapes in signatures are checked while the tests run, in the layers that state them."""

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
install_import_hook([f"wedlm.{name}" for name in _CHECKED], "beartype.beartype")
torch.set_num_threads(2)
