# SPDX-License-Identifier: Apache-2.0
"""The options of an engine, each declared once: its name, type, default, help text and check.

``LLM(model, **options)`` takes them, the factory consumes them, and the command line makes its own options from the
fields. This module must not import torch, because ``wedlm --help`` reads it.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args

from wedlm.algorithm.params import DECODINGS, DecodeParams, Decoding, NextToken
from wedlm.engine.original_names import translated

WeightBits = Literal["auto", "none", "int8", "fp8"]
CacheBits = Literal["auto", "fp8", "int8"]
SchedulingPolicy = Literal["fcfs", "priority"]
Check = Callable[[str, Any], Any]  # (name, value) -> the value to keep; ValueError naming the option


def read_positive_integer(name: str, value: object) -> int:
    """An integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected an integer >= 1")
    return value


def read_count(name: str, value: object) -> int:
    """An integer of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}; expected an integer >= 0")
    return value


def read_fraction(name: str, value: object) -> float:
    """A number in (0, 1]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{name} is {value!r}; expected a number > 0 and <= 1")
    return float(value)


def read_ratio(name: str, value: object) -> float:
    """A number above 1; infinity is allowed."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 1:
        raise ValueError(f"{name} is {value!r}; expected a number > 1, or inf")
    return float(value)


def read_flag(name: str, value: object) -> bool:
    """True or False only, not other values that count as true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected True or False")
    return value


def read_quantization(name: str, value: object) -> WeightBits:
    """None means the default."""
    if value is None:
        return "auto"
    if value not in get_args(WeightBits):
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(get_args(WeightBits))}")
    return value  # type: ignore[return-value]


def read_kv_cache_dtype(name: str, value: object) -> CacheBits:
    """ "auto", "fp8" or "int8"."""
    if value not in get_args(CacheBits):
        raise ValueError(f"{name} is {value!r}; expected auto, fp8 or int8")
    return value  # type: ignore[return-value]


def read_decoding(name: str, value: object) -> Decoding:
    """A decoding mode."""
    if value not in DECODINGS:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(DECODINGS)}")
    return value  # type: ignore[return-value]


def read_scheduling_policy(name: str, value: object) -> SchedulingPolicy:
    """ "fcfs" or "priority"."""
    if value not in get_args(SchedulingPolicy):
        raise ValueError(f"{name} is {value!r}; expected fcfs or priority")
    return value  # type: ignore[return-value]


def read_dtype_name(name: str, value: object) -> str:
    """ "auto" or the name of a floating point type."""
    if value not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"{name} is {value!r}; expected auto, float32, bfloat16 or float16")
    return str(value)


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _text(name: str, value: object) -> str:
    return str(value)  # a path, or a torch.device


def _anything(name: str, value: object) -> Any:
    return value  # checked once the model is known


