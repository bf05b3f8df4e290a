# SPDX-License-Identifier: Apache-2.0
"""LoRA: what is trained, what the result is, merged or kept apart."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny_run import (
    StopHereError,
    at_step,
    config_of,
    metrics,
    save_base,
    stop_here,
    train,
    weights,
    write_chats,
)
from wedlm import LLM, SamplingParams
from wedlm.model import load_model
from wedlm.model.formats.checkpoint import read_config
from wedlm.model.lora.peft import apply_adapter

EMBEDDING = "model.embed_tokens.weight"
TARGETS = ("q_proj", "down_proj")
SETTINGS = {"lora_rank": 4, "lora_alpha": 6.0, "lora_targets": list(TARGETS), "learning_rate": 3e-2}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def runs(request, tmp_path_factory):
    """(base, merged result, adapter, training records), the model's output projection tied to its embedding or not."""
    directory = tmp_path_factory.mktemp("lora")
    base = save_base(directory / "base", tie_word_embeddings=request.param, mask_token_id=None)
    data = write_chats(directory / "data.jsonl", 30)
    before = weights(base)
    merged = train(base, data, directory / "merged", **SETTINGS)
    adapter = train(base, data, directory / "kept", **SETTINGS, merge_lora=False)
    assert all(torch.equal(before[name], now) for name, now in weights(base).items())
    return base, merged, adapter, directory


def test_merged_weights_are_base_plus_scaled_product(runs):
    base, merged, adapter, _ = runs
    before, after = weights(base), weights(merged)
    matrices = load_file(adapter / "adapter_model.safetensors")
    mask = read_config(merged).mask_token_id
    assert after.keys() == before.keys()
    for name in before:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if name.split(".")[-2] in TARGETS:
            a, b = matrices[f"{module}.lora_A.weight"], matrices[f"{module}.lora_B.weight"]
            assert b.abs().max() > 0
            torch.testing.assert_close(after[name], before[name] + 6 / 4 * (b @ a), rtol=0, atol=1e-6)
        elif name == EMBEDDING:
            assert (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist() == [mask]
        else:
            assert torch.equal(after[name], before[name]), name


def test_an_adapter_is_the_merged_model(runs):
    base, merged, adapter, directory = runs
    model, _ = load_model(base)
    apply_adapter(model, adapter)
    expected = weights(merged)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6, msg=name)
    assert metrics(directory / "merged") == metrics(directory / "kept")
    config = json.loads((adapter / "config.json").read_text())
    assert (config["mask_token_id"], config["block_size"]) == (read_config(merged).mask_token_id, 8)


def test_an_engine_takes_the_adapter(runs):
    base, merged, adapter, _ = runs
    params = SamplingParams(temperature=0.0, max_tokens=12, decoding="autoregressive")
    texts = []
    for model, options in ((merged, {}), (base, {"adapter": adapter})):
        llm = LLM(model, dtype="float32", device="cpu", **options)
        texts.append(llm.chat([[{"role": "user", "content": f"box {i}"}] for i in range(4)], params))
    assert [output["token_ids"] for output in texts[0]] == [output["token_ids"] for output in texts[1]]


def test_dropout_repeats_itself_after_a_resume(runs, monkeypatch):
    base, _, _, directory = runs
    data = directory / "data.jsonl"
    settings = {**SETTINGS, "lora_dropout": 0.3, "save_steps": 2, "save_total_limit": 9}
    whole = train(base, data, directory / "whole", **settings)
    at_step(monkeypatch, 3, stop_here)
    with pytest.raises(StopHereError):
        train(base, data, directory / "broken", **settings)
    monkeypatch.undo()
    broken = train(base, data, directory / "broken", **settings)
    first, second = weights(whole), weights(broken)
    assert all(torch.equal(first[name], second[name]) for name in first)
    without = train(base, data, directory / "without", **{**settings, "lora_dropout": 0.0})
    assert not all(torch.equal(first[name], value) for name, value in weights(without).items())


def test_an_adapter_of_ar_training_has_no_mask_row(runs):
    base, _, _, directory = runs
    data = directory / "data.jsonl"
    adapter = train(base, data, directory / "ar", **SETTINGS, merge_lora=False, objective="autoregressive", max_steps=2)
    assert not any("embed_tokens" in name for name in load_file(adapter / "adapter_model.safetensors"))
    model, _ = load_model(base)
    apply_adapter(model, adapter)
    assert torch.equal(model.model.embed_tokens.weight, weights(base)[EMBEDDING])


def test_the_base_is_read_only_in_bfloat16(runs):
    """With bf16 the frozen weights are kept in it, and the LoRA in float32."""
    base, _, _, directory = runs
    config = config_of(base, directory / "data.jsonl", directory / "x", **SETTINGS)
    from wedlm.train.lora import add_lora

    model, _ = load_model(base, torch.bfloat16)
    add_lora(model, config)
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name
        assert parameter.requires_grad == trained
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16)
