# SPDX-License-Identifier: Apache-2.0
"""Changes of a model in two bits a value: how near they come, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from wedlm.model.change import changed, quantise_change, restore_change, save_change
from wedlm.model.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"


def random_change(rows: int = 96, columns: int = 128) -> torch.Tensor:
    """Normal, with rows and columns of different sizes, as changes of weights have them."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(rows, 1, generator=generator) * torch.rand(columns, generator=generator) + 0.01
    return torch.randn(rows, columns, generator=generator) * scale * 1e-4


def test_two_bits_lose_an_eighth_of_the_energy():
    """The best four levels of a normal distribution lose 0.1175 of it (Max 1960)."""
    change = random_change()
    stored = quantise_change(change)
    lost = (restore_change(stored) - change).square().sum() / change.square().sum()
    assert 0.09 < lost < 0.125
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == change.numel() / 4 + 2 * (96 + 128) + 16


def test_a_change_of_four_levels_is_kept_exactly():
    codes = torch.randint(0, 4, (16, 32), generator=torch.Generator().manual_seed(1))
    change = torch.tensor([-3.0, -1.0, 1.0, 3.0])[codes] * 2e-3
    assert torch.allclose(restore_change(quantise_change(change)), change, rtol=2e-2)


@pytest.mark.parametrize("shape", [(8,), (8, 6)])
def test_shapes_that_do_not_pack_are_refused(shape):
    with pytest.raises(ValueError, match=r"the change has shape .*; expected \[O, I\] with I a multiple of 4"):
        quantise_change(torch.ones(shape))


def test_zero_rows_stay_zero():
    change = random_change()
    change[3] = 0
    restored = restore_change(quantise_change(change))
    assert torch.isfinite(restored).all()
    assert restored[3].abs().max() < 1e-12


@pytest.fixture
def models() -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(2)
    base = {
        EMBEDDING: torch.randn(10, 8, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(96, 128, generator=generator),
        "model.norm.weight": torch.ones(8),
        "model.layers.0.same.weight": torch.ones(4, 4),
    }
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned[EMBEDDING][7] = 5.0
    tuned["model.layers.0.mlp.up_proj.weight"] += random_change()
    tuned["model.norm.weight"] *= 1.5
    return base, tuned


def test_a_model_comes_back(models, tmp_path):
    base, tuned = models
    save_change(base, tuned, tmp_path / "c.safetensors", "a test")
    assert not any(name.startswith("model.layers.0.same") for name in load_file(tmp_path / "c.safetensors"))
    restored = dict(changed(base.items(), tmp_path / "c.safetensors"))
    assert restored.keys() == base.keys()
    for name in (EMBEDDING, "model.norm.weight", "model.layers.0.same.weight"):
        assert torch.equal(restored[name], tuned[name]), name
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (tuned[name] - base[name]).norm(), (tuned[name] - restored[name]).norm()
    assert after < 0.36 * before


def test_a_file_for_another_model_is_refused(models, tmp_path):
    base, tuned = models
    save_change(base, tuned, tmp_path / "c.safetensors", "a test")
    del base["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"changes model\.norm\.weight, which this model does not have"):
        list(changed(base.items(), tmp_path / "c.safetensors"))


def test_other_files_are_refused(models, tmp_path):
    base, _ = models
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is no file of changes; expected the format wedlm-change-1"):
        list(changed(base.items(), tmp_path / "x.safetensors"))
    (tmp_path / "y.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        list(changed(base.items(), tmp_path / "y.safetensors"))


@pytest.mark.demo_model
def test_the_demo_model_is_the_base_and_its_change():
    from wedlm.model import load_model
    from wedlm.model.demo import DEMO_BLOCK_SIZE, DEMO_CHANGE, DEMO_MASK_TOKEN_ID

    adapted, config = load_model("demo", torch.float32)
    base, base_config = load_model("demo-base", torch.float32)
    assert (config.block_size, base_config.block_size) == (DEMO_BLOCK_SIZE, None)
    assert config.mask_token_id == base_config.mask_token_id == DEMO_MASK_TOKEN_ID
    assert DEMO_CHANGE.stat().st_size < 30_000_000
    same = [name for name, p in base.named_parameters() if torch.equal(p, adapted.get_parameter(name))]
    assert same == []
    rows = (base.model.embed_tokens.weight != adapted.model.embed_tokens.weight).any(dim=1).nonzero().flatten()
    assert rows.tolist() == [DEMO_MASK_TOKEN_ID]
