# SPDX-License-Identifier: Apache-2.0
"""GGUF files: written here with the ``gguf`` package from models of known logits, then loaded."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from tests.model.gguf_files import permute_rows, write_gguf
from tests.model.tiny import YARN_ROPE, hf_config, logits_of, our_model
from wedlm.model import CheckpointError, ModelConfig, RopeScaling, load_model
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_model import unpermute_rows

TOKENS = [1, 5, 42, 7, 96]


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama", "llama"),
        ("llama-tied", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3-wide-heads", "qwen3"),
        ("qwen3-bias", "qwen3"),
    ],
)
def test_loads_to_the_same_logits(name: str, arch: str, tmp_path: Path) -> None:
    model = our_model(name)
    loaded, config = load_model(write_gguf(tmp_path / "m.gguf", model, arch), torch.float32)
    assert torch.equal(logits_of(loaded, TOKENS), logits_of(model, TOKENS))
    assert config.eos_token_ids == (2, 7)
    wanted = ModelConfig.from_hf({**hf_config(name), "eos_token_id": [2, 7], "dtype": "bfloat16"})
    assert config == wanted


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),  # llama.cpp's rule for a factor without a type
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scale_linear": 1.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_every_way_of_writing_a_linear_factor_is_read(
    keys: dict[str, Any], scaling: RopeScaling | None, tmp_path: Path
):
    _, config = load_model(write_gguf(tmp_path / "m.gguf", our_model("llama"), "llama", keys))
    assert config.rope_scaling == scaling


@pytest.mark.parametrize("key", ["rope.freq_scale", "rope.scaling.alpha", "attention.scale", "logit_scale"])
def test_an_unknown_rope_or_scale_key_is_refused(key: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", our_model("llama"), "llama", {key: 0.5})
    with pytest.raises(CheckpointError, match=rf"llama\.{key} is 0\.5, which is not supported"):
        load_model(path)


def test_unpermute_undoes_the_converter() -> None:
    rows = torch.arange(2 * 8 * 3).reshape(16, 3)
    assert torch.equal(unpermute_rows(permute_rows(rows, 2), 2), rows)
    assert torch.equal(unpermute_rows(permute_rows(rows[:, 0], 2), 2), rows[:, 0])
    assert permute_rows(rows, 2)[:4, 0].tolist() == [0, 12, 3, 15]


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_tensors_are_dequantised_as_by_the_gguf_package(kind: str, tmp_path: Path) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    values = torch.randn(10, 96, generator=torch.Generator().manual_seed(0)).numpy()
    data = gguf.quants.quantize(values, quantisation)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wanted = torch.from_numpy(gguf.quants.dequantize(data, quantisation).copy())
    assert torch.equal(GGUFFile(tmp_path / "q.gguf").tensor("x"), wanted)


def test_stretched_rope_is_read(tmp_path: Path) -> None:
    change = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 8192,
    }
    path = write_gguf(tmp_path / "m.gguf", our_model("llama"), "llama", change)
    assert load_model(path)[1].rope_scaling == RopeScaling(**YARN_ROPE)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"block_count": None}, r"lacks the metadata key llama\.block_count"),
            ({"rope.dimension_count": 4}, r"rope\.dimension_count is 4; expected head_dim \(8\)"),
            ({"attention.sliding_window": 64}, "uses a sliding window"),
            ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "rope_type is 'longrope'"),
            (
                {"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 2.0},
                "attn_factor is 2.0, which is not supported",
            ),
            ({"block_count": 4}, "num_hidden_layers is 4; expected 3"),
            ({"feed_forward_length": 81}, r"mlp\..* has shape .* expected"),
        ],
    )
    def test_metadata_that_cannot_be_served(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", our_model("llama"), "llama", change)
        with pytest.raises(CheckpointError, match=message):
            load_model(path)

    def test_other_architecture(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", our_model("llama"), "gemma")
        with pytest.raises(CheckpointError, match=r"architecture is 'gemma'; expected one of llama, qwen2, qwen3"):
            load_model(path)

    def test_llama3_table_is_refused_rather_than_ignored(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", our_model("llama"), "llama", **{"rope_freqs.weight": torch.ones(4)})
        with pytest.raises(CheckpointError, match=r"stretches RoPE by a table \(rope_freqs\.weight\)"):
            load_model(path)

    def test_unknown_tensor(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", our_model("llama"), "llama", **{"blk.0.ssm.weight": torch.ones(4)})
        with pytest.raises(CheckpointError, match=r"holds the tensor blk\.0\.ssm\.weight"):
            load_model(path)

    @pytest.mark.parametrize("keep", [0, 3, 23, 40, 300, 2000, -100])
    def test_truncated_file(self, keep: int, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", our_model("llama"), "llama")
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"m\.gguf is (not a|a truncated or corrupt) GGUF file|is truncated"):
            load_model(path)

    def test_file_that_is_not_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"PK\3\4" + bytes(100))
        with pytest.raises(CheckpointError, match="is not a GGUF file"):
            load_model(tmp_path / "m.gguf")
