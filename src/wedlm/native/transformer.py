# SPDX-License-Identifier: Apache-2.0
"""A model whose forward is one native call, with the same rows in and logits out as ``Transformer``, its slow twin.

Shape suffixes are as in ``wedlm.model.transformer``.
"""

import ctypes
import itertools
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.attention.sdpa import CausalAttend
from wedlm.model import ModelConfig
from wedlm.model.lora.masked_rows import MaskedParts
from wedlm.model.rope import RotaryEmbedding
from wedlm.native.library import NativeError, Shape, Step, chosen_path, load, num_threads

_ERROR_BYTES = 512
_ROPE_CHUNK = 1024  # positions; tables grow by whole chunks, each computed in one go, so that their bits never change
PackedSource = tuple[np.ndarray, np.ndarray | None]  # contiguous rows in a source's format, and their scales
_CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


@dataclass(frozen=True)
class NativeAttend:
    """The plan of a step: where its sequences' keys are. It is for this model what ``PagedSdpa`` is for
    ``Transformer``."""

    cache: KVCache
    batch: ExtendBatch


@dataclass(frozen=True)
class GreedyRows:
    """The choice at temperature 0 in L rows, without their logits.

    ``token`` [L] is the largest logit except the row's banned ids, the lowest id of several equal ones, and
    ``token_logit`` [L] its logit. ``entropy`` (nats) and ``logsumexp`` (log of the sum of exponentials) [L] are over
    all logits.
    """

    token: Tensor
    token_logit: Tensor
    entropy: Tensor
    logsumexp: Tensor


