# SPDX-License-Identifier: Apache-2.0
"""The model's forward on CPUs, in C++: one call a step, exact whatever rows run together (docs/native.md)."""

from wedlm.native.library import NativeError, describe, is_available
from wedlm.native.transformer import GreedyRows, NativeAttend, NativeTransformer

__all__ = ["GreedyRows", "NativeAttend", "NativeError", "NativeTransformer", "describe", "is_available"]
