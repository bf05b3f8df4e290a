# SPDX-License-Identifier: Apache-2.0
"""Rounding to GGUF's blocks: what the gguf package and our library read is what was meant, and how far off it is."""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from tests.engine.native_model import needs_native
from wedlm.model.formats.gguf_quants import to_blocks
from wedlm.native.library import load

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16", "F32")
# Error of normal weights relative to their size: what llama.cpp's own writers reach without an importance matrix.
MOST = {"Q4_K": 0.075, "Q5_K": 0.038, "Q6_K": 0.019}


def weights(rows: int = 96, cols: int = 512) -> Tensor:
    """Rows of many sizes, some of one sign, constant, zero in part or altogether, or with one large weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, cols, generator=generator) * torch.logspace(-6, 1, rows)[:, None]
    x[0] = 0
    x[1, :300] = 0
    x[2], x[3] = x[2].abs(), -x[3].abs()
    x[4], x[5] = 0.25, -0.25
    x[6, 7] = 1000 * x[6].abs().max()
    x[7] = x[7].bfloat16().float()
    return x


def read(blocks: np.ndarray, kind: str) -> Tensor:
    data = blocks if kind not in ("F16", "F32") else blocks.view({"F16": np.float16, "F32": np.float32}[kind])
    return torch.from_numpy(np.array(dequantize(data, GGMLQuantizationType[kind]), dtype=np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_near_what_was_written(kind):
    x = weights()
    blocks = to_blocks(x, GGMLQuantizationType[kind])
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert blocks.shape == (len(x), x.shape[1] // elements * size)
    found = read(blocks, kind)
    assert torch.isfinite(found).all()
    assert not found[0].any()
    levels = {"Q4": 8, "Q5": 16, "Q6": 32, "Q8": 127}.get(kind[:2], 200)
    # The steps of the smallest rows are subnormal numbers of float16, which are coarse.
    worst = x.unflatten(1, (-1, 32)).abs().amax(dim=-1, keepdim=True).expand(-1, -1, 32).flatten(1)
    if kind[-1] == "K":
        worst = x.unflatten(1, (-1, 256)).abs().amax(dim=-1, keepdim=True).expand(-1, -1, 256).flatten(1)
    assert ((found - x).abs() <= 1.6 * worst / levels + 4e-6).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_errors_are_at_most_the_gguf_packages(kind):
    x = weights()
    theirs = read(gguf.quants.quantize(x.numpy(), GGMLQuantizationType[kind]), kind)
    ours = read(to_blocks(x, GGMLQuantizationType[kind]), kind)
    assert (ours - x).square().sum() <= (theirs - x).square().sum()


@pytest.mark.parametrize("kind", MOST)
def test_k_quants_search_for_their_scales(kind):
    """Of normal weights. Plain rounding between a part's least and largest weight is up to a tenth worse."""
    x = torch.randn(128, 1024, generator=torch.Generator().manual_seed(1))
    error = (read(to_blocks(x, GGMLQuantizationType[kind]), kind) - x).norm() / x.norm()
    assert error < MOST[kind]
    legacy = {"Q4_K": "Q4_1", "Q5_K": "Q5_1", "Q6_K": "Q5_1"}[kind]  # which take more bits, or nearly as many
    assert error < (read(to_blocks(x, GGMLQuantizationType[legacy]), legacy) - x).norm() / x.norm()


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_our_library_reads_the_gguf_packages_values(kind):
    x = weights()
    blocks = np.ascontiguousarray(to_blocks(x, GGMLQuantizationType[kind]))
    ours = np.empty(x.shape, dtype=np.float32)
    data, out = (ctypes.c_void_p(array.ctypes.data) for array in (blocks, ours))
    assert load().wedlm_test_unpack(GGMLQuantizationType[kind], *x.shape, data, None, out) == 0
    assert torch.equal(torch.from_numpy(ours), read(blocks, kind))


def test_rows_that_blocks_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="a row has 576 weights; expected a multiple of 256 for Q4_K"):
        to_blocks(torch.zeros(2, 576), GGMLQuantizationType.Q4_K)
