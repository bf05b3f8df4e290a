# SPDX-License-Identifier: Apache-2.0
"""Options of an engine: from what a user writes, or leaves open, to values. All raise ValueError naming the option."""

import os

import torch

from wedlm.algorithm.params import ALL_DECODINGS, Decoding
from wedlm.model import ModelConfig, Tokenizer
from wedlm.model.inference.layers import Quantization


def positive_integers(**options: object) -> None:
    """Check that each option is an integer of at least 1."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected an integer >= 1")


def read_fraction(name: str, value: object) -> float:
    """A number in (0, 1]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{name} is {value!r}; expected a number > 0 and <= 1")
    return float(value)


def read_ratio(name: str, value: object) -> float:
    """A number above 1; infinity is one."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 1:
        raise ValueError(f"{name} is {value!r}; expected a number > 1, or inf")
    return float(value)


def read_flag(name: str, value: object) -> bool:
    """True or False, and nothing that merely counts as one."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected True or False")
    return value


def read_quantization(name: str | None) -> Quantization | None:
    """None: weights in the type that was asked for."""
    if name not in (None, "int8", "fp8"):
        raise ValueError(f"quantization is {name!r}; expected int8 or fp8, or nothing")
    return name  # type: ignore[return-value]


def read_decoding(name: str | None) -> Decoding:
    """The mode asked for; by default "auto": AR's text, with as many masked rows as pay at the time."""
    if name is None:
        return "auto"
    if name not in ALL_DECODINGS:
        raise ValueError(f"decoding is {name!r}; expected one of {', '.join(ALL_DECODINGS)}")
    return name  # type: ignore[return-value]


def read_device(name: str) -> torch.device:
    """ "auto" takes CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"device is {name!r}, which torch cannot use here: {reason}; expected auto or cpu") from error
    return device


def read_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """None means the checkpoint's own."""
    if name == "auto":
        # Emulated bfloat16 is slower than float32 and no more exact.
        has_bf16 = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return None if has_bf16 else torch.float32
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {name!r}; expected auto, float32, bfloat16 or float16")
    return dtype


def read_length(asked: int | None, config: ModelConfig) -> int:
    """Positions of a sequence."""
    longest = config.max_length
    if asked is None:
        return longest
    if isinstance(asked, bool) or not isinstance(asked, int) or not 2 <= asked <= longest:
        raise ValueError(f"max_model_len is {asked!r}; expected 2 to {longest}, the length of this model")
    return asked


def read_mask_token_id(asked: int | None, config: ModelConfig, tokenizer: Tokenizer) -> int:
    """The one asked for, the config's, or the first id that has an embedding and that the tokenizer does not use."""
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or not 0 <= asked < config.vocab_size:
            raise ValueError(f"mask_token_id is {asked!r}; expected an id from 0 to {config.vocab_size - 1}")
        return asked
    if config.mask_token_id is not None:
        return config.mask_token_id
    if tokenizer.vocab_size >= config.vocab_size:
        raise ValueError(
            f"this checkpoint names no mask token and its tokenizer uses all {config.vocab_size} ids; "
            "expected mask_token_id=..., an id that its text never needs"
        )
    return tokenizer.vocab_size


def default_cache_bytes(device: torch.device, wanted: int, utilization: float) -> int:
    """On CUDA what ``utilization`` of the memory leaves; elsewhere ``wanted``, at most a quarter of the memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(max(0, free - (1 - utilization) * total))
    return min(wanted, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)
