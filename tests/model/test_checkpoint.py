# SPDX-License-Identifier: Apache-2.0
"""Loading and saving Hugging Face directories: what works, and one clear sentence for everything that does not."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModelForCausalLM

from tests.model.tiny import CASES, hf_config, hf_model, logits_of, our_model, rewrite
from wedlm.model import CheckpointError, ModelConfig, load_model, pack_for_inference, save_model

TOKENS = [1, 5, 42, 7, 96]
WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint directory written by us."""
    save_model(our_model("llama"), ModelConfig.from_hf(hf_config("llama")), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_save_and_load_round_trip(name: str, tmp_path: Path) -> None:
    model, config = our_model(name), ModelConfig.from_hf(hf_config(name))
    save_model(model, config, tmp_path)
    loaded, loaded_config = load_model(tmp_path)
    assert loaded_config == config
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(model, TOKENS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o770, 0o660), (0o700, 0o600)])
def test_who_may_read_the_folder_may_read_the_weights(folder: int, file: int, tmp_path: Path) -> None:
    tmp_path.chmod(folder)
    save_model(our_model("llama"), ModelConfig.from_hf(hf_config("llama")), tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == file


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-wide-heads", "llama3-rope", "yarn-rope"])
def test_transformers_loads_what_we_save(name: str, tmp_path: Path) -> None:
    save_model(our_model(name), ModelConfig.from_hf(hf_config(name)), tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        wanted = twin(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(our_model(name), TOKENS) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_loads_what_transformers_saves(name: str, shard_size: str, tmp_path: Path) -> None:
    twin = hf_model(name)
    twin.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > (shard_size == "40KB")
    model, config = load_model(tmp_path)
    with torch.inference_mode():
        wanted = twin(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(model, TOKENS) - wanted).abs().max() < 1e-4
    assert config.eos_token_ids == (2,)


def test_dtype_is_the_recorded_one_unless_given(tmp_path: Path) -> None:
    model = our_model("llama-tied").to(torch.bfloat16)
    save_model(model, ModelConfig.from_hf(hf_config("llama-tied")), tmp_path)
    loaded, config = load_model(tmp_path)
    assert config.dtype == "bfloat16"
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.rotary.inv_freq.dtype == torch.float32
    assert {p.dtype for p in load_model(tmp_path, torch.float32)[0].parameters()} == {torch.float32}
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(CheckpointError, match=r"dtype is torch.int8; expected one of float32"):
        load_model(tmp_path, torch.int8)


def test_loaded_weights_do_not_depend_on_the_file(saved: Path) -> None:
    model, _ = load_model(saved)
    before = logits_of(model, TOKENS)
    size = (saved / WEIGHTS).stat().st_size
    (saved / WEIGHTS).write_bytes(b"\0" * size)
    assert torch.equal(logits_of(model, TOKENS), before)


@pytest.mark.parametrize(("recorded", "expected"), [([5, 6], (5, 6, 2)), (7, (7, 2)), (None, (2,))])
def test_end_tokens_of_generation_config_come_first(saved: Path, recorded: object, expected: tuple[int, ...]) -> None:
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": recorded}))
    assert load_model(saved)[1].eos_token_ids == expected


def test_redundant_tensors_are_ignored(tmp_path: Path) -> None:
    save_model(our_model("llama-tied"), ModelConfig.from_hf(hf_config("llama-tied")), tmp_path)
    rewrite(
        tmp_path / WEIGHTS,
        **{
            "lm_head.weight": our_model("llama-tied").model.embed_tokens.weight.detach().clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        },
    )
    model, config = load_model(tmp_path)
    assert config.tie_word_embeddings
    assert torch.equal(logits_of(model, TOKENS), logits_of(our_model("llama-tied"), TOKENS))


def test_an_output_projection_that_is_not_the_embedding_is_kept_whatever_the_config_says(tmp_path: Path) -> None:
    save_model(our_model("llama-tied"), ModelConfig.from_hf(hf_config("llama-tied")), tmp_path)
    rewrite(tmp_path / WEIGHTS, **{"lm_head.weight": torch.ones(97, 48)})
    model, config = load_model(tmp_path)
    assert not config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, torch.ones(97, 48))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(model, TOKENS), theirs(torch.tensor([TOKENS])).logits[0], atol=1e-4, rtol=0)


def test_saving_a_packed_model_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    model = pack_for_inference(our_model("llama"))
    with pytest.raises(ValueError, match="packed for inference"):
        save_model(model, model.config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("wedlm.model.formats.save.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(our_model("llama"), ModelConfig.from_hf(hf_config("llama")), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


class TestErrors:
    def test_path_that_does_not_exist(self, tmp_path: Path) -> None:
        for path in (tmp_path / "nothing", "nothing", "models/nothing.gguf"):
            with pytest.raises(CheckpointError, match="does not exist; expected a checkpoint directory"):
                load_model(path)

    def test_file_of_another_kind(self, saved: Path) -> None:
        with pytest.raises(CheckpointError, match=r"is a file; expected a checkpoint directory or a \.gguf file"):
            load_model(saved / WEIGHTS)

    def test_directory_without_config(self, saved: Path) -> None:
        (saved / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            load_model(saved)

    @pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[]", "is not a JSON object")])
    def test_malformed_config(self, saved: Path, text: str, message: str) -> None:
        (saved / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
            load_model(saved)

    def test_config_that_is_refused_names_the_directory(self, saved: Path) -> None:
        (saved / "config.json").write_text(json.dumps({**hf_config("llama"), "model_type": "mamba"}))
        with pytest.raises(CheckpointError, match=f"{saved}: model_type is 'mamba'"):
            load_model(saved)

    def test_only_pickles(self, saved: Path) -> None:
        (saved / WEIGHTS).unlink()
        (saved / "pytorch_model.bin").touch()
        with pytest.raises(CheckpointError, match=r"only as pickles \(pytorch_model\.bin\).*expected safetensors"):
            load_model(saved)

    def test_no_weights(self, saved: Path) -> None:
        (saved / WEIGHTS).unlink()
        with pytest.raises(CheckpointError, match=r"holds no weights; expected model\.safetensors"):
            load_model(saved)

    @pytest.mark.parametrize("keep", [0, 4, 100, -10])
    def test_truncated_file(self, saved: Path, keep: int) -> None:
        data = (saved / WEIGHTS).read_bytes()
        (saved / WEIGHTS).write_bytes(data[:keep])
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS} is a corrupt or truncated safetensors file"):
            load_model(saved)

    def test_missing_tensor(self, saved: Path) -> None:
        rewrite(saved / WEIGHTS, **{"model.norm.weight": None, "lm_head.weight": None})
        with pytest.raises(CheckpointError, match=r"lacks the tensor model\.norm\.weight and 1 more"):
            load_model(saved)

    def test_unexpected_tensor(self, saved: Path) -> None:
        rewrite(saved / WEIGHTS, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})
        with pytest.raises(CheckpointError, match=r"q_proj\.bias, which a llama model of this config does not have"):
            load_model(saved)

    def test_layer_that_the_config_does_not_count(self, saved: Path) -> None:
        (saved / "config.json").write_text(json.dumps({**hf_config("llama"), "num_hidden_layers": 2}))
        with pytest.raises(
            CheckpointError, match="num_hidden_layers is 2; expected 3, the layers whose tensors are there"
        ):
            load_model(saved)

    def test_wrong_shape(self, saved: Path) -> None:
        rewrite(saved / WEIGHTS, **{"model.norm.weight": torch.zeros(47)})
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[47\]; expected \[48\]"):
            load_model(saved)

    def test_wrong_dtype(self, saved: Path) -> None:
        rewrite(saved / WEIGHTS, **{"model.norm.weight": torch.zeros(48, dtype=torch.int8)})
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype torch\.int8; expected one of"):
            load_model(saved)

    def test_missing_shard(self, tmp_path: Path) -> None:
        hf_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
        first = min(tmp_path.glob("*.safetensors"))
        first.unlink()
        with pytest.raises(CheckpointError, match=f"lacks the shard {first.name}"):
            load_model(tmp_path)

    def test_index_that_points_outside(self, saved: Path) -> None:
        shutil.move(saved / WEIGHTS, saved.parent / "elsewhere.safetensors")
        index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
        (saved / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"lacks the shard \.\./elsewhere"):
            load_model(saved)

    def test_malformed_generation_config(self, saved: Path) -> None:
        (saved / "generation_config.json").write_text('{"eos_token_id": "two"}')
        with pytest.raises(CheckpointError, match=r"generation_config\.json eos_token_id is 'two'"):
            load_model(saved)


def test_hub_ids_fetch_data_only(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fetch(repo_id: str, **options: list[str]) -> str:
        calls.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    load_model("some-org/some-model")
    ((repo_id, options),) = calls
    assert repo_id == "some-org/some-model"
    assert set(options["allow_patterns"]) == {"*.json", "*.txt", "*.jinja", "*.safetensors"}


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repo_id: str, **options: list[str]) -> str:
        raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=r"^org/name is not on this machine, and the .* not be reached; expected"):
        load_model("org/name")


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repo_id: str, **options: list[str]) -> str:
        raise ConnectionError("no route\nand a long tail")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=r"is not a local path, and it could not be fetched .*: no route$"):
        load_model("some-org/some-model")
