# SPDX-License-Identifier: Apache-2.0
"""Memory of the checkpoints that docs/models.md lists, computed from their shapes. The page has what this prints."""

from dataclasses import dataclass

GB = 10**9
CONTEXT = 32_768
UTILIZATION = 0.9  # EngineOptions.gpu_memory_utilization
CARDS = {"RTX 4090": 24, "RTX 5090": 32, "RTX 6000 Ada": 48, "H100": 80, "H200": 141}  # GB, as they are sold


@dataclass(frozen=True)
class Shape:
    """The sizes that decide memory. ``tied``: the output projection is the embedding."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def linear(self) -> int:
        """Weights of the layers' matrices, which FP8 rounds."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (queries + 2 * keys) + queries * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def others(self) -> int:
        """Embedding, output projection, norms and biases, which stay in 16 bits."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden + self.qkv_bias * (queries + 2 * keys) + self.qk_norm * 2 * self.head_dim
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden + self.layers * layer

    def weights(self, linear_bits: float, other_bits: float = 16) -> float:
        """GB."""
        return (self.linear * linear_bits + self.others * other_bits) / 8 / GB

    def cache(self, tokens: int, bytes_each: float = 2) -> float:
        """GB of keys and values."""
        return tokens * 2 * self.layers * self.kv_heads * self.head_dim * bytes_each / GB


SHAPES = {
    "WeDLM-8B (Qwen3-8B)": Shape(4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True),
    "WeDLM-7B (Qwen2.5-7B)": Shape(3584, 18944, 28, 28, 4, 128, 152064, qkv_bias=True),
    "demo (SmolLM2-135M)": Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True),
}


def memory_table() -> str:
    """GB of weights by format, and of one sequence of 32k tokens."""
    lines = [
        "| shape | parameters | bfloat16 | FP8 layers | 8 bits (CPU) | Q4_K_M, about | cache of 32k tokens, bfloat16 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, shape in SHAPES.items():
        parameters = shape.linear + shape.others
        sizes = [
            shape.weights(16),
            shape.weights(8),
            shape.weights(8, 8),
            shape.weights(4.9, 4.9),
            shape.cache(CONTEXT),
        ]
        count = f"{parameters / GB:.2f} G" if parameters >= GB else f"{parameters / 1e6:.0f} M"
        lines.append(f"| {name} | {count} | " + " | ".join(f"{size:.3g} GB" for size in sizes) + " |")
    return "\n".join(lines)


def card_table() -> str:
    """Tokens of cache that 0.9 of a card leaves beside the weights, in thousands; - where weights do not fit."""
    lines = [
        "| card | 8B, bfloat16 | 8B, FP8 | 8B, FP8, cache in FP8 | 7B, bfloat16 | 7B, FP8 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    eight, seven, _ = SHAPES.values()
    for card, size in CARDS.items():
        cells = []
        for shape, bits, each in ((eight, 16, 2), (eight, 8, 2), (eight, 8, 1.032), (seven, 16, 2), (seven, 8, 2)):
            left = UTILIZATION * size - shape.weights(bits)
            tokens = left / shape.cache(1, each)
            cells.append(f"{tokens / 1000:,.0f}k" if tokens > 1000 else "-")
        lines.append(f"| {card}, {size} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table(), card_table(), sep="\n\n")
