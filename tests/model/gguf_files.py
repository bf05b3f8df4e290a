# SPDX-License-Identifier: Apache-2.0
"""Small GGUF files, written with the ``gguf`` package from models of known logits."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from wedlm.model import Transformer, load_model
from wedlm.model.formats.gguf_model import _LAYER_NAMES, _TOP_NAMES


def permute_rows(tensor: Tensor, num_heads: int) -> Tensor:
    """What llama.cpp's converter does to q and k: rows (head, 2, D/2) -> (head, D/2, 2)."""
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(
    path: Path, model: Transformer, arch: str, change: dict[str, Any] | None = None, **extra: Tensor
) -> Path:
    """``change`` replaces metadata (key without architecture -> value, None drops); ``extra`` adds tensors."""
    config = model.config
    keys: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        **(change or {}),
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    for name, tensor in gguf_tensors(model, arch).items() | extra.items():
        writer.add_tensor(name, tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Transformer, arch: str) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in model.named_parameters():
        for theirs, ours in {**_TOP_NAMES, **_LAYER_NAMES}.items():
            if name == ours:
                tensors[theirs] = tensor
            elif name.startswith("model.layers.") and name.split(".", 3)[3].rpartition(".")[0] == ours:
                heads = {"attn_q": model.config.num_heads, "attn_k": model.config.num_kv_heads}.get(theirs)
                permuted = permute_rows(tensor, heads) if heads and arch == "llama" else tensor
                tensors[f"blk.{name.split('.')[2]}.{theirs}.{name.rpartition('.')[2]}"] = permuted
    return tensors


def write_blocks(path, directory, kind: str, others: str = "F32", cut: int = 0):
    """A GGUF of the tiny model in ``directory``: layers in ``kind``, all else in ``others``, but for ``cut`` bytes."""
    model, config = load_model(directory, torch.float32)
    writer = gguf.GGUFWriter(path, "qwen3")
    numbers = {
        "block_count": config.num_layers,
        "context_length": 128,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"qwen3.{key}", value)
    writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    tokens = ["a", "b", "ab", *(f"t{i}" for i in range(3, config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (config.vocab_size - 4) + [3] * 4)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(config.eos_token_ids[0])
    for name, tensor in gguf_tensors(model, "qwen3").items():
        chosen = kind if name.startswith("blk") else others
        data = tensor.detach().numpy()
        if data.ndim == 2 and chosen != "F32":
            block = gguf.GGMLQuantizationType[chosen]
            try:
                packed = gguf.quants.quantize(data, block)
            except NotImplementedError:  # a type that only llama.cpp writes: the values do not matter
                elements, size = gguf.GGML_QUANT_SIZES[block]
                packed = np.zeros((len(data), data.shape[1] // elements * size), dtype=np.uint8)
            writer.add_tensor(name, packed, raw_dtype=block)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    return path
