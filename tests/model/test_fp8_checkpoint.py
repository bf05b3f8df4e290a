# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in FP8: each layout against its dequantised twin, kept in FP8 where that can be, and what is refused."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.fp8_files import BLOCKS, COMPRESSED, LAYOUTS, WEIGHTS, save_fp8
from tests.model.tiny import hf_config, logits_of
from wedlm import LLM
from wedlm.attention.sdpa import CausalAttend
from wedlm.model import CheckpointError, ModelConfig, load_model, pack_for_inference
from wedlm.model.formats.fp8_checkpoint import has_fp8
from wedlm.model.inference.quantization import FP8, Fp8Linear

TOKENS = [1, 5, 42, 7, 96]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_widened_it_is_its_dequantised_twin(tmp_path, layout, caplog):
    saved = save_fp8(tmp_path, layout)
    with caplog.at_level(logging.WARNING):
        model, _ = load_model(saved)
    assert "weights in FP8" in caplog.text
    assert "are widened; quantization 'fp8' rounds them again" in caplog.text
    twin, _ = load_model(saved / "twin")
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(logits_of(model, TOKENS), logits_of(twin, TOKENS))
    assert not has_fp8(model)
    assert {p.dtype for p in load_model(saved, torch.bfloat16)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["one", "outputs"])
@pytest.mark.parametrize("kind", ["wedlm-qwen3", "wedlm-qwen2.5"])
def test_kept_it_has_the_files_own_numbers(tmp_path, fp8_anywhere, layout, kind):
    saved = save_fp8(tmp_path, layout, kind)
    kept, _ = load_model(saved, keeps_fp8=True)
    assert has_fp8(kept)
    twin, _ = load_model(saved / "twin")
    packed = pack_for_inference(kept, "fp8")
    tensors = load_file(saved / WEIGHTS)
    for index, layer in enumerate(packed.model.layers):
        parts = [f"model.layers.{index}.self_attn.{name}_proj.weight" for name in "qkv"]
        values = torch.cat([tensors[part].float() for part in parts])
        assert isinstance(layer.self_attn.qkv_proj, Fp8Linear)
        assert torch.equal(layer.self_attn.qkv_proj.weight.float(), values)
        whole = values * layer.self_attn.qkv_proj.scale[:, None]
        assert torch.equal(whole, torch.cat([twin.state_dict()[part] for part in parts]))
    tokens, positions = torch.tensor(TOKENS), torch.arange(len(TOKENS))
    with torch.inference_mode():  # the only difference left is that of rounding the inputs
        actual, expected = (model(tokens, positions, CausalAttend()) for model in (packed, twin))
    assert 1e-5 < (actual - expected).norm() / expected.norm() < 0.2


def test_blocks_are_widened_even_where_fp8_is_kept(tmp_path, fp8_anywhere):
    saved = save_fp8(tmp_path, "blocks")
    model, _ = load_model(saved, keeps_fp8=True)
    assert not has_fp8(model)
    twin, _ = load_model(saved / "twin")
    assert torch.equal(logits_of(model, TOKENS), logits_of(twin, TOKENS))
    assert pack_for_inference(model, "fp8").model.layers[0].self_attn.o_proj.weight.dtype == FP8


def test_a_kept_model_is_not_packed_in_another_type(tmp_path):
    kept, _ = load_model(save_fp8(tmp_path, "outputs"), keeps_fp8=True)
    with pytest.raises(ValueError, match="the model's layers are in FP8; expected quantization 'fp8'"):
        pack_for_inference(kept)


def test_an_engine_keeps_it_where_it_can(tmp_path, fp8_anywhere, monkeypatch):
    from tests.engine.tiny_llm import tiny_tokenizer

    saved = save_fp8(tmp_path, "outputs")
    tiny_tokenizer().save(saved)
    widened = LLM(saved, device="cpu", mask_token_id=90)
    assert widened.engine.config.options.quantization == "auto"
    monkeypatch.setattr("wedlm.engine.load_weights.multiplies_fp8", lambda _: True)
    kept = LLM(saved, device="cpu", mask_token_id=90)
    assert kept.engine.config.options.quantization == "fp8"
    assert kept.model.model.layers[0].mlp.down_proj.weight.dtype == FP8
    assert LLM(saved, device="cpu", mask_token_id=90, dtype="float32").engine.config.options.quantization == "auto"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fmt": "e5m2"}, "fmt is 'e5m2'; expected 'e4m3'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]; expected \[128, 128\]"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; expected 'fp8' or 'compressed-tensors' in FP8"),
        ({**COMPRESSED, "format": "pack-quantized"}, "format is 'pack-quantized'; expected 'float-quantized'"),
        ({**COMPRESSED, "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}}, "expected floats of 8"),
        ({**COMPRESSED, "config_groups": {"g": None}}, "has weights None; expected floats of 8 bits"),
    ],
)
def test_other_layouts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**hf_config("wedlm-qwen3"), "quantization_config": {**BLOCKS, **change}})


def test_a_config_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="quantization_config is 'fp8'; expected an object"):
        ModelConfig.from_hf({**hf_config("wedlm-qwen3"), "quantization_config": "fp8"})


NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{NAME}_scale": None}, r"q_proj\.weight is in FP8 and has no scale; expected .*weight_scale or .*_inv"),
        (
            {f"{NAME}_scale": torch.ones(7)},
            r"has shape \[7\]; expected one scale, 96 \(one for each output\) or \[1",
        ),
        ({f"{NAME}_scale": torch.full((96, 1), -1.0)}, "holds a scale that is not above 0"),
        ({f"{NAME}_scale": torch.full((96, 1), torch.nan)}, "holds a scale that is not above 0"),
        ({f"{NAME}_scale": torch.ones(96, 1, dtype=torch.int8)}, r"has dtype torch\.int8; expected float32"),
        ({NAME: torch.ones(96, 144)}, r"q_proj\.weight_scale belongs to no weight in FP8"),
    ],
)
@pytest.mark.parametrize("keeps", [False, True])
def test_what_does_not_fit_is_one_sentence(tmp_path, changes, message, keeps):
    saved = save_fp8(tmp_path, "outputs")
    tensors = {**load_file(saved / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, saved / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved, keeps_fp8=keeps)
