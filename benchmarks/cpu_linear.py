# SPDX-License-Identifier: Apache-2.0
"""The matrix products of one step of the demo model on the CPU, by layer kind and rows; last line JSON.

    python benchmarks/cpu_linear.py --threads 2

Weights are distinct per layer, so that they come from memory as they do in a step. Kinds take turns in each repetition.
"""

import argparse
import json
import statistics
import time

import torch
from torch import Tensor, nn

from wedlm.model.inference.layers import Float16Linear, MkldnnLinear

LAYERS, SHAPES, HEAD = 30, ((960, 576), (576, 576), (3072, 576), (576, 1536)), (49152, 576)
ROWS = (1, 4, 8, 16, 32)
FLOAT32 = ("Float16Linear", "int8 weights and inputs")  # what takes inputs of that type


class Plain(nn.Module):
    """torch's own linear layer in bfloat16."""

    def __init__(self, weight: Tensor, bias: None) -> None:
        super().__init__()
        self.weight = weight.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Int8Weights(nn.Module):
    """torch's own weight-only product: int8 weights, a scale for each output."""

    def __init__(self, weight: Tensor, bias: None) -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1) / 127
        self.weight = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.scale = scale.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)


class Int8Both(nn.Module):
    """FBGEMM: int8 weights, and inputs rounded to 8 bits by one scale for all rows."""

    def __init__(self, weight: Tensor, bias: None) -> None:
        super().__init__()
        scale = (weight.float().abs().amax(dim=1) / 127).double()
        zero = torch.zeros(len(weight), dtype=torch.long)
        quantised = torch.quantize_per_channel(weight.float(), scale, zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantised, None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self.packed)


KINDS = {
    "F.linear bfloat16": (Plain, torch.bfloat16),
    "MkldnnLinear bfloat16": (MkldnnLinear, torch.bfloat16),
    "Float16Linear": (Float16Linear, torch.float16),
    "int8 weights": (Int8Weights, torch.bfloat16),
    "int8 weights and inputs": (Int8Both, torch.bfloat16),
}


def products(kind: str) -> list[nn.Module]:
    make, dtype = KINDS[kind]
    shapes = [*SHAPES * LAYERS, HEAD]
    return [make((torch.randn(shape) * 0.02).to(dtype), None) for shape in shapes]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layers = {kind: products(kind) for kind in KINDS}
    results = []
    print(
        "| rows | " + " | ".join(f"{kind}, ms (least)" for kind in KINDS) + " |\n" + "| --- " * (1 + len(KINDS)) + "|"
    )
    for rows in ROWS:
        inputs = {size: torch.randn(rows, size) for size in (576, 1536)}
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for repetition in range(args.repetitions + 2):
            for kind, modules in layers.items():
                given = {s: x if kind in FLOAT32 else x.bfloat16() for s, x in inputs.items()}
                start = time.perf_counter()
                for module, shape in zip(modules, [*SHAPES * LAYERS, HEAD], strict=True):
                    module(given[shape[1]])
                if repetition >= 2:
                    times[kind].append((time.perf_counter() - start) * 1e3)
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        least = {kind: min(values) for kind, values in times.items()}
        print(f"| {rows} | " + " | ".join(f"{medians[kind]:.1f} ({least[kind]:.1f})" for kind in KINDS) + " |")
        results.append({"rows": rows, "median_ms": medians, "least_ms": least})
    print(
        json.dumps({"benchmark": "cpu_linear", "threads": args.threads, "torch": torch.__version__, "results": results})
    )


if __name__ == "__main__":
    main()
