# SPDX-License-Identifier: Apache-2.0
"""Weights and inputs in FP8 (e4m3), for tensor cores that multiply such numbers. This halves the bytes, which is what a
step of few rows waits for, and doubles the products at many rows.

int8 belongs to the native forward (``wedlm.native``), on CPUs only.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wedlm.model.config import ModelConfig

Quantization = Literal["int8", "fp8"]
FP8 = torch.float8_e4m3fn
_LARGEST_FP8, _SMALLEST_SCALED = 448.0, 1e-30
# Whether the library's FP8 product adds up a whole row of K in the tensor core, in about 14 bits, instead of moving
# each part to float32. On an H200 that made steps of 128 rows 1 % faster and of 288 rows 6 %, but a row's sums over
# K = 12,288 then depended on how many rows there were.
USE_FAST_ACCUM = False


def check_quantization(
    quantization: Quantization | None, config: ModelConfig, device: torch.device, quantizes_head: bool = False
) -> None:
    """Raises ValueError if torch and our kernels cannot have this model's weights in that type on this device."""
    if quantization == "int8":
        raise ValueError(
            f"quantization is 'int8' and the device is {device}; int8 runs on a CPU's native forward alone: expected "
            "'fp8' on NVIDIA GPUs of compute capability 8.9 or more, or none"
        )
    if quantization == "fp8":
        check_fp8_device(device)
        check_fp8_shape(config, quantizes_head)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has tensor cores for FP8."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def check_fp8_device(device: torch.device) -> None:
    """Raises ValueError unless the device multiplies FP8."""
    if multiplies_fp8(device):
        return
    if device.type != "cuda" or torch.version.cuda is None:
        raise ValueError(
            f"quantization is 'fp8' and the device is {device}; expected an NVIDIA GPU that multiplies FP8"
        )
    number = ".".join(map(str, torch.cuda.get_device_capability(device)))
    raise ValueError(f"quantization is 'fp8' and the GPU has compute capability {number}; expected at least 8.9")


def check_fp8_shape(config: ModelConfig, quantizes_head: bool = False) -> None:
    """Raises ValueError unless both sides of all weights that will be in FP8 are multiples of 16, as FP8
    products need."""
    head = config.head_dim
    sizes = {
        "hidden size": config.hidden_size,
        "intermediate size": config.intermediate_size,
        "width of the query heads": config.num_heads * head,
        "width of all heads": (config.num_heads + 2 * config.num_kv_heads) * head,
    }
    if quantizes_head:
        sizes["vocabulary"] = config.vocab_size
    for name, size in sizes.items():
        if size % 16:
            raise ValueError(f"quantization is 'fp8' and the {name} is {size}; expected a multiple of 16")


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values in e4m3, scale [T] in float32) of x [T, C]; each row's largest number becomes 448, e4m3's largest."""
    x = x.float()
    largest = x.abs().amax(dim=-1).clamp(min=_SMALLEST_SCALED)
    top = torch.full_like(largest, _LARGEST_FP8)  # by a number torch may divide as by its inverse, rounded twice
    return (x * (top / largest)[..., None]).to(FP8), largest / top


class Fp8Linear(nn.Module):
    """A linear layer of ``weight`` [O, C] in e4m3, each row of which is multiplied by its ``scale`` [O] (float32).

    Inputs [T, C] are rounded row by row, so that a row of the product depends on no other. On a GPU the kernels before
    and after it in ``triton_transformer.py`` do the rounding and the scaling; this is their slow twin, on a CPU in
    float32 throughout.
    """

    unit: Tensor  # the scale of all that the library is told

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
        """``weight`` is rounded here, row by row, unless it is in e4m3 already and comes with its ``scale`` [O]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        values, scale = quantize(weight) if scale is None else (weight, scale)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("unit", torch.ones((), dtype=torch.float32, device=weight.device))

    def unscaled(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply rows [T, C] of e4m3 by the weight, without either's scale: [T, O].

        The result is in bfloat16 if ``dtype`` is that, which rounds like any product in bfloat16; otherwise it is in
        float32, because float16 does not reach far enough.
        """
        out_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if not values.is_cuda:
            return F.linear(values.float(), self.weight.float()).to(out_dtype)
        return torch._scaled_mm(
            values, self.weight.t(), self.unit, self.unit, out_dtype=out_dtype, use_fast_accum=USE_FAST_ACCUM
        )

    def forward(self, x: Tensor) -> Tensor:
        values, scale = quantize(x)
        y = self.unscaled(values, x.dtype).float() * scale[:, None] * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)
