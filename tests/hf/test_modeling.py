# SPDX-License-Identifier: Apache-2.0
"""The model in transformers: loaded by the Auto classes, equal to the twins and to our own forward."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_propagation, enable_propagation

from tests.engine.tiny_llm import MASK, save_tiny
from tests.model.tiny import CASES, hf_config, hf_model, logits_of, our_model
from wedlm.hf import WeDLMConfig, WeDLMForCausalLM
from wedlm.model import ModelConfig, load_model, load_tokenizer, save_model
from wedlm.model.lora.peft import apply_adapter
from wedlm.model.rope import inverse_frequencies

TOKENS = torch.tensor([[1, 5, 42, 7, 96, 7, 3]])
WEDLM_CASES = [name for name in CASES if name.startswith("wedlm")]


def saved(name: str, directory: Path, **extra: object) -> Path:
    """A directory as our trainer writes it, with extra keys in the config."""
    model = our_model(name)
    save_model(model, ModelConfig.from_hf({**hf_config(name), **extra}), directory)
    return directory


@torch.inference_mode()
def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS, **options: object) -> torch.Tensor:
    return model(tokens, **options).logits


@pytest.mark.parametrize("name", WEDLM_CASES)
def test_auto_classes_load_wedlm_directories(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved(name, tmp_path))
    assert type(model) is WeDLMForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is WeDLMConfig
    assert model.state_dict().keys() == our_model(name).state_dict().keys()
    assert (logits(model) - logits(hf_model(name))).abs().max() < 1e-4
    assert (logits(model)[0] - logits_of(our_model(name), TOKENS[0])).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3-wide-heads", "llama3-rope", "yarn-rope"])
def test_adapted_models_of_other_types_load_with_the_stock_class_and_with_ours(name: str, tmp_path: Path) -> None:
    directory = saved(name, tmp_path, mask_token_id=90, block_size=8)
    stock, ours = AutoModelForCausalLM.from_pretrained(directory), WeDLMForCausalLM.from_pretrained(directory)
    assert type(stock) is type(hf_model(name))
    assert (stock.config.mask_token_id, stock.config.block_size) == (90, 8)
    assert (ours.config.mask_token_id, ours.config.block_size) == (90, 8)
    assert ours.config.model_config().is_wedlm
    assert (logits(ours) - logits(stock)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "qwen3-bias", "yarn-rope", *WEDLM_CASES])
def test_save_and_load_round_trip(name: str, tmp_path: Path) -> None:
    """Type, names, dtype and values survive; our own loader reads what transformers writes."""
    directory = saved(name, tmp_path / "first", mask_token_id=90, block_size=8)
    model = WeDLMForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "second")
    assert (
        load_file(tmp_path / "second" / "model.safetensors").keys() == load_file(directory / "model.safetensors").keys()
    )
    again = WeDLMForCausalLM.from_pretrained(tmp_path / "second")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    read, config = load_model(tmp_path / "second")
    assert config == ModelConfig.from_hf(
        {**hf_config(name), "mask_token_id": 90, "block_size": 8, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    )
    for key, tensor in read.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "second")).__name__ in config.to_hf()["architectures"]


def test_frequencies_of_rope_are_exact_in_bfloat16(tmp_path: Path) -> None:
    """They are no weights: transformers loads into a model without memory and must compute them anew."""
    model = WeDLMForCausalLM.from_pretrained(saved("llama3-rope", tmp_path), dtype=torch.bfloat16)
    expected, _ = inverse_frequencies(our_model("llama3-rope").config)
    assert torch.equal(model.model.rotary.inv_freq, expected)
    assert torch.equal(model.to(torch.float16).model.rotary.inv_freq, expected)


def test_tied_embeddings_stay_one_parameter(tmp_path: Path) -> None:
    model = WeDLMForCausalLM.from_pretrained(saved("llama-tied", tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head


def test_a_new_model_from_a_config() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(WeDLMConfig.of(ModelConfig.from_hf(hf_config("wedlm-qwen3"))))
    assert type(model) is WeDLMForCausalLM
    assert 0.015 < model.model.layers[0].mlp.up_proj.weight.std() < 0.025
    assert torch.equal(model.model.norm.weight, torch.ones(48))
    assert torch.equal(model.model.rotary.inv_freq, inverse_frequencies(model.config.model_config())[0])


@pytest.mark.parametrize("name", ["wedlm-qwen2.5", "wedlm-qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(name: str, side: str, tmp_path: Path) -> None:
    model, twin = AutoModelForCausalLM.from_pretrained(saved(name, tmp_path)), hf_model(name)
    short, missing = TOKENS[:, :4], torch.zeros(1, 3, dtype=torch.long)
    parts, mask = (missing, short), (missing, torch.ones_like(short))
    if side == "right":
        parts, mask = parts[::-1], mask[::-1]
    batch = torch.cat((TOKENS, torch.cat(parts, dim=1)))
    attention_mask = torch.cat((torch.ones_like(TOKENS), torch.cat(mask, dim=1)))
    found = logits(model, batch, attention_mask=attention_mask)
    assert found.isfinite().all()
    real = slice(3, None) if side == "left" else slice(0, 4)
    assert (found[0] - logits(twin)[0]).abs().max() < 1e-4
    assert (found[1, real] - logits(twin, short)[0]).abs().max() < 1e-4


def test_positions_may_come_in_any_order(tmp_path: Path) -> None:
    model, positions = AutoModelForCausalLM.from_pretrained(saved("wedlm-qwen3", tmp_path)), [0, 1, 5, 3, 2, 300, 4]
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    wanted = logits(hf_model("wedlm-qwen3"), attention_mask=mask, position_ids=torch.tensor([positions]))
    for position_ids in (torch.tensor([positions]), torch.tensor(positions)):
        assert (logits(model, position_ids=position_ids) - wanted).abs().max() < 1e-4
    two = logits(model, TOKENS.expand(2, -1), position_ids=torch.tensor([positions, list(range(7))]))
    assert (two[0] - wanted[0]).abs().max() < 1e-4
    assert (two[1] - logits(model)[0]).abs().max() < 1e-4


def test_loss_and_gradients_equal_the_twins(tmp_path: Path) -> None:
    model, twin = AutoModelForCausalLM.from_pretrained(saved("wedlm-qwen2.5", tmp_path)), hf_model("wedlm-qwen2.5")
    batch = TOKENS.repeat(2, 1)
    labels = batch.clone()
    labels[0, :3] = -100
    for one in (model, twin):
        one(batch, labels=labels).loss.backward()
    assert abs(model(batch, labels=labels).loss - twin(batch, labels=labels).loss) < 1e-5
    wanted = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-3)
    summed = model(batch, labels=labels, num_items_in_batch=torch.tensor(2)).loss
    torch.testing.assert_close(summed, twin(batch, labels=labels, num_items_in_batch=torch.tensor(2)).loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_layers_that_are_recomputed_have_the_same_gradients(tmp_path: Path, every: int, reentrant: bool) -> None:
    """As trainers of transformers ask for it; each layer concerned runs once more in the backward pass."""
    model = WeDLMForCausalLM.from_pretrained(save_tiny(tmp_path)).train()
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: one.grad.clone() for name, one in model.named_parameters()}

    plain, count = gradients(), len(model.model.layers)
    assert len(calls) == count
    calls.clear()
    model.activation_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=every)
    model.enable_input_require_grads()  # for the old form, where embeddings are frozen
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name]), name
    assert sorted(calls) == sorted([*range(count), *range(0, count, every)])
    model.activation_checkpointing_disable()
    calls.clear()
    gradients()
    assert len(calls) == count


def test_the_backbone_gives_what_the_head_projects(tmp_path: Path) -> None:
    """As trainers call it that project hidden states themselves."""
    model = WeDLMForCausalLM.from_pretrained(save_tiny(tmp_path))
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(ids, attention_mask=mask).logits)
    with pytest.raises(ValueError, match="inputs_embeds is 1, which WeDLMModel does not support"):
        model.base_model(input_ids=ids, inputs_embeds=1)


def test_logits_to_keep_and_tuples(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved("wedlm-qwen3", tmp_path))
    torch.testing.assert_close(logits(model, logits_to_keep=2), logits(model)[:, -2:])
    (alone,) = model(TOKENS, return_dict=False, use_cache=False, inputs_embeds=None)
    torch.testing.assert_close(alone, logits(model))


@pytest.mark.parametrize("name", ["llama-tied", "wedlm-qwen3"])
def test_adapters_saved_by_transformers_fit_our_model(name: str, tmp_path: Path) -> None:
    """With the mask token's row trained, which a tied output projection shares."""
    import peft

    directory = saved(name, tmp_path / "base", mask_token_id=90)
    model = WeDLMForCausalLM.from_pretrained(directory)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[90]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    model.save_pretrained(tmp_path / "adapter")
    merged, tokens = load_model(directory)[0], torch.tensor([[5, 90, 7]])
    apply_adapter(merged, tmp_path / "adapter")
    assert (logits_of(merged, tokens[0]) - logits(model, tokens)[0]).abs().max() < 1e-4
    assert (logits_of(our_model(name), tokens[0]) - logits(model, tokens)[0]).abs().max() > 0.1