def _option(default: Any, help: str, check: Check) -> Any:
    return field(default=default, metadata={"help": help, "check": check})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of an engine. Each value is checked on construction (ValueError naming the option).

    A field's metadata holds ``help`` (one or two sentences) and ``check`` (``(name, value) -> value``). If a check
    needs the model, as that of ``max_model_len`` does, it happens when the engine is built.
    """

    dtype: str = _option(
        "auto",
        "Type of the weights: auto (the checkpoint's, but float32 on CPUs without bfloat16 instructions), float32, "
        "bfloat16 or float16.",
        read_dtype_name,
    )
    quantization: WeightBits = _option(  # noqa: RUF009
        "auto",
        "Bits of the weights: auto (a file's few bits stay if they can run, and on a CPU 16 bits become int8, unless "
        "dtype is given), none (those of dtype), int8 (everything, on a CPU's native forward), fp8 (the layers' "
        "weights and inputs, on NVIDIA GPUs that multiply such numbers).",
        read_quantization,
    )
    quantize_head: bool = _option(
        False,
        "With quantization fp8, round the output projection, too: a little faster, at a further cost in quality.",
        read_flag,
    )
    device: str = _option("auto", "auto (CUDA if there is a GPU), cpu, cuda, cuda:1, ...", _text)
    tensor_parallel_size: int = _option(
        1,
        "Processes that share the model, each with a part of every layer and its own device (on CPUs, its own part of "
        "the threads).",
        read_positive_integer,
    )
    adapter: str | None = _option(
        None,
        "Directory of a LoRA, or 'demo-masked', the embedded one for demo-base. A LoRA in peft's format is merged into "
        "the weights; one for masked rows stays apart from them.",
        _or_none(_text),
    )
    max_adapters: int = _option(
        8, "Most adapters by name at once, including unloaded ones that are still in use.", read_positive_integer
    )
    max_adapter_rank: int = _option(
        128, "Largest rank of an adapter by name; its parts for all rows and for masked rows count together.",
        read_positive_integer,
    )  # fmt: skip
    max_model_len: int | None = _option(
        None, "Longest prompt and answer together, in tokens. Default: the checkpoint's length.", _anything
    )
    mask_token_id: int | None = _option(
        None, "Token id that stands for masked positions. Default: the checkpoint's, or an id without text.", _anything
    )
    decoding: Decoding | None = _option(  # noqa: RUF009
        None,
        "Decoding mode of requests that do not name one. Default: the checkpoint's, streaming or auto.",
        _or_none(read_decoding),
    )
    wedlm_window_size: int | None = _option(
        None,
        "Window of requests that do not set one: positions in streaming and block decoding, most rows per step in "
        "verified and auto. Default: 16, but in auto 64 where steps are CUDA graphs.",
        _or_none(read_positive_integer),
    )
    block_length: int | None = _option(
        None,
        "Block of models that see by blocks (SDAR), in prompt and answer. Default: the checkpoint's.",
        _or_none(read_positive_integer),
    )
    wedlm_lookup_drafts: int | None = _option(
        None,
        "Most drafts per step from the text, for requests that do not set it; 0: none. Default: what pays off in auto; "
        "none in verified, unless the model has no masked rows.",
        _or_none(read_count),
    )
    max_num_seqs: int = _option(64, "Most sequences in one forward.", read_positive_integer)
    max_num_batched_tokens: int = _option(
        2048, "Most rows in one forward, of windows and prompts together.", read_positive_integer
    )
    scheduling_policy: SchedulingPolicy = _option(  # noqa: RUF009
        "fcfs",
        "Who runs first: fcfs (first come, first served), or priority (requests whose priority is a lower number).",
        read_scheduling_policy,
    )
    page_size: int | None = _option(
        None,
        "Slots in one page of the key/value cache. Default: 64 where steps are CUDA graphs, elsewhere 16.",
        _or_none(read_positive_integer),
    )
    kv_cache_bytes: int | None = _option(
        None,
        "Memory for keys and values. Default on CUDA: what gpu_memory_utilization leaves; elsewhere: four full "
        "sequences, at most a quarter of the memory and eight times the weights. Several models of a server share it.",
        _or_none(read_positive_integer),
    )
    kv_cache_dtype: CacheBits = _option(  # noqa: RUF009
        "auto",
        "Type of keys and values in the cache: auto (the model's), fp8 on NVIDIA GPUs, or int8 with a CPU's native "
        "forward: eight bits, a scale for each head of a slot.",
        read_kv_cache_dtype,
    )
    gpu_memory_utilization: float = _option(
        0.9, "Share of the GPU's memory that weights and cache may take together.", read_fraction
    )
    cuda_graphs: bool | None = _option(
        None,
        "Run steps on our kernels, as CUDA graphs. Default: wherever that works. False: plain torch operations.",
        _or_none(read_flag),
    )
    capture_chunks: bool = _option(
        True, "Where steps are CUDA graphs, capture those with prompt chunks, too.", read_flag
    )
    deterministic: bool = _option(
        False,
        "On a GPU in bfloat16, float16 or FP8, make answers independent of what else runs. Costs speed.",
        read_flag,
    )
    chunk_step_ratio: float | None = _option(
        None,
        "While a request is streamed, limit prompt chunks so that a step with some takes at most about this many times "
        "a step without. inf: no limit. Default: 1.8 where such steps are CUDA graphs, elsewhere inf.",
        _or_none(read_ratio),
    )
    allow_control_tokens: bool = _option(
        False,
        "Let <|im_end|> in a message end its turn. Whoever writes one can then speak as the system.",
        read_flag,
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, one.metadata["check"](one.name, getattr(self, one.name)))

    @property
    def rounded_to(self) -> Literal["int8", "fp8"] | None:
        """The bits that the user asked for by name."""
        asked = self.quantization
        return None if asked == "auto" or asked == "none" else asked

    @classmethod
    def of(cls, given: dict[str, Any]) -> "EngineOptions":
        """The options of these names, or of those that the original implementation uses for them (``original_names``).
        Raises TypeError for an unknown name."""
        names, given = option_fields(), translated(given)
        for name in given:
            if name not in names:
                raise TypeError(f"LLM got an unexpected keyword argument {name!r}; expected one of {', '.join(names)}")
        return cls(**given)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What all requests of an engine share: facts about its model, lengths in tokens, and the options."""

    vocab_size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    options: EngineOptions = EngineOptions()
    has_masked_rows: bool = (
        True  # False: the model predicts nothing in them; auto and verified draft from the text alone
    )
    model_decoding: Decoding = "auto"  # the checkpoint's word
    next_token: NextToken = "masked"  # the checkpoint's, of requests that name none
    entropy_threshold: float | None = DecodeParams.entropy_threshold  # the same
    block_length: int | None = None  # of a model whose rows see all of their own block; None: of a causal one
    auto_window_size: int = DecodeParams.window_size  # of auto, unless the options or the request say more

    def window_size(self, decoding: Decoding) -> int:
        """The window of requests that do not set one."""
        default = self.auto_window_size if decoding == "auto" else DecodeParams.window_size
        return self.options.wedlm_window_size or default

    @property
    def most_window_rows(self) -> int:
        """The most rows that such a window takes in a step."""
        return max(2 * self.window_size("streaming"), self.window_size("auto"))

    @property
    def decoding(self) -> Decoding:
        """The decoding mode of requests that do not name one."""
        return self.options.decoding or self.model_decoding


def option_fields() -> dict[str, Field]:
    """All options by name, in the order of their declaration."""
    return {one.name: one for one in fields(EngineOptions)}
