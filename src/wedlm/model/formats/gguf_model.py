# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a model: its config, and its tensors under Hugging Face's names and layout."""

import re
from collections.abc import Iterator

from torch import Tensor

from wedlm.model.config import DECODING_KEY, NEXT_TOKEN_KEY, ModelConfig
from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.cut import CutByName
from wedlm.model.formats.gguf_file import GGUFFile

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Ours: what a WeDLM checkpoint records beyond the AR model.
MASK_TOKEN_KEY, BLOCK_SIZE_KEY = "wedlm.mask_token_id", "wedlm.block_size"
GGUF_DECODING_KEY, GGUF_NEXT_TOKEN_KEY = "wedlm.decoding", "wedlm.next_token"
_LAYER_TENSOR = re.compile(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)")
# Keys under "rope." that are read here; any other, and any other scale, would change what the model computes.
_SCALING_KEYS = ("type", "factor", "finetuned", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
_ROPE_KEYS = ("dimension_count", "freq_base", "scale_linear", *(f"scaling.{key}" for key in _SCALING_KEYS))
_HF_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.(.+)\.(weight|bias)")
_LAYER_KINDS = {name: kind for kind, name in _LAYER_NAMES.items()}
_GGUF_TOP_NAMES = {name: kind for kind, name in _TOP_NAMES.items()}


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """The config that the metadata describe. Raises CheckpointError if something is missing or not supported."""
    arch = file.required("general.architecture", str)
    if arch not in SUPPORTED_ARCHITECTURES:
        expected = ", ".join(SUPPORTED_ARCHITECTURES)
        raise CheckpointError(f"{file.path}: general.architecture is {arch!r}; expected one of {expected}")
    if "rope_freqs.weight" in file.tensors:
        raise CheckpointError(
            f"{file.path} stretches RoPE by a table (rope_freqs.weight), which is supported only in a Hugging Face "
            "directory (rope_type llama3)"
        )
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight")
    shape = file.tensors["token_embd.weight"].shape
    if len(shape) != 2:
        raise CheckpointError(f"{file.path}: token_embd.weight has shape {list(shape)}; expected two dimensions")
    vocab_size, hidden_size = shape
    num_heads = file.required(f"{arch}.attention.head_count", int)
    if num_heads < 1:
        raise CheckpointError(f"{file.path}: {arch}.attention.head_count is {num_heads}; expected at least 1")
    head_dim = file.optional(f"{arch}.attention.key_length", int) or hidden_size // num_heads
    rotated = file.optional(f"{arch}.rope.dimension_count", int) or head_dim
    if rotated != head_dim:
        raise CheckpointError(f"{file.path}: {arch}.rope.dimension_count is {rotated}; expected head_dim ({head_dim})")
    if file.optional(f"{arch}.attention.sliding_window", int):
        raise CheckpointError(f"{file.path} uses a sliding window; expected full attention in every layer")
    values = {
        "model_type": arch,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": file.required(f"{arch}.feed_forward_length", int),
        "num_hidden_layers": file.required(f"{arch}.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.optional(f"{arch}.attention.head_count_kv", int) or num_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _shortest_float(file.required(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": file.optional(f"{arch}.rope.freq_base", float) or 10000.0,
        "rope_scaling": _rope_scaling(file, arch),
        "max_position_embeddings": file.required(f"{arch}.context_length", int),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "bos_token_id": file.optional("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": _end_token_ids(file),
        "mask_token_id": file.optional(MASK_TOKEN_KEY, int),
        "block_size": file.optional(BLOCK_SIZE_KEY, int),
        "dtype": "bfloat16",
        DECODING_KEY: file.optional(GGUF_DECODING_KEY, str),
        NEXT_TOKEN_KEY: file.optional(GGUF_NEXT_TOKEN_KEY, str),
    }
    with reading(file.path):
        return ModelConfig.from_hf(values)


def read_gguf_tensors(
    file: GGUFFile, config: ModelConfig, cut: CutByName | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of every tensor, one at a time; a tensor without a Hugging Face name keeps its own. Reads
    only the part of each that ``cut`` names, which consists of whole heads and whole blocks."""
    for name in file.tensors:
        part = None if cut is None else cut(checkpoint_name(name))
        with reading(file.path):
            tensor = file.tensor(name, part)
            heads = permuted_heads(name, config.model_type, config)
            if heads is not None:
                tensor = unpermute_rows(tensor, heads * len(tensor) // file.tensors[name].shape[0])
        yield checkpoint_name(name), tensor
        file.release()


def gguf_shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, by Hugging Face's names where they have one."""
    return {checkpoint_name(name): place.shape for name, place in file.tensors.items()}


def permuted_heads(name: str, arch: str, config: ModelConfig) -> int | None:
    """How many heads a tensor's rows are, if GGUF has them in llama's layout; None if they are in Hugging Face's."""
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or arch != "llama":
        return None
    return {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(match[2])


def checkpoint_name(name: str) -> str:
    """A tensor's Hugging Face name, or its own if it has none."""
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return _TOP_NAMES.get(name, name)
    layer, kind, part = match.groups()
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{part}"


def gguf_name(name: str) -> str:
    """A tensor's name in GGUF, given Hugging Face's: the inverse of ``checkpoint_name``."""
    match = _HF_LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_KINDS:
        return _GGUF_TOP_NAMES.get(name, name)
    layer, kind, part = match.groups()
    return f"blk.{layer}.{_LAYER_KINDS[kind]}.{part}"


def permute_rows(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of ``unpermute_rows``."""
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def unpermute_rows(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of a q or k projection (or its bias) from GGUF's llama layout to Hugging Face's.

    llama.cpp rotates dimensions (2i, 2i+1), Hugging Face (i, i + D/2): rows (head, D/2, 2) become (head, 2, D/2).
    """
    return tensor.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _rope_scaling(file: GGUFFile, arch: str) -> dict[str, object] | None:
    for key, value in file.metadata.items():
        is_read = key.removeprefix(f"{arch}.rope.") in _ROPE_KEYS
        if (key.startswith(f"{arch}.rope.") or (key.startswith(f"{arch}.") and "scale" in key)) and not is_read:
            raise CheckpointError(f"{file.path}: {key} is {value!r}, which is not supported; expected it to be absent")
    prefix = f"{arch}.rope.scaling."
    factor = file.optional(f"{prefix}factor", float) or file.optional(f"{arch}.rope.scale_linear", float)
    # As llama.cpp has it: a factor without a type is linear. The old key scale_linear knows no other type.
    kind = file.optional(f"{prefix}type", str) or ("linear" if factor else "none")
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if factor is None:
        raise CheckpointError(f"{file.path} lacks {prefix}factor; expected it for the type {kind}")
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": file.optional(f"{prefix}original_context_length", int),
        "beta_fast": file.optional(f"{prefix}yarn_beta_fast", float),
        "beta_slow": file.optional(f"{prefix}yarn_beta_slow", float),
    }


def _end_token_ids(file: GGUFFile) -> list[int]:
    """End of text and end of turn, which some files tell apart."""
    ids = [file.optional(f"tokenizer.ggml.{kind}_token_id", int) for kind in ("eos", "eot")]
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _shortest_float(value: float) -> float:
    """The number that was meant: a float32 stored as 9.999999747378752e-06 was written as 1e-05, and seven digits give
    it back."""
    return float(f"{value:.7g}")
