# SPDX-License-Identifier: Apache-2.0
"""Reading and writing ``config.json``."""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from tests.model.tiny import CASES, LLAMA3_ROPE, YARN_ROPE, hf_config
from wedlm.model import ModelConfig, RopeScaling

BASE = hf_config("llama")


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str) -> None:
    config = ModelConfig.from_hf(hf_config(name))
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("wedlm")])
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name: str) -> None:
    config = ModelConfig.from_hf(hf_config(name))
    theirs = AutoConfig.for_model(**config.to_hf())
    assert ModelConfig.from_hf(theirs.to_dict()) == config


def test_adapted_checkpoint_keeps_its_model_type() -> None:
    config = ModelConfig.from_hf({**BASE, "mask_token_id": 3, "block_size": 32})
    assert (config.model_type, config.mask_token_id, config.block_size, config.is_wedlm) == ("llama", 3, 32, True)
    assert not ModelConfig.from_hf(BASE).is_wedlm
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_wedlm_defaults_are_those_of_its_configuration_class() -> None:
    config = ModelConfig.from_hf({**BASE, "model_type": "wedlm", "vocab_size": 151936})
    assert (config.qkv_bias, config.out_bias, config.qk_norm) == (True, False, False)
    assert (config.mask_token_id, config.block_size, config.is_wedlm) == (151665, None, True)


def test_biases_by_model_type() -> None:
    def biases(**values: Any) -> tuple[bool, bool, bool]:
        config = ModelConfig.from_hf({**BASE, **values})
        return config.qkv_bias, config.out_bias, config.mlp_bias

    assert biases(model_type="qwen2") == (True, False, False)
    assert biases(model_type="qwen3") == (False, False, False)
    assert biases(model_type="qwen3", attention_bias=True) == (True, True, False)
    assert biases(attention_bias=True) == (True, True, False)
    assert biases(mlp_bias=True) == (False, False, True)
    assert biases(model_type="wedlm", mask_token_id=3) == (True, False, False)


def test_absent_keys_take_the_defaults_of_the_model_type() -> None:
    config = ModelConfig.from_hf({**BASE, "num_key_value_heads": None})
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == (6, 8, 10000.0, 1e-6)
    assert ModelConfig.from_hf({**BASE, "model_type": "qwen3"}).head_dim == 128
    assert ModelConfig.from_hf({**BASE, "dtype": None, "torch_dtype": "bfloat16"}).dtype == "bfloat16"


def test_end_tokens_may_be_one_or_several() -> None:
    assert ModelConfig.from_hf({**BASE, "eos_token_id": [2, 7]}).eos_token_ids == (2, 7)
    assert ModelConfig.from_hf({**BASE, "eos_token_id": None}).eos_token_ids == ()


def test_rope_in_either_spelling() -> None:
    old = ModelConfig.from_hf({**BASE, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE})
    new = ModelConfig.from_hf({**BASE, "rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling(**LLAMA3_ROPE)
    plain = ModelConfig.from_hf({**BASE, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}})
    assert (plain.rope_theta, plain.rope_scaling) == (7.0, None)


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths() -> None:
    rope = {**YARN_ROPE, "factor": None, "original_max_position_embeddings": 128}
    scaling = ModelConfig.from_hf({**BASE, "rope_scaling": rope}).rope_scaling
    assert scaling is not None
    assert scaling.factor == 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; expected one of llama, qwen2, qwen3, wedlm"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"hidden_size": "48"}, "hidden_size is '48'; expected an integer of at least 1"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 4}, "num_kv_heads is 4; expected a divisor of num_heads"),
        ({"head_dim": 7}, "head_dim is 7; expected an even number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"mask_token_id": 97}, "mask_token_id is 97; expected less than vocab_size"),
        ({"mask_token_id": -1}, "mask_token_id is -1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is 'x'"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'; expected one of float32"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window is in use"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is in use"),
        ({"quantization_config": {"bits": 4}}, "or a checkpoint that is not quantised"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'; expected one of default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling lacks factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor is '4'; expected a number above 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "expected one flat set of values"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_refusals_name_the_field_and_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ModelConfig.from_hf({**BASE, **change})


def test_window_that_no_layer_uses_is_accepted() -> None:
    ModelConfig.from_hf({**BASE, "use_sliding_window": False, "sliding_window": 4096})
    ModelConfig.from_hf({**BASE, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3})


def test_flags_that_the_model_type_cannot_express_are_refused() -> None:
    values = {f: getattr(ModelConfig.from_hf(BASE), f) for f in ModelConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match="expected a combination that llama models have"):
        ModelConfig(**{**values, "qk_norm": True})
