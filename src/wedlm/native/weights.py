# SPDX-License-Identifier: Apache-2.0
"""Put weights into a ``NativeTransformer``: from a torch model, or unchanged from a checkpoint."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from wedlm.model import ModelConfig, Transformer
from wedlm.model.formats.checkpoint import Checkpoint, checked_tensors, checkpoint_of_gguf
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_model import checkpoint_name, permuted_heads, unpermute_rows
from wedlm.model.formats.int8_rows import Int8Rows, round_rows
from wedlm.model.inference.layers import is_packed
from wedlm.model.lora.masked_rows import base_tensors, masked_lora
from wedlm.model.lora.row_factors import Matrices, RowFactors
from wedlm.native.library import NativeError
from wedlm.native.transformer import NativeTransformer, PackedSource

# Formats by GGUF's numbers, and ours: one scale for each output.
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16, INT8 = 0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30, 100
FORMATS = {
    F32: "F32",
    F16: "F16",
    BF16: "BF16",
    Q8_0: "Q8_0",
    Q4_0: "Q4_0",
    Q4_1: "Q4_1",
    Q5_0: "Q5_0",
    Q5_1: "Q5_1",
    Q4_K: "Q4_K",
    Q5_K: "Q5_K",
    Q6_K: "Q6_K",
}
# csrc/capi.h's numbers, by the names of a checkpoint.
_LAYER = {
    "self_attn.q_proj.weight": 0,
    "self_attn.k_proj.weight": 1,
    "self_attn.v_proj.weight": 2,
    "self_attn.o_proj.weight": 3,
    "mlp.gate_proj.weight": 4,
    "mlp.up_proj.weight": 5,
    "mlp.down_proj.weight": 6,
    "self_attn.q_proj.bias": 9,
    "self_attn.k_proj.bias": 10,
    "self_attn.v_proj.bias": 11,
    "self_attn.o_proj.bias": 12,
    "mlp.gate_proj.bias": 13,
    "mlp.up_proj.bias": 14,
    "mlp.down_proj.bias": 15,
    "input_layernorm.weight": 16,
    "post_attention_layernorm.weight": 17,
    "self_attn.q_norm.weight": 18,
    "self_attn.k_norm.weight": 19,
}
_TOP = {"model.embed_tokens.weight": 7, "lm_head.weight": 8, "model.norm.weight": 20}


@dataclass(frozen=True)
class _Blocks:
    """A matrix of ``shape`` [O, C] in a GGUF format: uint8 [O, bytes of a row]."""

    shape: tuple[int, ...]
    format: int
    data: np.ndarray


_Weight = Tensor | Int8Rows | _Blocks


def native_from_torch(
    model: Transformer, quantization: str | None = "int8", *, path: str | None = None, threads: int | None = None
) -> NativeTransformer:
    """A native copy of ``model`` (on the CPU, not packed). ``quantization`` "int8" puts all matrices, including
    embedding and head, into eight bits with one scale for each output; None keeps them. An adapter of masked rows is
    copied, too (``set_masked_lora``). Raises NativeError."""
    if quantization not in (None, "int8"):
        raise NativeError(f"quantization is {quantization!r}; expected 'int8' or None")
    if is_packed(model):
        raise NativeError("the model is packed for inference; expected one whose projections are separate")
    tied = model.config.tie_word_embeddings
    tensors = ((name, tensor) for name, tensor in base_tensors(model) if not (tied and name == "lm_head.weight"))
    native = _filled(NativeTransformer(model.config, path=path, threads=threads), tensors, quantization == "int8")
    set_masked_lora(native, *masked_lora(model))
    return native


def native_from_checkpoint(
    checkpoint: Checkpoint, quantization: str | None = None, *, path: str | None = None, threads: int | None = None
) -> NativeTransformer:
    """Load the model in ``checkpoint`` without making a torch model.

    ``quantization`` "int8" is as for ``native_from_torch``; None keeps matrices as they are in the file, in GGUF
    blocks, eight bits with scales or floats. Raises CheckpointError, and NativeError for a type that is not supported.
    """
    file = checkpoint.gguf
    if file is not None and quantization is None and not checkpoint.deltas:
        tensors: Iterable[tuple[str, _Weight]] = _gguf_weights(file, checkpoint.config)
    else:
        tensors = checkpoint.tensors()
    with torch.device("meta"):
        expected = Transformer(checkpoint.config)
    native = NativeTransformer(checkpoint.config, path=path, threads=threads)
    return _filled(native, checked_tensors(tensors, expected, checkpoint.path), quantization == "int8")


def native_from_gguf(file: GGUFFile, *, path: str | None = None, threads: int | None = None) -> NativeTransformer:
    """The model in ``file``, its blocks kept in their bits. Raises CheckpointError, and NativeError for a type that is
    not supported."""
    return native_from_checkpoint(checkpoint_of_gguf(file), path=path, threads=threads)


def set_masked_lora(
    native: NativeTransformer, matrices: Mapping[str, tuple[Tensor, Tensor]], mask_embedding: Tensor | None
) -> None:
    """Give ``native`` an adapter of masked rows, as ``attach_masked_lora`` does for a model; matrices are as in
    ``NativeAdapters``."""
    native.masked_lora = dict(matrices), mask_embedding
    NativeAdapters(native).put(0, RowFactors({}, matrices, mask_embedding))


@dataclass(frozen=True)
class _Rounded:
    """Factors in the library's form: (for masked rows?, the weight's name, A, B), and what masked rows start from."""

    matrices: list[tuple[bool, str, PackedSource, PackedSource]]
    start: np.ndarray | None


class NativeAdapters:
    """Adapters in slots of a model: each row of a step may have a different one. The twin is ``AdapterBank``.

    With weights in few bits, their matrices are rounded to eight bits, and they read the same rounded inputs; with
    float weights they stay float32.
    """

    def __init__(self, native: NativeTransformer) -> None:
        self._native = native

    def prepare(self, factors: RowFactors) -> RowFactors:
        """The factors with their matrices rounded, if needed; call it in any thread."""
        return replace(factors, prepared=_rounded(self._native, factors))

    def put(self, slot: int, factors: RowFactors) -> None:
        """Put an adapter into a free slot. Raises NativeError, with nothing changed, if memory runs out."""
        prepared = factors.prepared
        if not isinstance(prepared, _Rounded):
            prepared = _rounded(self._native, factors)
        try:
            for is_masked, name, a, b in prepared.matrices:
                format = F32 if a[1] is None else INT8
                self._native.set_factors(2 * slot + is_masked, *_place(name), format, a, b)
            if prepared.start is not None:
                self._native.set_start(2 * slot + 1, prepared.start)
        except BaseException:
            self.drop(slot)
            raise

    def drop(self, slot: int) -> None:
        """Free a slot and its memory."""
        for factors in (2 * slot, 2 * slot + 1):
            self._native.drop_factors(factors)


def _rounded(native: NativeTransformer, factors: RowFactors) -> _Rounded:
    rounds = rounds_inputs(native)

    def rounded(matrix: Tensor) -> PackedSource:
        if not rounds:
            return matrix.detach().float().contiguous().numpy(), None
        rows = round_rows(matrix)
        return rows.values.numpy(), rows.scale.numpy()

    masked, start = (factors.masked, factors.mask_embedding) if factors.has_masked_rows else native.masked_lora
    kinds = [(False, factors.every)]
    if masked or start is not None:  # else masked rows get what the others get
        kinds.append((True, _side_by_side(factors.every, masked)))
    return _Rounded(
        [(kind, name, rounded(a), rounded(b)) for kind, matrices in kinds for name, (a, b) in matrices.items()],
        None if start is None else start.detach().float().contiguous().numpy(),
    )


def _side_by_side(first: Matrices, second: Matrices) -> Matrices:
    """Matrices whose product is the sum of both products."""
    both = {name: [one[name] for one in (first, second) if name in one] for name in (*first, *second)}
    return {
        name: (torch.cat([a.float() for a, _ in pairs]), torch.cat([b.float() for _, b in pairs], dim=1))
        for name, pairs in both.items()
    }


def format_names(native: NativeTransformer) -> str:
    """The formats of its matrices for users, starting with the one of the most bytes."""
    names = [FORMATS.get(format, "int8") for format, _ in native.matrix_bytes.most_common()]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def rounds_inputs(native: NativeTransformer) -> bool:
    """Whether inputs of products are rounded to eight bits: wherever a matrix is in few bits."""
    return not native.matrix_bytes.keys() <= {F32, F16, BF16}


def unsupported_type(file: GGUFFile) -> str | None:
    """A sentence about a matrix whose type the native forward does not support; None if it supports all."""
    for name, place in file.tensors.items():
        if len(place.shape) == 2 and place.ggml_type not in FORMATS:
            expected = ", ".join(FORMATS.values())
            return f"tensor {name} has type {file.type_name(name)}; expected one of {expected}"
    return None


def _gguf_weights(file: GGUFFile, config: ModelConfig) -> Iterator[tuple[str, _Weight]]:
    """Matrices as blocks, vectors as float32, one at a time."""
    unsupported = unsupported_type(file)
    if unsupported is not None:
        raise NativeError(f"{file.path}: {unsupported}")
    for name, place in file.tensors.items():
        is_matrix = len(place.shape) == 2
        rows = torch.from_numpy(file.blocks(name)) if is_matrix else file.tensor(name)
        heads = permuted_heads(name, config.model_type, config)
        rows = rows if heads is None else unpermute_rows(rows, heads)
        yield checkpoint_name(name), _Blocks(place.shape, place.ggml_type, rows.numpy()) if is_matrix else rows
        file.release()


def _filled(
    native: NativeTransformer, tensors: Iterable[tuple[str, _Weight]], in_eight_bits: bool
) -> NativeTransformer:
    """``native`` with its weights set."""
    for name, weight in tensors:
        layer, which = _place(name)
        if isinstance(weight, Tensor) and weight.dim() == 2 and in_eight_bits:
            weight = round_rows(weight)
        if isinstance(weight, Int8Rows):
            scale = weight.scale.contiguous().numpy()
            native.set_matrix(layer, which, INT8, weight.shape, weight.values.contiguous().numpy(), scale)
        elif isinstance(weight, _Blocks):
            native.set_matrix(layer, which, weight.format, weight.shape, np.ascontiguousarray(weight.data))
        elif weight.dim() == 1:
            native.set_vector(layer, which, weight.detach().float().contiguous().numpy())
        else:
            format, data = _as_is(weight)
            native.set_matrix(layer, which, format, weight.shape, data)
    return native


def _as_is(tensor: Tensor) -> tuple[int, np.ndarray]:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.float32:
        return F32, tensor.numpy()
    return (F16 if tensor.dtype == torch.float16 else BF16), tensor.view(torch.int16).numpy()


def _place(name: str) -> tuple[int, int]:
    """(layer, number) of a tensor by its name in a checkpoint."""
    if name in _TOP:
        return -1, _TOP[name]
    parts = name.split(".", 3)
    if len(parts) < 4 or parts[3] not in _LAYER:
        raise NativeError(f"there is a tensor {name}, which the native forward does not know")
    return int(parts[2]), _LAYER[parts[3]]
