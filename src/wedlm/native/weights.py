# SPDX-License-Identifier: Apache-2.0
"""Putting weights into a ``NativeTransformer``: from a torch model, or from a GGUF file's blocks as they are."""

import numpy as np
import torch
from torch import Tensor

from wedlm.model import Transformer
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_model import checkpoint_name, permuted_heads, read_gguf_config, unpermute_rows
from wedlm.model.inference.layers import is_packed
from wedlm.model.lora.masked_rows import has_masked_lora
from wedlm.native.library import NativeError
from wedlm.native.transformer import NativeTransformer

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


def native_from_torch(
    model: Transformer, quantization: str | None = "int8", *, path: str | None = None, threads: int | None = None
) -> NativeTransformer:
    """A native copy of ``model`` (on the CPU, not packed). ``quantization`` "int8": all matrices, the embedding and
    head included, in eight bits with one scale for each output; None: as they are. Raises NativeError."""
    if quantization not in (None, "int8"):
        raise NativeError(f"quantization is {quantization!r}; expected 'int8' or None")
    if is_packed(model):
        raise NativeError("the model is packed for inference; expected one whose projections are separate")
    if has_masked_lora(model):
        raise NativeError("the model has an adapter of masked rows, which the native forward does not run")
    native = NativeTransformer(model.config, path=path, threads=threads)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        layer, which = _place(name)
        if tensor.dim() == 1:
            native.set_vector(layer, which, tensor.float().contiguous().numpy())
        elif quantization == "int8":
            values, scale = int8_rows(tensor)
            native.set_matrix(layer, which, INT8, tensor.shape, values.numpy(), scale.numpy())
        else:
            format, data = _as_is(tensor)
            native.set_matrix(layer, which, format, tensor.shape, data)
    return native


def native_from_gguf(file: GGUFFile, *, path: str | None = None, threads: int | None = None) -> NativeTransformer:
    """The model in ``file``, its blocks kept in their bits. Raises CheckpointError, and NativeError for a type that is
    not supported."""
    config = read_gguf_config(file)
    native = NativeTransformer(config, path=path, threads=threads)
    for name, place in file.tensors.items():
        layer, which = _place(checkpoint_name(name))
        if len(place.shape) == 2 and place.ggml_type not in FORMATS:
            expected = ", ".join(FORMATS.values())
            raise NativeError(f"{file.path}: tensor {name} has type {file.type_name(name)}; expected {expected}")
        rows = torch.from_numpy(file.blocks(name)) if len(place.shape) == 2 else file.tensor(name)
        heads = permuted_heads(name, config)
        data = (rows if heads is None else unpermute_rows(rows, heads)).contiguous().numpy()
        if len(place.shape) == 2:
            native.set_matrix(layer, which, place.ggml_type, place.shape, data)
        else:
            native.set_vector(layer, which, data)
    return native


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 values [O, C] in -127..127, float32 scale of each row [O]); weight ≈ values · scale."""
    exact = weight.detach().float()
    scale = exact.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (exact / scale[:, None]).round().to(torch.int8).contiguous(), scale


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
