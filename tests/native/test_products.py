# SPDX-License-Identifier: Apache-2.0
"""Weight formats and products: against the gguf package's reference, and equal on every instruction set."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from tests.native.conftest import PATHS
from wedlm.native.library import load
from wedlm.native.weights import FORMATS, INT8

BLOCK_FORMATS = [name for name in FORMATS.values() if name[0] == "Q"]
ROWS, COLS = 37, 512


def random_blocks(name: str, seed: int, rows: int = ROWS, cols: int = COLS) -> np.ndarray:
    """uint8 [rows, bytes of a row]: any bits but for the half-precision scales, which are ordinary numbers."""
    kind, rng = GGMLQuantizationType[name], np.random.default_rng(seed)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, cols // block, size), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(name, (0,))
    for at in halves:
        scales = rng.normal(size=(rows, cols // block, 1)).astype(np.float16)
        blocks[:, :, at : at + 2] = scales.view(np.uint8).reshape(rows, cols // block, 2)
    return blocks.reshape(rows, -1)


def product(path: str, number: int, data: np.ndarray, scale: np.ndarray | None, cols: int, x: np.ndarray) -> np.ndarray:
    data, x = np.ascontiguousarray(data), np.ascontiguousarray(x, dtype=np.float32)
    y = np.full((len(x), len(data)), np.nan, dtype=np.float32)
    at = None if scale is None else scale.ctypes.data
    assert not load().wedlm_test_product(
        path.encode(), number, len(data), cols, data.ctypes.data, at, len(x), x.ctypes.data, y.ctypes.data
    )
    return y


def quantized_inputs(x: np.ndarray, block: int) -> np.ndarray:
    """What the kernels make of inputs: eight bits with one scale for each ``block``, in float64."""
    parts = x.reshape(len(x), -1, block).astype(np.float32)
    most = np.abs(parts).max(axis=2, keepdims=True)
    factor = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 1e-36)
    return (np.rint(parts * factor).astype(np.float64) * (most / np.float32(127))).reshape(x.shape)


def extreme_inputs(cols: int) -> np.ndarray:
    """Rows at the ends of what eight bits hold: all equal, alternating, zero, one value alone, tiny, huge."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(9, cols)).astype(np.float32)
    x[0], x[1], x[2] = 1.0, -1.0, 0.0
    x[3] = np.where(np.arange(cols) % 2, 127.0, -127.0)
    x[4] = 0.0
    x[4, 3] = 5.0
    x[5] *= 1e-38
    x[5, 0] = 0.0  # times an overflowed factor it would be no number
    x[6] *= 1e30
    return x


@pytest.mark.parametrize("name", FORMATS.values())
def test_unpacking_is_the_references(name):
    kind = GGMLQuantizationType[name]
    if name in BLOCK_FORMATS:
        data = random_blocks(name, seed=1)
        expected = dequantize(data, kind)
    else:
        expected = np.random.default_rng(1).normal(size=(ROWS, COLS)).astype(np.float32)
        data = expected
        if name != "F32":
            data = quantize(expected, kind)
            expected = dequantize(data, kind)
    out = np.empty((ROWS, COLS), dtype=np.float32)
    data = np.ascontiguousarray(data)
    load().wedlm_test_unpack(int(kind), ROWS, COLS, data.ctypes.data, None, out.ctypes.data)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", FORMATS.values())
def test_products_are_those_of_the_dequantised_weights(name):
    kind = GGMLQuantizationType[name]
    data = random_blocks(name, seed=2) if name in BLOCK_FORMATS else None
    x = np.random.default_rng(3).normal(size=(5, COLS)).astype(np.float32)
    if data is None:
        data = np.random.default_rng(2).normal(size=(ROWS, COLS)).astype(np.float32)
        data = data if name == "F32" else quantize(data, kind)
    weights = dequantize(data, kind).astype(np.float64)
    inputs = quantized_inputs(x, 32) if name in BLOCK_FORMATS else x.astype(np.float64)

    y = product("portable", int(kind), data, None, COLS, x)

    expected = inputs @ weights.T
    error = np.abs(y - expected).max() / np.abs(inputs[:, None] * weights[None]).sum(-1).max()
    assert error < 1e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cols", [4, 30, 576])
