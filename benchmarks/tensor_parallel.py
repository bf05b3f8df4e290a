# SPDX-License-Identifier: Apache-2.0
"""Memory of a rank and bytes that it sends a step, by the number of ranks: counted on meta tensors, nothing is run.

    python benchmarks/tensor_parallel.py > benchmarks/results/tensor_parallel/memory.md

In a step each rank sends its part of the embeddings and of both halves of each layer, which the ranks add up
(``Group``: gathered up to 64 rows, NCCL's sum beyond), and four numbers for each row whose token is chosen; here every
row's is. Rank 0 also describes the rows to the others, in about 100 bytes a row.
"""

import torch

from wedlm.attention.base import KVCache
from wedlm.bench.shapes import shape_config
from wedlm.engine.ranks.group import Group
from wedlm.model import ModelConfig, Transformer
from wedlm.model.sharding import Shard

SIZES, BATCHES = (1, 2, 4, 8), (1, 8, 32, 128, 512)
_CHOICE_BYTES = 16  # a row


def weight_bytes(config: ModelConfig, fp8: bool) -> int:
    """Of one rank's part in bfloat16, or with the layers' matrices in eight bits and a scale for each output."""
    with torch.device("meta"):
        model = Transformer(config)
    total = 0
    for name, tensor in model.named_parameters():
        narrow = fp8 and ".layers." in name and tensor.ndim == 2
        total += tensor.numel() + 4 * tensor.shape[0] if narrow else 2 * tensor.numel()
    return total


class Counting(Group):
    """A group that sends nothing and counts what it would have sent."""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.bytes_sent += (self.size - 1) * x.nbytes
        return x.new_empty(self.size, *x.shape)

    @property
    def _connected(self) -> "Counting":
        return self

    def allreduce(self, tensors: list[torch.Tensor]) -> "Counting":
        return self

    def wait(self) -> None:
        pass


def sent_bytes(config: ModelConfig, size: int, rows: int) -> int:
    """By one rank on GPUs in one step, in bfloat16."""
    if size == 1:
        return 0
    group = Counting(0, size, torch.device("cuda"))
    x = torch.empty(rows, config.hidden_size, dtype=torch.bfloat16, device="meta")
    for _ in range(1 + 2 * config.num_layers):
        group.parts(x, x.dtype)
    return group.bytes_sent + (size - 1) * rows * _CHOICE_BYTES


def main() -> None:
    print("# Memory of a rank, and what it sends a step\n")
    print("By `python benchmarks/tensor_parallel.py`: counted on meta tensors, nothing was run on a GPU.\n")
    for name in ("qwen3-8b", "qwen3-32b"):
        whole = shape_config(name)
        print(f"## {name}\n")
        print("| ranks | weights, bfloat16, GB | weights, FP8, GB | cache of 1,000 tokens, bfloat16, MB |")
        print("| ---: | ---: | ---: | ---: |")
        for size in SIZES:
            config = Shard(whole, 0, size).config
            cache = KVCache.bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, torch.bfloat16)
            wide, narrow = (weight_bytes(config, fp8) / 1e9 for fp8 in (False, True))
            print(f"| {size} | {wide:.2f} | {narrow:.2f} | {cache / 1e3:.1f} |")
        print("\nBytes that one rank sends in a step, in MB, by rows:\n")
        print("| ranks | " + " | ".join(map(str, BATCHES)) + " |")
        print("| ---: |" + " ---: |" * len(BATCHES))
        for size in SIZES[1:]:
            print(f"| {size} | " + " | ".join(f"{sent_bytes(whole, size, rows) / 1e6:.2f}" for rows in BATCHES) + " |")
        print()


if __name__ == "__main__":
    main()
