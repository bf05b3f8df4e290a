# SPDX-License-Identifier: Apache-2.0
"""The shape of a model, read from and written to a Hugging Face ``config.json``."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wedlm.algorithm.params import DECODINGS, NEXT_TOKENS, Decoding, NextToken
from wedlm.model.formats.fp8_checkpoint import check_quantization_config

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "wedlm", "sdar")
# Why others that decode by blocks are not among them.
_REASONS = {
    "llada": "rows of LLaDA see the whole answer, masks to its end included, so that no key of a finished block stays "
    "as it is and nothing can be cached",
    "sdar_moe": "there are no experts here",
}
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")
# What the reference implementation of WeDLM uses where a WeDLM config records no mask token.
WEDLM_MASK_TOKEN_ID = 151665
# The same of SDAR, and the block of its models whose config records none.
SDAR_MASK_TOKEN_ID, SDAR_BLOCK_SIZE = 151669, 4
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "wedlm": "WeDLMForCausalLM",
    "sdar": "SDARForCausalLM",
}
_ROPE_KEYS = {
    "linear": ("rope_type", "factor"),
    "llama3": ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "rope_type",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_ROPE_REQUIRED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}
# Our key of a config.json, and of a GGUF file: the mode of requests that do not name one.
DECODING_KEY = "wedlm_decoding"
# Another: what decides the next token of streaming, of requests that say nothing.
NEXT_TOKEN_KEY = "wedlm_next_token"
# How a checkpoint in eight bits (``formats/int8_rows.py``) says so: a reader that does not know it refuses.
QUANTIZATION_CONFIG = {"quant_method": "wedlm-int8"}
# What no size of an honest model comes near; the positions that float32, in which RoPE counts, still tells apart.
_MAX_INTEGER, MAX_POSITIONS = 2**31 - 1, 2**24
_LEAST_NUMBER, _MOST_NUMBER = 1e-30, 1e15
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How RoPE's frequencies are stretched; field names are those of ``rope_scaling`` in ``config.json``.

    ``original_max_position_embeddings`` is the length in tokens before stretching (llama3, yarn). ``attention_factor``
    multiplies cos and sin (yarn); None derives it from ``factor``, ``mscale`` and ``mscale_all_dim``.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in SUPPORTED_ROPE_TYPES[1:]:
            raise ValueError(f"rope_type is {self.rope_type!r}; expected one of {', '.join(SUPPORTED_ROPE_TYPES)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_number(f"rope_scaling {name}", getattr(self, name))
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_number(f"rope_scaling {name}", getattr(self, name))
        if self.rope_type != "linear" and self.original_max_position_embeddings < 1:
            raise ValueError(
                f"rope_scaling original_max_position_embeddings is {self.original_max_position_embeddings!r}; "
                f"expected a positive integer for {self.rope_type}"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope_scaling low_freq_factor is {self.low_freq_factor!r}; "
                f"expected less than high_freq_factor ({self.high_freq_factor!r})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything that decides the parameters of a model and the function they compute. Raises ValueError naming the
    field.

    ``qkv_bias``, ``out_bias`` and ``mlp_bias`` say which linear layers have a bias, ``qk_norm`` whether queries and
    keys are normalised per head. ``block_size`` is the noise block B of WeDLM training in tokens. It is None for an AR
    checkpoint that was never adapted, and for a WeDLM checkpoint that does not record it; for ``sdar`` it is the block
    whose rows see each other. ``mask_token_id`` is None if none was chosen yet. ``dtype`` names the type that the
    weights are stored in. ``decoding`` is the mode that the checkpoint asks for, and ``next_token`` what decides its
    next token in streaming; None means that it does not say.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    mask_token_id: int | None = None
    block_size: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    decoding: Decoding | None = None
    next_token: NextToken | None = None

    def __post_init__(self) -> None:
        if self.model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(f"model_type is {self.model_type!r}; expected one of {', '.join(SUPPORTED_MODEL_TYPES)}")
        for name in (*_SIZES, "max_position_embeddings"):
            check_integer(name, getattr(self, name), minimum=1)
        check_number("rms_norm_eps", self.rms_norm_eps)
        check_number("rope_theta", self.rope_theta)
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta!r}; expected a number above 1 for yarn")
        if self.max_length > MAX_POSITIONS:
            given = "" if self.max_length == self.max_position_embeddings else " (by rope_scaling)"
            raise ValueError(
                f"max_position_embeddings is {self.max_length}{given}; expected at most {MAX_POSITIONS}, beyond which "
                "positions in float32 are no longer exact"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; expected a divisor of num_heads ({self.num_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; expected an even number, since RoPE rotates pairs")
        _check_flags(self)
        if self.sees_by_block and (self.block_size is None or self.mask_token_id is None):
            raise ValueError(
                f"block_size is {self.block_size} and mask_token_id {self.mask_token_id}; expected both for a "
                f"{self.model_type} model"
            )
        if self.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(SUPPORTED_DTYPES)}")
        if self.decoding is not None and self.decoding not in DECODINGS:
            raise ValueError(f"{DECODING_KEY} is {self.decoding!r}; expected one of {', '.join(DECODINGS)}")
        if self.next_token is not None and self.next_token not in NEXT_TOKENS:
            raise ValueError(f"{NEXT_TOKEN_KEY} is {self.next_token!r}; expected {' or '.join(NEXT_TOKENS)}")
        _check_ids(self)

    @property
    def max_length(self) -> int:
        """The number of positions that RoPE reaches. A YaRN or linear factor stretches the original length, even if
        ``max_position_embeddings`` still records the original one (as in Qwen's instructions)."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type == "llama3":
            return self.max_position_embeddings
        original = scaling.original_max_position_embeddings
        return max(self.max_position_embeddings, int(original * scaling.factor))

    @property
    def is_wedlm(self) -> bool:
        """Whether the weights were trained as WeDLM, so that masked rows predict something."""
        return self.model_type == "wedlm" or (self.block_size is not None and not self.sees_by_block)

    @property
    def sees_by_block(self) -> bool:
        """Whether rows see all of their own block, and only masked rows predict: block diffusion."""
        return self.model_type == "sdar"

    @property
    def default_decoding(self) -> Decoding:
        """The mode of requests that do not name one: the config's own; else streaming for the model type of the paper's
        checkpoints, whose code and figures use no other; block for models that can do nothing else; and auto."""
        by_type: dict[str, Decoding] = {"wedlm": "streaming", "sdar": "block"}
        return self.decoding or by_type.get(self.model_type, "auto")

    @property
    def default_next_token(self) -> NextToken:
        """The config's rule; else the paper's, because nothing says whether the AR head was trained, too."""
        return self.next_token or "masked"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read the content of a ``config.json`` from transformers 4 or 5. Raises ValueError naming key, value and
        expectation.

        Absent optional keys take the defaults of their model type's class in transformers. For ``wedlm`` they take
        those of Tencent's configuration class (attention_bias true, qk_norm false) and its code's mask token; for
        ``sdar``, those of Qwen3, from which it is made, and its code's mask token and block.
        """
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in SUPPORTED_MODEL_TYPES:
            why = f": {_REASONS[model_type]}" if isinstance(model_type, str) and model_type in _REASONS else ""
            raise ValueError(f"model_type is {model_type!r}; expected one of {', '.join(SUPPORTED_MODEL_TYPES)}{why}")
        _refuse_unsupported(config)
        num_heads = read_integer(config, "num_attention_heads")
        hidden_size = read_integer(config, "hidden_size")
        rope_theta, rope_scaling = _read_rope(config)
        return cls(
            model_type=model_type,
            vocab_size=read_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read_integer(config, "intermediate_size"),
            num_layers=read_integer(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=read_integer(config, "num_key_value_heads", num_heads),
            head_dim=read_integer(
                config, "head_dim", 128 if model_type in ("qwen3", "sdar") else hidden_size // num_heads
            ),
            rms_norm_eps=read_number(config, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=read_integer(config, "max_position_embeddings"),
            tie_word_embeddings=read_flag(config, "tie_word_embeddings", False),
            mask_token_id=_read_mask(config),
            block_size=config.get("block_size", SDAR_BLOCK_SIZE if model_type == "sdar" else None),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=read_token_ids("eos_token_id", config.get("eos_token_id")),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
            decoding=config.get(DECODING_KEY),
            next_token=config.get(NEXT_TOKEN_KEY),
            **_read_flags(config),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a ``config.json`` from which ``from_hf`` rebuilds this config.

        transformers 4 and 5 read the AR part; ``mask_token_id``, ``block_size``, ``wedlm_decoding`` and
        ``wedlm_next_token`` are extra keys to them.
        """
        scaling = None if self.rope_scaling is None else asdict(self.rope_scaling)
        eos = list(self.eos_token_ids)
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling and {k: v for k, v in scaling.items() if k in _ROPE_KEYS[scaling["rope_type"]]},
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
            "mask_token_id": self.mask_token_id,
            "block_size": self.block_size,
            # Both spellings: transformers 4 reads torch_dtype, transformers 5 dtype.
            "torch_dtype": self.dtype,
            "dtype": self.dtype,
        }
        if self.model_type != "qwen2":
            config["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            config["mlp_bias"] = self.mlp_bias
        if self.model_type == "wedlm":
            config["qk_norm"] = self.qk_norm
        ours = {DECODING_KEY: self.decoding, NEXT_TOKEN_KEY: self.next_token}
        return config | {key: value for key, value in ours.items() if value is not None}


def _check_ids(config: "ModelConfig") -> None:
    for name, least in (("mask_token_id", 0), ("block_size", 1), ("bos_token_id", 0)):
        if getattr(config, name) is not None:
            check_integer(name, getattr(config, name), minimum=least)
    inside = [] if config.mask_token_id is None else [("mask_token_id", config.mask_token_id)]
    for name, token_id in [*inside, *(("eos_token_id", token_id) for token_id in config.eos_token_ids)]:
        check_integer(name, token_id, minimum=0)
        if token_id >= config.vocab_size:
            raise ValueError(f"{name} is {token_id}; expected less than vocab_size ({config.vocab_size})")


def _check_flags(config: ModelConfig) -> None:
    """Refuse a combination of flags that the model type's own ``config.json`` cannot express."""
    allowed = {
        "llama": config.qkv_bias == config.out_bias and not config.qk_norm,
        "qwen2": config.qkv_bias and not (config.out_bias or config.mlp_bias or config.qk_norm),
        "qwen3": config.qkv_bias == config.out_bias and config.qk_norm and not config.mlp_bias,
        "wedlm": not (config.out_bias or config.mlp_bias),
        "sdar": config.qkv_bias == config.out_bias and config.qk_norm and not config.mlp_bias,
    }
    if not allowed[config.model_type]:
        flags = {name: getattr(config, name) for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm")}
        raise ValueError(f"biases and norms are {flags}; expected a combination that {config.model_type} models have")


def _read_flags(config: Mapping[str, Any]) -> dict[str, bool]:
    """Which biases and norms exist: ``attention_bias`` covers the output projection only in llama and qwen3."""
    model_type = config["model_type"]
    if model_type == "qwen2":
        return {"qkv_bias": True}
    bias = read_flag(config, "attention_bias", model_type == "wedlm")
    if model_type == "wedlm":
        return {"qkv_bias": bias, "qk_norm": read_flag(config, "qk_norm", False)}
    if model_type in ("qwen3", "sdar"):
        return {"qkv_bias": bias, "out_bias": bias, "qk_norm": True}
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": read_flag(config, "mlp_bias", False)}


def _read_mask(config: Mapping[str, Any]) -> Any:
    by_type = {"wedlm": WEDLM_MASK_TOKEN_ID, "sdar": SDAR_MASK_TOKEN_ID}
    mask = config.get("mask_token_id")
    return by_type.get(config["model_type"]) if mask is None else mask


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Refuse features that would change the function the model computes and that this package does not implement."""
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise ValueError(f"hidden_act is {act!r}; expected 'silu'")
    quantization = config.get("quantization_config")
    if quantization not in (None, QUANTIZATION_CONFIG):
        if not isinstance(quantization, Mapping):
            raise ValueError(f"quantization_config is {quantization!r}; expected an object")
        check_quantization_config(quantization)
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ValueError(f"layer_types is {layer_types!r}; expected a list")
    layer_types = [kind for kind in layer_types if kind != "full_attention"]
    window = config.get("sliding_window", 4096)
    slides = config.get("use_sliding_window", False) and window is not None
    first = config.get("max_window_layers", 28)
    if slides and (not isinstance(first, int) or isinstance(first, bool)):
        raise ValueError(f"max_window_layers is {first!r}; expected an integer")
    if layer_types or (slides and first < read_integer(config, "num_hidden_layers")):
        raise ValueError(f"sliding_window is in use ({window!r}); expected full attention in every layer")


def _read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(base, scaling) from ``rope_theta`` + ``rope_scaling`` or transformers 5's ``rope_parameters``."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError(f"rope_parameters is {scaling!r}; expected one flat set of values for all layers")
    theta = read_number(scaling, "rope_theta", read_number(config, "rope_theta", 10000.0))
    rotated = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor is {rotated!r}; expected 1, so that every dimension is rotated")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if not isinstance(rope_type, str) or rope_type not in SUPPORTED_ROPE_TYPES:
        raise ValueError(f"rope_type is {rope_type!r}; expected one of {', '.join(SUPPORTED_ROPE_TYPES)}")
    given = [key for key in _ROPE_KEYS[rope_type][1:] if scaling.get(key) is not None]
    values: dict[str, Any] = {key: read_number(scaling, key, 0.0) for key in given if key != "truncate"}
    if "truncate" in given:
        values["truncate"] = read_flag(scaling, "truncate", True)
    if rope_type != "linear":
        # As in transformers, a length recorded beside the other lengths wins, and the model's own is the last resort.
        length = read_integer(config, "max_position_embeddings")
        key = "original_max_position_embeddings"
        values[key] = read_integer(config if config.get(key) is not None else scaling, key, length)
        if rope_type == "yarn":
            values.setdefault("factor", length / values[key])
    missing = [key for key in _ROPE_REQUIRED[rope_type] if key not in values]
    if missing:
        raise ValueError(f"rope_scaling lacks {missing[0]}; expected it for rope_type {rope_type}")
    return theta, RopeScaling(rope_type=rope_type, **values)


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Read token ids as configs write them: null, one integer or a list."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for token_id in ids:
        check_integer(name, token_id, minimum=0)
    return ids


def check_integer(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {minimum}")
    if value > _MAX_INTEGER:
        raise ValueError(f"{name} is {value!r}; expected at most {_MAX_INTEGER}")


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} is {value!r}; expected a number above 0")
    if not _LEAST_NUMBER <= value <= _MOST_NUMBER:
        raise ValueError(f"{name} is {value!r}; expected a number from {_LEAST_NUMBER:g} to {_MOST_NUMBER:g}")


def read_integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    check_integer(key, value, minimum=1)
    return int(value)  # type: ignore[arg-type]


def read_number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = default if config.get(key) is None else config[key]
    check_number(key, value)
    return float(value)


def read_flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value
