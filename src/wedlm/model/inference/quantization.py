# SPDX-License-Identifier: Apache-2.0
"""Weights in eight bits, all else as it is: half the bytes at few rows, where reading them is what a step waits for."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LARGEST, _POWER = 127, 128


class Int8Linear(nn.Module):
    """A linear layer of int8 ``weight`` [O, C], each row of which counts ``scale`` [O] (float32) times.

    The numbers are exact in any type that x may have, so the only error is that of rounding the weight, at most half
    a scale: a row's largest weight over 254. On a GPU a kernel of ours reads the eight bits (``kernels/matmul.py``);
    this is its slow twin, which also serves products of many rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        exact = weight.float()
        scale = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        self.weight = nn.Parameter((exact / scale[:, None]).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, power = self.weight.to(x.dtype), 1
        if x.dtype == torch.float16:  # sums stay in range, and nothing is rounded
            weight, power = weight / _POWER, _POWER
        y = F.linear(x, weight).float() * (self.scale * power)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def scale_of(linear: nn.Module) -> Tensor | None:
    """The scales of a layer in eight bits, None for any other."""
    return linear.scale if isinstance(linear, Int8Linear) else None
