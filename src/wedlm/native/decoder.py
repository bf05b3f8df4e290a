# SPDX-License-Identifier: Apache-2.0
"""A whole step in the library: rows of windows and chunks, forward, choice of tokens, and the windows after it.

The slow twin is ``wedlm.algorithm`` (window, verify, reorder, select, sample) around the same forward.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.window import Emitted, RowResults, WindowState
from wedlm.attention.base import KVCache
from wedlm.native.library import NativeError, load
from wedlm.native.transformer import NativeTransformer, cache_pointers

_ERROR_BYTES = 512


class _WindowParams(Structure):
    """``WedlmWindowParams`` (csrc/decode.h)."""

    _fields_ = (
        *((name, c_int64) for name in ("row_budget", "max_drafts", "max_positions", "min_eos_position")),
        ("suffix_length", c_int64),
        *((name, c_double) for name in ("threshold", "penalty", "draft_entropy", "top_p")),
        ("top_k", c_int64),
        ("seed", c_int64),
        ("temperature", c_float),
        *((name, c_int32) for name in ("is_verified", "is_block", "is_causal", "is_adaptive", "num_top")),
        ("stop_tokens", c_void_p),
        ("num_stop_tokens", c_int64),
    )

    @classmethod
    def of(cls, params: DecodeParams, stop_tokens: np.ndarray, num_top: int = 0) -> "_WindowParams":
        """``stop_tokens`` [E] int64 holds the stop tokens of ``params`` and must outlive the result."""
        return cls(
            params.row_budget,
            params.max_drafts,
            params.max_positions,
            params.min_eos_position,
            params.suffix_length,
            -math.inf if params.entropy_threshold is None else params.entropy_threshold,
            params.pos_penalty,
            params.draft_entropy,
            params.top_p,
            params.top_k,
            params.seed,
            params.temperature,
            params.is_verified,
            params.decoding == "block",
            params.is_causal,
            params.is_adaptive,
            num_top,
            stop_tokens.ctypes.data,
            len(stop_tokens),
        )


class _Slots(Structure):
    """``WedlmSlots``."""

    _fields_ = (
        ("capacity", c_int64),
        ("max_pages", c_int64),
        *((name, c_void_p) for name in ("cached", "width", "tokens", "filled", "logprobs")),
        *((name, c_void_p) for name in ("params", "pages", "num_pages", "adapter")),
    )


class _Decode(Structure):
    """``WedlmDecode``."""

    _fields_ = (
        ("slots", c_void_p),
        ("num_windows", c_int64),
        ("num_chunks", c_int64),
        *((name, c_void_p) for name in ("slot", "chunk_starts", "chunk_counts", "chunk_tokens", "chunk_positions")),
        ("row_limit", c_int64),
        ("most_drafts", c_int64),
        ("wants_logits", c_int32),
        *((name, c_void_p) for name in ("keys", "values", "key_scale", "value_scale")),
        ("cache_type", c_int32),
        ("page_size", c_int32),
        ("num_slots", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("num_positions", c_int64),
        ("results", c_void_p),
        ("result_logprobs", c_void_p),
        ("forward_s", c_double),
        ("num_logits", c_int64),
        *((name, c_void_p) for name in ("sequence", "column", "target", "logits", "raw_logits", "logsumexp")),
        ("most_top", c_int64),
        ("top_tokens", c_void_p),
        ("top_logprobs", c_void_p),
        *((name, c_void_p) for name in ("cached", "width", "tokens", "filled", "logprobs", "run", "shared")),
        *((name, c_void_p) for name in ("choice", "entropy", "choice_logprobs")),
        *((name, c_void_p) for name in ("count", "num_rows", "num_drafts", "emitted", "emitted_logprobs")),
    )


@dataclass(frozen=True)
class Chunk:
    """``tokens`` of the prompt in ``slot``, from the cache's slot ``start`` on, and their positions."""

    slot: int
    start: int
    tokens: Sequence[int]
    positions: Sequence[int]


