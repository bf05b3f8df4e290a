# SPDX-License-Identifier: Apache-2.0
"""Small models and steps for the native forward's tests."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wedlm.attention.base import ExtendBatch, KVCache, RowVisibility
from wedlm.model import ModelConfig, Transformer
from wedlm.model.lora.masked_rows import attach_masked_lora


def tiny_model(seed: int, **changes: object) -> Transformer:
    """Random weights, biases and norms away from their neutral values."""
    values: dict[str, object] = {
        "model_type": "llama", "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": 512,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(values | changes)))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.3)
            elif "embed" not in name and "lm_head" not in name:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.normal_()
    return model.eval()


@dataclass
class Rows:
    """A step's rows: arguments of a forward but for its plan."""

    tokens: Tensor
    positions: Tensor
    batch: ExtendBatch


def random_cache(seed: int, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype) -> KVCache:
    """Every slot holds something, as after much use."""
    device = torch.device("cpu")
    heads = config.num_kv_heads, config.head_dim
    cache = KVCache(config.num_layers, num_pages, page_size, *heads, dtype, device)
    generator = torch.Generator().manual_seed(seed)
    for part, scale in ((cache.keys, cache.key_scale), (cache.values, cache.value_scale)):
        exact = torch.randn(part.shape, generator=generator)
        if scale is None:
            part.copy_(exact)
        else:
            scale.copy_(exact.abs().amax(dim=-1) / 127)
            part.copy_((exact / scale[..., None]).round())
    return cache


def copy_of(cache: KVCache) -> KVCache:
    num_layers, num_slots, *heads = cache.keys.shape
    copy = KVCache(
        num_layers, num_slots // cache.page_size, cache.page_size, *heads, cache.keys.dtype, cache.keys.device
    )
    for part, other in zip(parts_of(copy), parts_of(cache), strict=True):
        part.copy_(other)
    return copy


def parts_of(cache: KVCache) -> list[Tensor]:
    """All that it holds."""
    parts = (cache.keys, cache.values, cache.key_scale, cache.value_scale)
    return [part for part in parts if part is not None]


def random_rows(rng: np.random.Generator, vocab_size: int, num_pages: int, page_size: int, hides: bool) -> Rows:
    """Up to four sequences on pages in any order, rows at positions in any order, some rows hidden from others."""
    free = rng.permutation(num_pages).tolist()
    starts, counts, pages, shared, own = [], [], [], [], []
    for _ in range(rng.integers(1, 5)):
        most = len(free) * page_size
        count = int(rng.integers(1, min(12, most) + 1))
        start = int(rng.integers(0, min(most - count, 90) + 1))
        starts.append(start)
        counts.append(count)
        pages.append([free.pop() for _ in range(-(-(start + count) // page_size))])
        for row in range(count):
            shared.append(int(rng.integers(0, row + 1)))
            own.append(int(rng.integers(0, row + 1)))
        if not free:
            break
    total = sum(counts)
    visibility = RowVisibility(torch.tensor(shared), torch.tensor(own)) if hides else None
    return Rows(
        tokens=torch.from_numpy(rng.integers(0, vocab_size, total)),
        positions=torch.from_numpy(rng.integers(0, 500, total)),
        batch=ExtendBatch(starts, counts, pages, visibility),
    )


FAMILIES = {
    "llama": {},
    "qwen2, biases": {"model_type": "qwen2", "qkv_bias": True, "num_heads": 6, "num_kv_heads": 1, "head_dim": 10},
    "qwen3, norms": {"model_type": "qwen3", "qk_norm": True, "head_dim": 80, "tie_word_embeddings": True},
    "llama, all biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "hidden_size": 50, "num_heads": 2},
}


def adapted_model(seed: int, layers: str = "proj.weight", **changes: object) -> Transformer:
    """``tiny_model`` with matrices of ranks 3 to 40 beside the layers named so, as large as the weights' own part."""
    model, generator = tiny_model(seed, **changes), torch.Generator().manual_seed(seed)
    matrices = {}
    for name, weight in model.named_parameters():
        if name.startswith("model.layers.") and name.endswith(layers):
            rank = int(torch.randint(3, 41, (1,), generator=generator))
            a, b = (
                torch.randn(rank, weight.shape[1], generator=generator),
                torch.randn(len(weight), rank, generator=generator),
            )
            matrices[name] = (a / weight.shape[1] ** 0.5, b / rank**0.5)
    attach_masked_lora(model, matrices, torch.randn(model.config.hidden_size, generator=generator))
    return model