class NativeTransformer:
    """Weights in the library's memory, and calls of its forward. ``wedlm.native.weights`` makes it.

    ``path`` forces an instruction set (None: $WEDLM_NATIVE_PATH, or the fastest). ``threads`` None means one per core
    that this process may use. Two calls at once wait for each other. Raises NativeError.
    """

    def __init__(self, config: ModelConfig, *, path: str | None = None, threads: int | None = None) -> None:
        self.config = config
        self.path, self.threads = chosen_path(path), num_threads(threads)
        self._library = load()
        shape = Shape(
            config.num_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.vocab_size,
            config.rms_norm_eps,
        )
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        self._model = self._library.wedlm_model_new(shape, self.path.encode(), self.threads, error, _ERROR_BYTES)
        if not self._model:
            raise NativeError(error.value.decode())
        self._finalizer = weakref.finalize(self, self._library.wedlm_model_free, self._model)
        if config.tie_word_embeddings:
            self._library.wedlm_model_tie(self._model)
        self._rotary = RotaryEmbedding(config)
        self._cos = self._sin = np.zeros((0, config.head_dim // 2), dtype=np.float32)
        self._own_cache: KVCache | None = None
        self.matrix_bytes: Counter[int] = Counter()  # of the matrices in each format, as in their source
        self.masked_lora: MaskedParts = {}, None  # the model's own, for requests without an adapter by name

    def close(self) -> None:
        """Free the weights and end the threads. The model cannot be called afterwards."""
        self._finalizer()

    @property
    def handle(self) -> int:
        """The library's model."""
        if not self._finalizer.alive:
            raise NativeError("the model was closed; expected one that is open")
        return self._model

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return int(self._library.wedlm_model_bytes(self._model))

    def set_matrix(
        self,
        layer: int,
        which: int,
        format: int,
        shape: Sequence[int],
        data: np.ndarray,
        scale: np.ndarray | None = None,
    ) -> None:
        """Pack matrix ``which`` of ``layer`` from contiguous rows in the source's format (``wedlm.native.weights``)."""
        rows, cols = shape
        self.matrix_bytes[format] += data.nbytes
        at = None if scale is None else scale.ctypes.data
        self._check(
            self._library.wedlm_model_set_matrix, self.handle, layer, which, format, rows, cols, data.ctypes.data, at
        )

    def set_factors(self, factors: int, layer: int, which: int, format: int, a: PackedSource, b: PackedSource) -> None:
        """Add b a x to the result of matrix ``which`` of ``layer`` for rows of these ``factors``: twice an adapter's
        slot, plus one for its masked rows."""
        at = [None if part is None else part.ctypes.data for part in (*a, *b)]
        rank = len(a[0])
        self._check(self._library.wedlm_model_set_factors, self.handle, factors, layer, which, format, rank, *at)

    def set_start(self, factors: int, start: np.ndarray) -> None:
        """Let rows of these ``factors`` start from ``start`` [C], float32, in place of their token's embedding."""
        self._check(self._library.wedlm_model_set_start, self.handle, factors, start.size, start.ctypes.data)

    def drop_factors(self, factors: int) -> None:
        """Free the memory of these ``factors``, if they exist."""
        self._library.wedlm_model_drop_factors(self.handle, factors)

    def set_vector(self, layer: int, which: int, data: np.ndarray) -> None:
        """Copy a norm's weight or a bias, float32."""
        self._check(self._library.wedlm_model_set_vector, self.handle, layer, which, data.size, data.ctypes.data)

    def __call__(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: NativeAttend | CausalAttend,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
        adapters_T: Tensor | None = None,
    ) -> Tensor:
        """Logits [L, V], float32, of the rows ``logits_rows`` (None: all). ``masked`` and ``adapters_T`` as in
        ``Transformer``."""
        if logits_rows is None:
            logits_rows = torch.arange(len(tokens_T))
        logits = torch.empty(len(logits_rows), self.config.vocab_size)
        self._forward(tokens_T, positions_T, attend, logits_rows, masked, adapters_T, {"logits": logits.data_ptr()})
        return logits

    def greedy(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: NativeAttend | CausalAttend,
        logits_rows: Tensor,
        banned: Sequence[Sequence[int]] | None = None,
        masked: Tensor | None = None,
    ) -> GreedyRows:
        """The choice in each of ``logits_rows``; row i must not choose the ids ``banned[i]``."""
        count = len(logits_rows)
        rows = GreedyRows(torch.empty(count, dtype=torch.long), *(torch.empty(count) for _ in range(3)))
        lists = banned if banned is not None else [()] * count
        if len(lists) != count:
            raise NativeError(f"there are {len(lists)} lists of banned tokens; expected {count}, one per row")
        ids = np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int64)
        offsets = np.cumsum([0, *(len(one) for one in lists)], dtype=np.int64)
        outputs = {
            "token": rows.token.data_ptr(),
            "token_logit": rows.token_logit.data_ptr(),
            "entropy": rows.entropy.data_ptr(),
            "logsumexp": rows.logsumexp.data_ptr(),
            "banned": ids.ctypes.data,
            "banned_offsets": offsets.ctypes.data,
        }
        self._forward(tokens_T, positions_T, attend, logits_rows, masked, None, outputs)
        return rows

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: NativeAttend | CausalAttend,
        logits_rows: Tensor,
        masked: Tensor | None,
        adapters: Tensor | None,
        outputs: dict[str, int],
    ) -> None:
        if isinstance(attend, CausalAttend):
            attend = self._uncached(len(tokens))
        elif not isinstance(attend, NativeAttend):
            raise NativeError(f"attend is a {type(attend).__name__}; expected NativeAttend or CausalAttend")
        cache, batch = attend.cache, attend.batch
        cache_type = self.cache_type(cache)
        # Kept in variables: the library reads them by their addresses.
        tokens, positions, wanted = (_int64(part) for part in (tokens, positions, logits_rows))
        if len(positions) != len(tokens):
            raise NativeError(f"there are {len(positions)} positions; expected {len(tokens)}, one per token")
        starts, counts = np.asarray(batch.starts, dtype=np.int64), np.asarray(batch.counts, dtype=np.int64)
        lengths = [len(pages) for pages in batch.pages]
        if not len(starts) == len(counts) == len(lengths):
            raise NativeError(f"there are {len(starts)} starts, {len(counts)} counts and {len(lengths)} page tables")
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        pages = np.fromiter(itertools.chain.from_iterable(batch.pages), dtype=np.int32, count=int(offsets[-1]))
        shared = own_start = None
        if batch.visibility is not None:
            shared, own_start = _int64(batch.visibility.shared), _int64(batch.visibility.own_start)
            if not len(shared) == len(own_start) == len(tokens):
                raise NativeError(f"visibility is of {len(shared)} rows; expected {len(tokens)}")
        factors = np.zeros(len(tokens), dtype=np.int32)
        if adapters is not None:
            if len(adapters) != len(tokens):
                raise NativeError(f"adapters are of {len(adapters)} rows; expected {len(tokens)}")
            factors += 2 * adapters.cpu().numpy().astype(np.int32)
        if masked is not None:
            if masked.dtype == torch.bool and len(masked) != len(tokens):
                raise NativeError(f"masked is of {len(masked)} rows; expected {len(tokens)}")
            factors[masked.cpu().numpy()] += 1
        cos, sin = self.angles(int(positions.max()) + 1 if len(positions) else 0)
        step = Step(
            num_rows=len(tokens),
            num_sequences=len(starts),
            tokens=tokens.data_ptr(),
            positions=positions.data_ptr(),
            starts=starts.ctypes.data,
            counts=counts.ctypes.data,
            pages=pages.ctypes.data,
            page_offsets=offsets.ctypes.data,
            shared=None if shared is None else shared.data_ptr(),
            own_start=None if own_start is None else own_start.data_ptr(),
            factors=factors.ctypes.data,
            **cache_pointers(cache),
            cache_type=cache_type,
            page_size=cache.page_size,
            num_slots=cache.keys.shape[1],
            cos=cos.ctypes.data,
            sin=sin.ctypes.data,
            num_positions=len(cos),
            num_logits=len(wanted),
            logits_rows=wanted.data_ptr(),
            **outputs,
        )
        self._check(self._library.wedlm_model_forward, self.handle, step)

    def cache_type(self, cache: KVCache) -> int:
        """The library's number for the cache's type. NativeError if this model cannot use the cache."""
        if cache.keys.dtype not in _CACHE_TYPES or cache.keys.device.type != "cpu":
            raise NativeError(
                f"the cache is {cache.keys.dtype} on {cache.keys.device}; expected float32, bfloat16 or int8 on cpu"
            )
        num_layers, _, *heads = cache.keys.shape
        expected = [self.config.num_kv_heads, self.config.head_dim]
        if num_layers != self.config.num_layers or heads != expected:
            raise NativeError(f"the cache is {[num_layers, *heads]}; expected {[self.config.num_layers, *expected]}")
        return _CACHE_TYPES[cache.keys.dtype]

    def angles(self, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
        """RoPE's cosines and sines [P, D / 2], where P is at least ``num_positions``, up to the model's length."""
        self._grow_tables(num_positions)
        return self._cos, self._sin

    def _uncached(self, num_rows: int) -> NativeAttend:
        """Run rows of one sequence that are not kept, in a temporary cache."""
        if self._own_cache is None or self._own_cache.keys.shape[1] < num_rows:
            shape = self.config
            sizes = (shape.num_layers, max(num_rows, 64), 1, shape.num_kv_heads, shape.head_dim)
            self._own_cache = KVCache(*sizes, torch.float32, torch.device("cpu"))
        return NativeAttend(self._own_cache, ExtendBatch([0], [num_rows], [list(range(num_rows))]))

    def _grow_tables(self, num_positions: int) -> None:
        longest = -(-self.config.max_length // _ROPE_CHUNK) * _ROPE_CHUNK
        while len(self._cos) < min(num_positions, longest):
            # Twice as long each time, so that growing costs nothing in the long run.
            first = np.arange(len(self._cos), min(max(2 * len(self._cos), num_positions), longest), _ROPE_CHUNK)
            half = self.config.head_dim // 2
            parts = [self._rotary(torch.arange(at, at + _ROPE_CHUNK), torch.float32) for at in first.tolist()]
            self._cos = np.concatenate([self._cos, *(cos[:, :half].numpy() for cos, _ in parts)])
            self._sin = np.concatenate([self._sin, *(sin[:, half:].numpy() for _, sin in parts)])

    def _check(self, function: Any, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        if function(*arguments, error, _ERROR_BYTES):
            raise NativeError(error.value.decode())


def cache_pointers(cache: KVCache) -> dict[str, int | None]:
    """Where the library finds keys, values and their scales."""
    parts = {"keys": cache.keys, "values": cache.values, "key_scale": cache.key_scale, "value_scale": cache.value_scale}
    return {name: None if part is None else part.data_ptr() for name, part in parts.items()}


def _int64(tensor: Tensor) -> Tensor:
    """The tensor as contiguous int64 on the CPU."""
    return tensor.to("cpu", torch.int64).contiguous()