@dataclass(frozen=True)
class StepTensors:
    """A step between its parts: views of the library's memory, valid until the next step. S windows, C columns, L rows
    with logits.

    ``state`` and ``run`` [S]: the windows after ``extend``, then after ``NativeDecoder.update``. ``shared`` [S, C] is
    that of ``RowLayout``. ``sequence``, ``column`` and ``target`` [L] belong to each row; the last is the position that
    its token is for. ``logits`` [L, V] exclude banned tokens; change them before ``choose``. ``logsumexp`` [L] is over
    all original logits. ``choose`` sets ``results``, and ``update`` sets ``emitted``.
    """

    state: WindowState
    run: Tensor
    shared: Tensor
    sequence: Tensor
    column: Tensor
    target: Tensor
    logits: Tensor
    logsumexp: Tensor
    results: RowResults
    emitted: Emitted


class NativeDecoder:
    """Steps of windows that live in the slots of a ``WindowState``, over one model and one cache.

    A step is ``set_step``, ``run`` and ``read``; if the host takes part in it, ``forward``, ``choose``, ``update`` and
    ``put`` replace ``run``. ``max_length``: positions of a sequence. Raises NativeError.
    """

    def __init__(
        self, model: NativeTransformer, cache: KVCache, num_slots: int, max_length: int, mask_token_id: int
    ) -> None:
        self.model, self.cache, self._num_slots = model, cache, num_slots
        self._vocab_size = model.config.vocab_size
        self._library = _declared()
        self._decoder = self._library.wedlm_decoder_new(self._vocab_size, mask_token_id)
        if not self._decoder:
            raise NativeError("there is not enough memory for a decoder")
        self._finalizer = weakref.finalize(self, self._library.wedlm_decoder_free, self._decoder)
        self._params = (_WindowParams * num_slots)()
        self._stop_tokens: list[np.ndarray] = [np.zeros(0, np.int64)] * num_slots
        self._pages = np.zeros((num_slots, -(-max_length // cache.page_size)), dtype=np.int32)
        self._num_pages = np.zeros(num_slots, dtype=np.int64)
        self._adapter = np.zeros(num_slots, dtype=np.int32)
        self._state: WindowState | None = None
        self._slots = _Slots(
            max_pages=self._pages.shape[1],
            params=ctypes.addressof(self._params),
            pages=self._pages.ctypes.data,
            num_pages=self._num_pages.ctypes.data,
            adapter=self._adapter.ctypes.data,
        )
        self._step = _Decode(
            slots=ctypes.addressof(self._slots),
            **cache_pointers(cache),
            cache_type=model.cache_type(cache),
            page_size=cache.page_size,
            num_slots=cache.keys.shape[1],
        )
        self._slot = np.zeros(2 * num_slots, dtype=np.int64)  # each may have a window and a chunk
        self._step.slot = self._slot.ctypes.data
        # Kept while the library reads them.
        self._chunks: tuple[np.ndarray, ...] = ()
        self._angles: tuple[np.ndarray, ...] = ()
        self._error = ctypes.create_string_buffer(_ERROR_BYTES)

    @property
    def forward_s(self) -> float:
        """Seconds that the model took in the latest step."""
        return float(self._step.forward_s)

    def attach(self, state: WindowState) -> None:
        """Set the windows to work on, by slot, in place; on the CPU."""
        if state is self._state:
            return
        self._state, capacity = state, state.tokens.shape[1]
        slots = self._slots
        slots.capacity = capacity
        slots.cached, slots.width, slots.tokens = (t.data_ptr() for t in (state.cached, state.width, state.tokens))
        slots.filled, slots.logprobs = state.filled.data_ptr(), state.logprobs.data_ptr()
        self._results = np.zeros((self._num_slots, 4 + capacity), dtype=np.int64)
        self._result_logprobs = np.zeros((self._num_slots, capacity), dtype=np.float32)
        self._step.results, self._step.result_logprobs = self._results.ctypes.data, self._result_logprobs.ctypes.data

    def set_params(self, slot: int, params: DecodeParams, num_top: int = 0, adapter: int = 0) -> None:
        """Set how the window in ``slot`` decodes, how many of the most probable tokens ``read_top`` gives for its rows,
        and the slot of its adapter, 0 for none. It has no pages yet."""
        self._adapter[slot] = adapter
        self._stop_tokens[slot] = np.array(params.stop_token_ids, dtype=np.int64)
        self._params[slot] = _WindowParams.of(params, self._stop_tokens[slot], num_top)
        self._num_pages[slot] = 0

    def add_pages(self, slot: int, first: int, pages: Sequence[int]) -> None:
        """Add ``pages`` to the slot's, from the one with index ``first`` on."""
        self._pages[slot, first : first + len(pages)] = pages
        self._num_pages[slot] = first + len(pages)

    def set_step(
        self, windows: Sequence[int], chunks: Sequence[Chunk], row_budget: int, max_drafts: int, num_positions: int
    ) -> None:
        """Set the next step: windows by their slots, chunks, the most rows and drafts for adaptive windows, and an
        upper bound of the positions."""
        step = self._step
        count, more = len(windows), len(chunks)
        self._slot[:count] = windows
        step.num_windows, step.num_chunks = count, more
        step.row_limit, step.most_drafts = row_budget, max_drafts
        if chunks:
            self._slot[count : count + more] = [chunk.slot for chunk in chunks]
            self._chunks = (
                np.array([chunk.start for chunk in chunks], dtype=np.int64),
                np.array([len(chunk.tokens) for chunk in chunks], dtype=np.int64),
                np.concatenate([np.array(chunk.tokens, dtype=np.int64) for chunk in chunks]),
                np.concatenate([np.array(chunk.positions, dtype=np.int64) for chunk in chunks]),
            )
            starts, counts, tokens, positions = (part.ctypes.data for part in self._chunks)
            step.chunk_starts, step.chunk_counts = starts, counts
            step.chunk_tokens, step.chunk_positions = tokens, positions
        if num_positions > step.num_positions:
            cos, sin = self._angles = self.model.angles(num_positions)
            step.cos, step.sin, step.num_positions = cos.ctypes.data, sin.ctypes.data, len(cos)

    def run(self) -> None:
        """Run the whole step."""
        self._step.wants_logits = 0
        self._check(self._library.wedlm_decode_step)

    def read(self) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
        """For the windows of the step that was put: (tokens that became final, rows run, tokens with valid keys, drafts
        verified) each; the final tokens; their log-probabilities. The last two may have unused columns."""
        results = self._results[: self._step.num_windows]
        numbers = results[:, :4].tolist()
        widest = max(one[0] for one in numbers)
        return numbers, results[:, 4 : 4 + widest].tolist(), self._result_logprobs[: len(numbers), :widest].tolist()

    def read_top(self) -> tuple[list[int], list[int], list[list[int]], list[list[float]]]:
        """For each row with logits: its window, the position that its token is for, the most probable tokens, and their
        log-probabilities, by the logits before any was changed. Entries past a window's ``num_top`` are meaningless."""
        step = self._step
        rows, shape = (step.num_logits,), (step.num_logits, step.most_top)
        return (
            _view(step.sequence, np.int64, rows).tolist(),
            _view(step.target, np.int64, rows).tolist(),
            _view(step.top_tokens, np.int64, shape).tolist(),
            _view(step.top_logprobs, np.float32, shape).tolist(),
        )

    def forward(self, keep_raw: bool) -> StepTensors:
        """Run the first part, for a host that changes logits. ``keep_raw``: the log-probabilities of the chosen tokens
        are those of the original logits."""
        step = self._step
        step.wants_logits = 2 if keep_raw else 1
        self._check(self._library.wedlm_decode_forward)
        windows, rows = (step.num_windows,), (step.num_logits,)
        both, all_logits = (step.num_windows, self._slots.capacity), (step.num_logits, self._vocab_size)
        tokens, logprobs = _view(step.tokens, np.int64, both), _view(step.logprobs, np.float32, both)
        return StepTensors(
            state=WindowState(
                _view(step.cached, np.int64, windows),
                _view(step.width, np.int64, windows),
                tokens,
                _view(step.filled, np.bool_, both),
                logprobs,
            ),
            run=_view(step.run, np.int64, windows),
            shared=_view(step.shared, np.int64, both),
            sequence=_view(step.sequence, np.int64, rows),
            column=_view(step.column, np.int64, rows),
            target=_view(step.target, np.int64, rows),
            logits=_view(step.logits, np.float32, all_logits),
            logsumexp=_view(step.logsumexp, np.float32, rows),
            results=RowResults(
                _view(step.choice, np.int64, both),
                _view(step.entropy, np.float32, both),
                _view(step.choice_logprobs, np.float32, both),
            ),
            emitted=Emitted(
                _view(step.emitted, np.int64, both),
                _view(step.emitted_logprobs, np.float32, both),
                _view(step.count, np.int64, windows),
            ),
        )

    def choose(self) -> None:
        """Choose a token for each row, from its present logits."""
        self._library.wedlm_decode_choose(self._decoder, byref(self._step))

    def update(self) -> None:
        """Advance the step's windows."""
        self._library.wedlm_decode_update(self._decoder, byref(self._step))

    def put(self) -> None:
        """Write the windows back to their slots."""
        self._library.wedlm_decode_put(self._decoder, byref(self._step))

    def _check(self, function: Any) -> None:
        if function(self._decoder, self.model.handle, byref(self._step), self._error, _ERROR_BYTES):
            raise NativeError(self._error.value.decode())


def choose_tokens(logits: Tensor, params: Sequence[DecodeParams], positions: Tensor) -> Tensor:
    """The library's choice for rows of logits [L, V], float32, each with its own parameters and position [L]."""
    rows, vocab_size = logits.shape
    logits, positions = logits.contiguous(), positions.to(torch.int64).contiguous()
    none = np.zeros(0, np.int64)
    stacked = (_WindowParams * rows)(*(_WindowParams.of(one, none) for one in params))
    tokens = torch.empty(rows, dtype=torch.long)
    pointers = (logits.data_ptr(), ctypes.addressof(stacked), positions.data_ptr(), tokens.data_ptr())
    _declared().wedlm_choose(vocab_size, rows, *pointers)
    return tokens


def top_tokens(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest logits of each row of [L, V], float32: (tokens [L, count], logits [L, count])."""
    rows, vocab_size = logits.shape
    logits = logits.contiguous()
    tokens, values = torch.empty(rows, count, dtype=torch.long), torch.empty(rows, count)
    _declared().wedlm_top(vocab_size, rows, logits.data_ptr(), count, tokens.data_ptr(), values.data_ptr())
    return tokens, values


def _view(address: int | None, dtype: Any, shape: tuple[int, ...]) -> Tensor:
    """The library's memory as a tensor."""
    size = math.prod(shape)
    if not size:
        return torch.from_numpy(np.zeros(shape, dtype))
    memory = (ctypes.c_char * (size * np.dtype(dtype).itemsize)).from_address(address or 0)
    return torch.from_numpy(np.frombuffer(memory, dtype).reshape(shape))


def _declared() -> ctypes.CDLL:
    """The library with this file's functions declared."""
    library, error_at = load(), (c_char_p, c_int64)
    for name, result, arguments in (
        ("decoder_new", c_void_p, (c_int32, c_int64)),
        ("decoder_free", None, (c_void_p,)),
        ("decode_forward", c_int32, (c_void_p, c_void_p, POINTER(_Decode), *error_at)),
        ("decode_choose", None, (c_void_p, POINTER(_Decode))),
        ("decode_update", None, (c_void_p, POINTER(_Decode))),
        ("decode_put", None, (c_void_p, POINTER(_Decode))),
        ("decode_step", c_int32, (c_void_p, c_void_p, POINTER(_Decode), *error_at)),
        ("choose", None, (c_int32, c_int64, *(c_void_p,) * 4)),
        ("top", None, (c_int32, c_int64, c_void_p, c_int32, c_void_p, c_void_p)),
    ):
        function = getattr(library, f"wedlm_{name}")
        function.restype, function.argtypes = result, arguments
    return library
