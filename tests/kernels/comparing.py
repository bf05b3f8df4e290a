# SPDX-License-Identifier: Apache-2.0
"""Types and tolerances for comparing kernels with plain torch operations."""

import torch

from wedlm.kernels.fp8 import Fp8Rows
from wedlm.model.inference.quantization import FP8, quantize

# Triton's interpreter has no dot of bfloat16.
DTYPES = [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]


def close(actual, expected, dtype, scale=1.0):
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype] * scale
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


def summable(x, unit):
    """On a GPU x itself. On a CPU x in multiples of ``unit``, whose sums float32 holds exactly in any order: the
    interpreter's products are BLAS's, which on some CPUs orders a sum by its place in the tile."""
    return x if x.is_cuda else (x / unit).round() * unit


def same_rows(actual: Fp8Rows, expected: torch.Tensor) -> None:
    """Those of ``quantize(expected)``, exactly."""
    values, scale = quantize(expected)
    assert actual.values.dtype == FP8
    assert torch.equal(actual.values.float(), values.float())
    assert torch.equal(actual.scale, scale)