def test_configs_load_without_a_model_and_without_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    enable_propagation()  # transformers' log does not reach Python's root logger otherwise
    try:
        config = WeDLMConfig.from_pretrained(saved("llama-biases", tmp_path))
    finally:
        disable_propagation()
    assert config.model_config() == ModelConfig.from_hf(hf_config("llama-biases"))
    assert not caplog.records


class TestErrors:
    @pytest.fixture
    def model(self, tmp_path: Path) -> WeDLMForCausalLM:
        return WeDLMForCausalLM.from_pretrained(saved("wedlm-qwen3", tmp_path))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"use_cache": True}, "use_cache is True, which WeDLMForCausalLM does not support"),
            ({"output_hidden_states": True}, "output_hidden_states is True"),
            ({"attention_mask": torch.ones(1, 1, 7, 7)}, r"attention_mask has shape \[1, 1, 7, 7\]; expected \[1, 7\]"),
            ({"position_ids": torch.arange(6)}, r"position_ids has shape \[6\]; expected \[1, 7\]"),
        ],
    )
    def test_forward(self, model: WeDLMForCausalLM, options: dict[str, object], sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            model(TOKENS, **options)
        with pytest.raises(ValueError, match=r"input_ids has shape \[7\]; expected \[batch, rows\]"):
            model(TOKENS[0])

    def test_pickles_are_not_read(self, tmp_path: Path) -> None:
        directory = saved("wedlm-qwen3", tmp_path)
        with pytest.raises(ValueError, match="use_safetensors is False; expected True"):
            WeDLMForCausalLM.from_pretrained(directory, use_safetensors=False)
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
        with pytest.raises(OSError, match="safetensors"):
            AutoModelForCausalLM.from_pretrained(directory)

    def test_config_that_is_not_supported(self, tmp_path: Path) -> None:
        directory = saved("wedlm-qwen3", tmp_path)
        (directory / "config.json").write_text(json.dumps({**hf_config("wedlm-qwen3"), "hidden_act": "gelu"}))
        for load in (AutoConfig, WeDLMForCausalLM):
            with pytest.raises(ValueError, match="hidden_act is 'gelu'; expected 'silu'"):
                load.from_pretrained(directory)

    @pytest.mark.parametrize(
        ("preparation", "sentence"),
        [
            ("sys.modules['transformers'] = None", "wedlm.hf needs the package transformers; expected it installed"),
            ("import transformers; transformers.__version__ = '4.57.1'", "transformers is 4.57.1; wedlm.hf expects 5"),
        ],
    )
    def test_no_transformers_or_an_old_one(self, preparation: str, sentence: str) -> None:
        code = f"import sys; {preparation}\ntry:\n    import wedlm.hf\nexcept ImportError as error:\n    print(error)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert sentence in result.stdout


def test_auto_tokenizer_gives_our_ids(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    messages = [{"role": "user", "content": "é, hello <|end|> world"}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ours.apply_chat_template(
        messages
    )
    text = ours.apply_chat_template(messages)
    assert theirs(text).input_ids == ours.encode(text)
    assert MASK not in theirs(text).input_ids
    assert theirs.eos_token == "<|end|>"
