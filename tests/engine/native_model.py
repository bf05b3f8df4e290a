# SPDX-License-Identifier: Apache-2.0
"""A tiny random model on the native forward, with what the tests of histories ask of a model."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.native.shapes import parts_of
from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.model import ModelConfig, Transformer
from wedlm.model.lora.masked_rows import attach_masked_lora
from wedlm.native import NativeAttend, is_available
from wedlm.native.weights import native_from_torch

needs_native = pytest.mark.skipif(
    not is_available() and os.environ.get("WEDLM_REQUIRE_NATIVE") != "1",
    reason="the native library was not built: no C++ compiler",
)
CONFIG = ModelConfig(
    model_type="qwen3", vocab_size=13, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256, qk_norm=True,
)  # fmt: skip


def attach_random(model: Transformer) -> None:
    """A random LoRA for masked rows beside each of the layers' matrices."""
    matrices = {
        name: (0.3 * torch.randn(4, weight.shape[1]), 0.3 * torch.randn(weight.shape[0], 4))
        for name, weight in model.named_parameters()
        if name.endswith("proj.weight")
    }
    attach_masked_lora(model, matrices, torch.randn(model.config.hidden_size))


class NativeModel:
    """Weights large enough that predictions differ in confidence; ``adapter``: with a random one of masked rows.

    ``cache_dtype``: of the caches that it is used with.
    """

    vocab_size, mask_token_id, block_length = CONFIG.vocab_size, 12, 1
    heads = (CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.head_dim)

    def __init__(self, threads: int = 1, adapter: bool = False, cache_dtype: torch.dtype = torch.float32) -> None:
        self.cache_dtype = cache_dtype
        torch.manual_seed(0)
        model = Transformer(CONFIG)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.35)
        if adapter:
            attach_random(model)
        self.runs = native_from_torch(model, "int8", threads=threads)

    def check_cache(self, cache: KVCache, slots: list[int], tokens: list[int], positions: Sequence[int]) -> None:
        """The slots must hold these tokens' keys and values, bit for bit as one forward over all of them writes them:
        whatever windows, chunks and company they came from."""
        if not tokens:
            return
        attend = self._fresh(len(tokens))
        self.runs(torch.tensor(tokens), torch.tensor(positions), attend, torch.arange(0))
        for part, own in zip(parts_of(cache), parts_of(attend.cache), strict=True):
            assert torch.equal(part[:, slots], own)

    def _fresh(self, num_rows: int) -> NativeAttend:
        """Rows of one sequence in a cache of their own."""
        own = KVCache(self.heads[0], num_rows, 1, *self.heads[1:], self.cache_dtype, torch.device("cpu"))
        return NativeAttend(own, ExtendBatch([0], [num_rows], [list(range(num_rows))]))

    def rows_model(self, tokens: list[int], positions: list[int], num_masked: int = 0) -> Tensor:
        """The same model as reference.py wants it."""
        masked = torch.arange(len(tokens))[len(tokens) - num_masked :]
        with torch.inference_mode():
            return self.runs(torch.tensor(tokens), torch.tensor(positions), self._fresh(len(tokens)), masked=masked)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
