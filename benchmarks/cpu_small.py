# SPDX-License-Identifier: Apache-2.0
"""Small kernels of a CPU step in the forms that were tried, microseconds a call; last line JSON.

python benchmarks/cpu_small.py --threads 2
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from wedlm.model.inference.layers import OneKernelRMSNorm
from wedlm.model.layers import RMSNorm
from wedlm.model.rope import rotate

HEADS, KV_HEADS, DIM, HIDDEN, CONTEXT = 9, 3, 64, 576, 256


def rotate_by_cat(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def attend_folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    rows, share = len(q), HEADS // KV_HEADS
    folded = q.view(1, rows, KV_HEADS, share, DIM).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask.repeat(share, 1))


def attend_gqa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)


def attend_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    rows, share = len(q), HEADS // KV_HEADS
    folded = q.view(rows, KV_HEADS, share, DIM).permute(1, 2, 0, 3).reshape(KV_HEADS, share * rows, DIM).float()
    scores = torch.bmm(folded, k[0].float().transpose(1, 2)) * DIM**-0.5 + mask.repeat(share, 1).float()
    return torch.bmm(torch.softmax(scores, -1), v[0].float())


def forms(rows: int) -> dict[str, Callable[[], Tensor]]:
    """Each small piece of work in the form that is used and in those that were tried."""
    norm = RMSNorm(HIDDEN, 1e-5).bfloat16()
    one_kernel = OneKernelRMSNorm(norm)
    x, qk = torch.randn(rows, HIDDEN).bfloat16(), torch.randn(rows, HEADS + KV_HEADS, DIM).bfloat16()
    q, k = qk.split((HEADS, KV_HEADS), dim=1)
    cos, sin = torch.randn(2, rows, DIM).bfloat16()
    keys, values = (torch.randn(1, CONTEXT + rows, KV_HEADS, DIM).bfloat16().transpose(1, 2) for _ in range(2))
    mask = torch.zeros(rows, CONTEXT + rows).masked_fill(
        torch.ones(rows, CONTEXT + rows).triu(CONTEXT + 1) > 0, -torch.inf
    )
    mask = mask.bfloat16()
    return {
        "RMSNorm, torch": lambda: norm(x),
        "RMSNorm, one kernel (used)": lambda: one_kernel(x),
        "RoPE of q, k apart, cat": lambda: (rotate_by_cat(q, cos, sin), rotate_by_cat(k, cos, sin))[0],
        "RoPE together, addcmul (used)": lambda: rotate(qk, cos, sin),
        "attention, enable_gqa": lambda: attend_gqa(q, keys, values, mask),
        "attention, float32 products": lambda: attend_float32(q, keys, values, mask),
        "attention, heads folded (used)": lambda: attend_folded(q, keys, values, mask),
    }


def microseconds(function: Callable[[], Tensor], calls: int = 100) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e6


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, dict[int, float]] = {}
    for rows in (1, 4, 16):
        for name, function in forms(rows).items():
            samples = [microseconds(function) for _ in range(9)]
            results.setdefault(name, {})[rows] = statistics.median(samples[2:])
    print("| | 1 row | 4 rows | 16 rows |\n| --- | --- | --- | --- |")
    for name, by_rows in results.items():
        print(f"| {name} | " + " | ".join(f"{value:.0f}" for value in by_rows.values()) + " |")
    print(json.dumps({"benchmark": "cpu_small", "threads": args.threads, "torch": torch.__version__, "us": results}))


if __name__ == "__main__":
    main()
