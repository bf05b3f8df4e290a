# SPDX-License-Identifier: Apache-2.0
"""RoPE's frequencies and angles against transformers, over many settings."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.model.tiny import LLAMA3_ROPE, YARN_ROPE, hf_config
from wedlm.model import ModelConfig
from wedlm.model.rope import RotaryEmbedding, rotate

SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
    "yarn": YARN_ROPE,
    "yarn-attention-factor": {**YARN_ROPE, "attention_factor": 0.7},
    "yarn-mscale": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-betas-untruncated": {**YARN_ROPE, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn-no-original-length": {"rope_type": "yarn", "factor": 2.0},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_equal_transformers_to_the_bit(scaling: dict[str, Any] | None, dtype: torch.dtype) -> None:
    values = hf_config("llama") | {
        "head_dim": 128,
        "rope_theta": 1e6,
        "rope_scaling": scaling and dict(scaling),
        "max_position_embeddings": 32768,
    }
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**values))
    positions = torch.tensor([0, 1, 17, 8191, 8192, 32767])
    wanted = theirs(torch.empty(0, dtype=dtype), positions[None])
    cos, sin = RotaryEmbedding(ModelConfig.from_hf(values | {"rope_scaling": scaling}))(positions, dtype)
    half = sin.shape[-1] // 2
    unsigned_sin = torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)
    for mine, hers in zip((cos, unsigned_sin), wanted, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, hers[0])


def test_frequencies_stay_float32_when_the_model_is_cast() -> None:
    module = RotaryEmbedding(ModelConfig.from_hf(hf_config("llama")))
    exact = module.inv_freq.clone()
    module.to(torch.bfloat16).half()
    assert torch.equal(module.inv_freq, exact)
    assert module.inv_freq.dtype == torch.float32


def test_frequencies_are_real_in_a_model_built_on_meta() -> None:
    with torch.device("meta"):
        module = RotaryEmbedding(ModelConfig.from_hf(hf_config("yarn-rope")))
    assert torch.equal(module.inv_freq, RotaryEmbedding(ModelConfig.from_hf(hf_config("yarn-rope"))).inv_freq)


def test_scores_depend_on_the_difference_of_positions_only() -> None:
    rope = RotaryEmbedding(ModelConfig.from_hf(hf_config("llama")))
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(p: int, s: int) -> float:
        turned = [rotate(x, *rope(torch.tensor([at]), torch.float32)) for x, at in ((q, p), (k, s))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 2) == pytest.approx(score(109, 102), abs=1e-4)
    assert score(9, 2) != pytest.approx(score(9, 3), abs=1e-4)
