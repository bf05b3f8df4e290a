# SPDX-License-Identifier: Apache-2.0
"""Resolve options that need torch, the model or the machine: from what a user gave, or left open, to values.

All functions raise ValueError naming the option.
"""

import os
import warnings

import torch

from wedlm.engine.options import read_dtype_name
from wedlm.model import ModelConfig, Tokenizer
from wedlm.model.init_checkpoint import choose_mask_token_id


def read_device(name: str) -> torch.device:
    """The device; "auto" takes CUDA if there is a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"device is {name!r}, which torch cannot use here: {reason}; expected auto or cpu") from error
    return device


def make_current(device: torch.device) -> None:
    """Make a numbered GPU the thread's current one, on which Triton's kernels run wherever their tensors are."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def read_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """None means the checkpoint's own."""
    if read_dtype_name("dtype", name) == "auto":
        # Emulated bfloat16 is slower than float32 and no more exact.
        has_bf16 = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return None if has_bf16 else torch.float32
    return getattr(torch, name)


def read_length(asked: int | None, config: ModelConfig) -> int:
    """The largest number of positions of a sequence."""
    longest = config.max_length
    if asked is None:
        return longest
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 2:
        raise ValueError(f"max_model_len is {asked!r}; expected 2 to {longest}, the length of this model")
    if asked > longest:
        warnings.warn(f"max_model_len is {asked}; the model's length, {longest}, is used instead", stacklevel=3)
    return min(asked, longest)


def read_mask_token_id(asked: int | None, config: ModelConfig, tokenizer: Tokenizer) -> int:
    """The requested mask token, the config's, or the one that ``wedlm init`` would choose. If that finds none, because
    text needs every id, it takes the last id, which is then never generated, and warns."""
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked < config.vocab_size:
            raise ValueError(f"mask_token_id is {asked!r}; expected an id from 0 to {config.vocab_size - 1}")
        return asked
    if config.mask_token_id is not None:
        return config.mask_token_id
    try:
        return choose_mask_token_id(config, tokenizer)
    except ValueError:
        ends = {*config.eos_token_ids, config.bos_token_id}
        chosen = next(one for one in reversed(range(config.vocab_size)) if one not in ends)
        warnings.warn(
            f"this checkpoint names no mask token and its tokenizer uses all {config.vocab_size} ids: {chosen} "
            f"({tokenizer.backend.id_to_token(chosen)!r}) stands for masked positions and is never generated; "
            "mask_token_id=... names another",
            stacklevel=4,
        )
        return chosen


def read_block_length(asked: int | None, config: ModelConfig) -> int | None:
    """The block of a model that sees by blocks; None for a causal one."""
    if not config.sees_by_block:
        if asked is not None:
            raise ValueError(
                f"block_length is {asked} and the model is causal; expected none: wedlm_window_size is the block's size"
            )
        return None
    return config.block_size if asked is None else asked


def default_cache_bytes(device: torch.device, wanted: int, utilization: float, num_sharing: int = 1) -> int:
    """On CUDA what ``utilization`` of the memory leaves; elsewhere ``wanted``, but at most a quarter of the memory.
    ``num_sharing`` engines divide the memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(max(0, free - (1 - utilization) * total)) // num_sharing
    return min(wanted, _memory_bytes() // 4 // num_sharing)


def check_cache_bytes(device: torch.device, asked: int) -> None:
    """Raises ValueError for a cache that the memory cannot hold."""
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _memory_bytes()
    if asked > memory:
        raise ValueError(f"kv_cache_bytes is {asked}; expected at most {memory}, the memory of {device}")


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
