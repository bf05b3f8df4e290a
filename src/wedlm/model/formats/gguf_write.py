# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint as a GGUF file, which llama.cpp and programs built on it run.

A WeDLM checkpoint's mask token and block size go into our own keys; other readers see an AR model.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor

from wedlm.model.config import ModelConfig
from wedlm.model.formats.checkpoint import Checkpoint, checked_tensors
from wedlm.model.formats.gguf_model import (
    BLOCK_SIZE_KEY,
    GGUF_DECODING_KEY,
    GGUF_NEXT_TOKEN_KEY,
    MASK_TOKEN_KEY,
    gguf_name,
    permute_rows,
    permuted_heads,
)
from wedlm.model.formats.gguf_quants import to_blocks
from wedlm.model.formats.gguf_tokenizer import write_gguf_tokenizer
from wedlm.model.formats.int8_rows import Int8Rows
from wedlm.model.formats.save import write_whole
from wedlm.model.formats.tokenizer import Tokenizer
from wedlm.model.transformer import Transformer

_Kind = GGMLQuantizationType
# What ``--type`` may be: the type of the matrices, and llama.cpp's number for the file.
GGUF_TYPES: dict[str, tuple[_Kind, LlamaFileType]] = {
    "f32": (_Kind.F32, LlamaFileType.ALL_F32),
    "f16": (_Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (_Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (_Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (_Kind.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q5_0": (_Kind.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q5_1": (_Kind.Q5_1, LlamaFileType.MOSTLY_Q5_1),
    "q4_k": (_Kind.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
    "q5_k": (_Kind.Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q6_k": (_Kind.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q4_k_m": (_Kind.Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}
# What llama.cpp takes where rows do not divide by a super-block.
_FALLBACK = {_Kind.Q4_K: _Kind.Q5_0, _Kind.Q5_K: _Kind.Q5_1, _Kind.Q6_K: _Kind.Q8_0}
_WIDE = (_Kind.F32, _Kind.F16, _Kind.BF16)
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def tensor_type(asked: str, name: str, shape: tuple[int, ...], config: ModelConfig) -> GGMLQuantizationType:
    """The type of tensor ``name`` (GGUF's) of ``shape`` in a file of type ``asked``, by llama.cpp's rules.

    Vectors stay float32. The output projection, or the embedding that serves as one, gets Q6_K or, where rows do not
    divide by 256, Q8_0. The mixture q4_k_m gives Q6_K to the values and the down projections of some layers.
    """
    if len(shape) == 1:
        return _Kind.F32
    kind = GGUF_TYPES[asked][0]
    if kind in _WIDE:
        return kind
    if name == "output.weight" or (name == "token_embd.weight" and config.tie_word_embeddings):
        kind = _Kind.Q8_0 if kind == _Kind.Q8_0 or shape[1] % 256 else _Kind.Q6_K
    match = _LAYER.fullmatch(name)
    if asked == "q4_k_m" and match and match[2] in ("attn_v", "ffn_down"):
        kind = _Kind.Q6_K if _gets_more_bits(int(match[1]), config.num_layers) else kind
    for _ in range(2):
        if shape[1] % GGML_QUANT_SIZES[kind][0]:
            kind = _FALLBACK.get(kind, _Kind.F16)
    return kind


def _gets_more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def write_gguf(path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, asked: str, name: str) -> None:
    """Write ``checkpoint`` with matrices of type ``asked`` (one of ``GGUF_TYPES``), one tensor at a time.

    ``name`` is the model's name for users. The file appears complete or not at all. Raises ValueError for anything that
    GGUF, or llama.cpp's version of the architecture, cannot hold.
    """
    config = checkpoint.config
    with write_whole(path) as temporary:
        writer = GGUFWriter(temporary, _architecture(config))
        try:
            writer.add_name(name)
            add_gguf_config(writer, config)
            special, templates = tokenizer.special_tokens, tokenizer.chat_templates
            write_gguf_tokenizer(writer, tokenizer.backend, special, templates, config)
            writer.add_file_type(GGUF_TYPES[asked][1])
            writer.add_quantization_version(2)
            for tensor_name, shape in checkpoint.shapes.items():
                ours = gguf_name(tensor_name)
                kind = tensor_type(asked, ours, shape, config)
                elements, size = GGML_QUANT_SIZES[kind]
                row = shape[-1] // elements * size
                num_bytes = torch.Size(shape[:-1]).numel() * row
                writer.add_tensor_info(ours, [*shape[:-1], row], np.dtype(np.uint8), num_bytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for ours, tensor in _tensors(checkpoint):
                if tensor.ndim == 1:
                    writer.write_tensor_data(tensor.float().contiguous().numpy().view(np.uint8))
                else:
                    writer.write_tensor_data(to_blocks(tensor, tensor_type(asked, ours, tuple(tensor.shape), config)))
        finally:
            writer.close()
        temporary.chmod(path.parent.stat().st_mode & 0o666)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """(GGUF's name, tensor in GGUF's layout), in the order of the checkpoint's shapes."""
    config, arch = checkpoint.config, _architecture(checkpoint.config)
    with torch.device("meta"):
        expected = Transformer(config)
    for name, tensor in checked_tensors(checkpoint.tensors(), expected, checkpoint.path):
        wide = tensor.widened() if isinstance(tensor, Int8Rows) else tensor
        ours = gguf_name(name)
        heads = permuted_heads(ours, arch, config)
        yield ours, wide if heads is None else permute_rows(wide, heads)


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name for the model's architecture. Raises ValueError."""
    if config.sees_by_block:
        raise ValueError(f"model_type is {config.model_type!r}; expected a causal model, as GGUF's readers compute it")
    if config.model_type != "wedlm":
        return config.model_type
    if config.qk_norm and config.qkv_bias:
        raise ValueError("the model has biases and norms of queries and keys; expected one of them, as GGUF has it")
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def add_gguf_config(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add the keys that ``read_gguf_config`` reads. Raises ValueError for RoPE that GGUF cannot hold."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    for key, value in ((MASK_TOKEN_KEY, config.mask_token_id), (BLOCK_SIZE_KEY, config.block_size)):
        if value is not None:
            writer.add_uint32(key, value)
    if config.decoding is not None or config.default_decoding != "auto":  # the file does not keep our model type
        writer.add_string(GGUF_DECODING_KEY, config.default_decoding)
    if config.next_token is not None:
        writer.add_string(GGUF_NEXT_TOKEN_KEY, config.next_token)
    _add_rope_scaling(writer, config)


def _add_rope_scaling(writer: GGUFWriter, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    unusual = ("attention_factor", "mscale", "mscale_all_dim")
    given = [name for name in unusual if getattr(scaling, name) is not None]
    if scaling.rope_type == "llama3" or given or not scaling.truncate:
        raise ValueError(
            f"the checkpoint's RoPE is {' with '.join([scaling.rope_type, *given[:1]])}; expected none, linear or "
            "plain yarn, which are written to GGUF files"
        )
    writer.add_rope_scaling_type(RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
