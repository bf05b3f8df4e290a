# SPDX-License-Identifier: Apache-2.0
"""Adapters: merged logits equal peft's own, on transformers' model and on ours; everything else is one sentence."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.tiny_llm import save_tiny
from tests.model.peft_kinds import ALL_LINEAR, KINDS, trained
from tests.model.tiny import hf_model, logits_of, our_model, rewrite
from wedlm import LLM, SamplingParams
from wedlm.model import CheckpointError, load_model, pack_for_inference
from wedlm.model.lora.peft import adapted_config, apply_adapter, read_adapter

# peft asks transformers for a property that transformers renames.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")

TOKENS = [1, 5, 42, 7, 96, 7, 3]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(directory: Path, name: str, **options: Any) -> Tensor:
    """Write an adapter of the twin in transformers; logits of the twin merged by peft."""
    model = peft.get_peft_model(hf_model(name), peft.LoraConfig(**{"r": 4, **options}))
    trained(model)
    model.save_pretrained(directory)
    with torch.inference_mode():
        return model.merge_and_unload()(torch.tensor([TOKENS])).logits[0]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_equal_pefts(kind: str, tmp_path: Path) -> None:
    name, options = KINDS[kind]
    wanted = save_adapter(tmp_path, name, **options)
    model = our_model(name)
    before = logits_of(model, TOKENS)
    apply_adapter(model, tmp_path)
    found = logits_of(model, TOKENS)
    assert (found - before).abs().max() > 0.1, "an adapter that changes nothing would test nothing"
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_adapters_trained_on_our_model(name: str, tmp_path: Path) -> None:
    """What the trainer does: peft's layers inside our model, saved without peft's prefix."""
    config = peft.LoraConfig(r=4, target_modules=ALL_LINEAR)
    model = peft.inject_adapter_in_model(config, our_model(name))
    trained(model)
    wanted = logits_of(model, TOKENS)
    save_file(peft.get_peft_model_state_dict(model), tmp_path / WEIGHTS)
    config.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.up_proj.lora_A.weight" in load_file(tmp_path / WEIGHTS)
    merged = our_model(name)
    apply_adapter(merged, tmp_path)
    assert (logits_of(merged, TOKENS) - wanted).abs().max() < 1e-4


def test_sums_are_float32_whatever_the_model_is(tmp_path: Path) -> None:
    save_adapter(tmp_path, "llama", target_modules=ALL_LINEAR)
    exact, half = our_model("llama").to(torch.bfloat16).float(), our_model("llama").to(torch.bfloat16)
    apply_adapter(exact, tmp_path)
    apply_adapter(half, tmp_path)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).to(torch.bfloat16)), name


def test_what_training_notes_beside_an_adapter_is_taken(tmp_path: Path) -> None:
    base = load_model(save_tiny(tmp_path / "model", model_type="qwen3", mask_token_id=None))[1]
    (tmp_path / "adapter").mkdir()
    assert adapted_config(base, tmp_path / "adapter") == base  # another program's adapter
    noted = replace(base, mask_token_id=3, block_size=4)
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(noted.to_hf()))
    assert adapted_config(base, tmp_path / "adapter") == noted
    with pytest.raises(
        CheckpointError, match=r"adapts a qwen3 model of 2 layers, 32 wide; this one is qwen3, 9 layers"
    ):
        adapted_config(replace(base, num_layers=9), tmp_path / "adapter")


def test_llm_takes_an_adapter(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    model, config = load_model(tmp_path / "model")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    injected = peft.inject_adapter_in_model(lora, model)
    trained(injected)
    lora.save_pretrained(tmp_path / "adapter")
    save_file(peft.get_peft_model_state_dict(injected), tmp_path / "adapter" / WEIGHTS)
    params = SamplingParams(max_tokens=12, decoding="autoregressive")
    plain, adapted = (
        LLM(tmp_path / "model", device="cpu", adapter=adapter).generate("Hello", params)[0].token_ids
        for adapter in (None, tmp_path / "adapter")
    )
    assert adapted != plain
    tokens = LLM(tmp_path / "model", device="cpu").tokenizer.encode("Hello")
    assert len(adapted) == 12
    for token in adapted:
        scores = logits_of(injected, tokens)[-1].clone()
        scores[config.mask_token_id] = -torch.inf
        assert int(scores.argmax()) == token
        tokens.append(token)


class TestErrors:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        save_adapter(tmp_path, "llama", target_modules=["q_proj"])
        return tmp_path

    def refused(self, directory: Path, sentence: str, name: str = "llama") -> None:
        """The sentence comes, and no weight has changed."""
        model, before = our_model(name), our_model(name).state_dict()
        with pytest.raises(CheckpointError, match=sentence):
            apply_adapter(model, directory)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]), key

    @pytest.mark.parametrize(
        ("key", "value", "sentence"),
        [
            ("peft_type", "LOHA", "peft_type is 'LOHA'; expected 'LORA'"),
            ("peft_type", None, "peft_type is None"),
            ("use_dora", True, "use_dora is True, a variant of LoRA that is not supported"),
            ("lora_bias", True, "lora_bias is True"),
            ("fan_in_fan_out", True, "fan_in_fan_out is True"),
            ("layer_replication", [[0, 2]], "layer_replication is"),
            ("invented_in_2030", {"x": 1}, "invented_in_2030 is"),
            ("init_lora_weights", "pissa", "init_lora_weights is 'pissa', which also changes the base weights"),
            ("r", 5, r"q_proj have shapes \[4, 48\] and \[48, 4\]; expected rank 5"),
            ("r", "four", "r is 'four'; expected an integer"),
            ("lora_alpha", "x", "lora_alpha is 'x'; expected a number"),
            ("alpha_pattern", {"q_proj": "x"}, "q_proj is 'x'; expected a number"),
        ],
    )
    def test_config(self, saved: Path, key: str, value: object, sentence: str) -> None:
        config = json.loads((saved / CONFIG).read_text())
        (saved / CONFIG).write_text(json.dumps({**config, key: value}))
        self.refused(saved, sentence)

    @pytest.mark.parametrize(("text", "sentence"), [("{", "is not valid JSON"), ("[]", "is not a JSON object")])
    def test_malformed_config(self, saved: Path, text: str, sentence: str) -> None:
        (saved / CONFIG).write_text(text)
        self.refused(saved, sentence)

    def test_no_adapter_at_all(self, tmp_path: Path) -> None:
        self.refused(tmp_path, re.escape(f"{tmp_path}: there is no {CONFIG}"))
        self.refused(tmp_path / "nowhere", f"there is no {CONFIG}")

    def test_only_a_pickle(self, saved: Path) -> None:
        (saved / WEIGHTS).rename(saved / "adapter_model.bin")
        self.refused(saved, r"only a pickle \(adapter_model\.bin\), which can run code")

    def test_no_weights(self, saved: Path) -> None:
        (saved / WEIGHTS).unlink()
        self.refused(saved, f"holds no weights; expected {WEIGHTS}")

    def test_truncated_weights(self, saved: Path) -> None:
        (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:-9])
        self.refused(saved, "corrupt or truncated")

    def test_half_a_pair(self, saved: Path) -> None:
        rewrite(saved / WEIGHTS, **{"base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight": None})
        self.refused(saved, r"q_proj has the LoRA matrices \['A'\]; expected both")

    def test_tensor_of_a_variant(self, saved: Path) -> None:
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"
        rewrite(saved / WEIGHTS, **{key: torch.ones(48)})
        self.refused(saved, r"q_proj\.lora_magnitude_vector, which this model does not have")

    def test_integers(self, saved: Path) -> None:
        rewrite(saved / WEIGHTS, **{"base_model.model.model.norm.weight": torch.ones(48, dtype=torch.int8)})
        self.refused(saved, "has dtype torch.int8; expected floating point")

    def test_module_that_the_model_lacks(self, saved: Path) -> None:
        tensors = load_file(saved / WEIGHTS)
        save_file({name.replace("layers.2.", "layers.3."): t for name, t in tensors.items()}, saved / WEIGHTS)
        self.refused(saved, r"changes model\.layers\.3\.self_attn\.q_proj\.weight, which this model does not have")

    def test_shapes_of_another_model(self, saved: Path) -> None:
        self.refused(saved, r"has shape \[48, 48\]; expected \[96, 48\]", "qwen3-wide-heads")

    @pytest.mark.parametrize(
        ("ids", "sentence"),
        [
            ([7, 97], "contains 97; expected ids below 97"),
            ([7], "expected a list of 2 token ids"),
            ([7, -1], "trainable_token_indices is -1"),
            ({"lm_head": [7, 8]}, "expected a list of 2 token ids for model.embed_tokens"),
        ],
    )
    def test_token_rows(self, tmp_path: Path, ids: object, sentence: str) -> None:
        save_adapter(tmp_path, "llama", target_modules=["q_proj"], trainable_token_indices=[7, 8])
        config = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**config, "trainable_token_indices": ids}))
        self.refused(tmp_path, sentence)

    @pytest.mark.parametrize("options", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
    def test_that_would_untie_the_embeddings(self, tmp_path: Path, options: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_adapter(tmp_path, "llama-tied", **{"target_modules": ["q_proj"], **options})
        self.refused(tmp_path, "which are one tensor in this model", "llama-tied")

    def test_packed_model(self, saved: Path) -> None:
        with pytest.raises(ValueError, match="packed for inference"):
            apply_adapter(pack_for_inference(our_model("llama")), saved)


def test_equal_embeddings_saved_whole_fit_a_tied_model(tmp_path: Path) -> None:
    save_adapter(tmp_path, "llama-tied", target_modules=["q_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    new = torch.randn(97, 48)
    prefix = "base_model.model."
    names = (f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight")
    save_file({**tensors, **{name: new.clone() for name in names}}, tmp_path / WEIGHTS)
    model = our_model("llama-tied")
    apply_adapter(model, tmp_path)
    assert torch.equal(model.lm_head.weight, new)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert set(read_adapter(tmp_path).whole) == {"model.embed_tokens.weight", "lm_head.weight"}
