# SPDX-License-Identifier: Apache-2.0
"""``flash_attn_interface`` in plain torch operations: what its documentation says of the arguments that we use."""

import sys
from types import ModuleType

import pytest
import torch

from wedlm.attention import flash

NAME = "flash_attn_interface"


def install(monkeypatch: pytest.MonkeyPatch, call) -> None:
    """Put in a package whose function is ``call``, and a Hopper GPU."""
    module = ModuleType(NAME)
    module.flash_attn_with_kvcache = call
    monkeypatch.setitem(sys.modules, NAME, module)
    pretend_hopper(monkeypatch)


def pretend_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_is_hopper", lambda _: True)
    monkeypatch.setattr(flash, "_tried", flash._tried.__wrapped__)  # which remembers nothing


class Stub:
    """The function, counting its calls. ``without_keys``: what rows get that see no keys (zero, as documented)."""

    def __init__(self, without_keys: float = 0.0) -> None:
        self.num_calls, self.without_keys = 0, without_keys

    def __call__(  # noqa: PLR0913  (the package's signature)
        self,
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        qv=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        page_table=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        max_seqlen_q=None,
        rotary_seqlens=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        rotary_interleaved=True,
        scheduler_metadata=None,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
        return_softmax_lse=False,
    ):
        unused = (k, v, qv, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, cu_seqlens_k_new, rotary_seqlens)
        assert all(one is None for one in (*unused, q_descale, k_descale, v_descale, scheduler_metadata))
        assert causal
        assert (window_size, attention_chunk, softcap, return_softmax_lse) == ((-1, -1), 0, 0.0, False)
        assert q.dtype == k_cache.dtype == v_cache.dtype
        for numbers in (cache_seqlens, page_table, cu_seqlens_q):
            assert numbers.dtype == torch.int32
            assert numbers.is_contiguous()
        _, page_size, kv_heads, head_dim = k_cache.shape
        assert k_cache.shape == v_cache.shape
        assert q.shape[2] == head_dim
        edges = cu_seqlens_q.tolist()
        assert len(edges) - 1 == len(cache_seqlens) == len(page_table)
        assert (edges[0], edges[-1], edges) == (0, len(q), sorted(edges))
        self.num_calls += 1
        out = torch.full_like(q, self.without_keys)
        for first, stop, num_keys, pages in zip(edges, edges[1:], cache_seqlens.tolist(), page_table, strict=False):
            count = stop - first
            assert count <= max_seqlen_q
            if not count or not num_keys:
                continue
            used = pages[: -(-num_keys // page_size)].long()
            keys, values = (
                cache[used].flatten(0, 1)[:num_keys].float().repeat_interleave(q.shape[1] // kv_heads, dim=1)
                for cache in (k_cache, v_cache)
            )
            scores = torch.einsum("rhd,khd->hrk", q[first:stop].float(), keys) * softmax_scale
            hidden = torch.ones(count, num_keys, dtype=torch.bool).triu(num_keys - count + 1)
            weights = scores.masked_fill(hidden.to(q.device), -torch.inf).softmax(dim=-1)
            out[first:stop] = torch.einsum("hrk,khd->rhd", weights, values).to(q.dtype)
        return out