def test_int8_sums_are_exact(path, cols):
    """Extremes of weights and inputs: the sums are those of 64-bit integers."""
    rng = np.random.default_rng(4)
    weights = rng.integers(-127, 128, (33, cols)).astype(np.int8)
    weights[0], weights[1], weights[2] = 127, -127, 0
    weights[3] = np.where(np.arange(cols) % 2, 127, -127)
    x = extreme_inputs(cols)
    scale = rng.uniform(0.5, 2, len(weights)).astype(np.float32)

    y = product(path, INT8, weights, scale, cols, x)

    # Whole sums of each block of 32 inputs; blocks are added in order, each product rounded once, by fma.
    expected = np.zeros((len(x), len(weights)), dtype=np.float32)
    for first in range(0, cols, 32):
        part, own = x[:, first : first + 32], weights[:, first : first + 32].astype(np.int64)
        most = np.abs(part).max(axis=1, keepdims=True)
        factor = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 1e-36)
        sums = np.rint(part * factor).astype(np.int64) @ own.T
        exact = sums.astype(np.longdouble) * (most / np.float32(127)) + expected
        expected = exact.astype(np.float32)
    np.testing.assert_array_equal(y, expected * scale)


@pytest.mark.parametrize("path", PATHS[:-1])
@pytest.mark.parametrize("name", [*FORMATS.values(), "INT8"])
def test_products_are_equal_on_every_path_alone_and_together(path, name):
    number = INT8 if name == "INT8" else int(GGMLQuantizationType[name])
    scale = None
    if name in BLOCK_FORMATS:
        data = random_blocks(name, seed=6)
    elif name == "INT8":
        data = np.random.default_rng(6).integers(-127, 128, (ROWS, COLS)).astype(np.int8)
        scale = np.random.default_rng(6).uniform(0.5, 2, ROWS).astype(np.float32)
    else:
        data = np.random.default_rng(6).normal(size=(ROWS, COLS)).astype(np.float32)
        data = data if name == "F32" else quantize(data, GGMLQuantizationType[name])
    x = np.concatenate([extreme_inputs(COLS), np.random.default_rng(8).normal(size=(14, COLS)).astype(np.float32)])

    expected = product("portable", number, data, scale, COLS, x)

    np.testing.assert_array_equal(product(path, number, data, scale, COLS, x), expected)
    for count in (1, 2, 3, 4, 5, 8, 11, 16):
        part = product(path, number, data, scale, COLS, x[-count:])
        np.testing.assert_array_equal(part, expected[-count:])


@pytest.mark.parametrize("path", PATHS)
def test_saturated_quants(path):
    """Every quant of a block at its largest, or its smallest: no sum of pairs may saturate on the way."""
    for name, fill in (("Q8_0", 0x80), ("Q8_0", 0x7F), ("Q4_0", 0xFF), ("Q5_0", 0xFF), ("Q6_K", 0xFF), ("Q5_K", 0xFF)):
        kind = GGMLQuantizationType[name]
        block, size = GGML_QUANT_SIZES[kind]
        data = np.full((16, 2, size), fill, dtype=np.uint8)
        one = np.array([1], dtype=np.float16).view(np.uint8)
        for at in {"Q5_K": (0, 2), "Q6_K": (208,)}.get(name, (0,)):
            data[:, :, at : at + 2] = one
        data = data.reshape(16, -1)
        x = np.stack([np.full(2 * block, 127.0), np.full(2 * block, -127.0)]).astype(np.float32)
        expected = x.astype(np.float64) @ dequantize(data, kind).astype(np.float64).T
        np.testing.assert_allclose(product(path, int(kind), data, None, 2 * block, x), expected, rtol=1e-6)
