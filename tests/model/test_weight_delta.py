# SPDX-License-Identifier: Apache-2.0
"""Deltas of a model in four bits a value: how near they come, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from wedlm.model.errors import CheckpointError
from wedlm.model.lora.weight_delta import apply_delta, quantise, restore, save_delta

EMBEDDING, WEIGHT = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"


def random_matrix(rows: int = 96, columns: int = 128, seed: int = 0) -> torch.Tensor:
    """Normal, with rows and columns of different sizes, as a trained LoRA has them."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator) * torch.rand(columns, generator=generator) + 0.01
    return torch.randn(rows, columns, generator=generator) * scale * 1e-2


def test_four_bits_lose_a_hundredth_of_the_energy():
    """The best sixteen levels of a normal distribution lose 0.0095 of it (Max 1960)."""
    matrix = random_matrix()
    stored = quantise(matrix)
    lost = (restore(stored) - matrix).square().sum() / matrix.square().sum()
    assert 0.005 < lost < 0.0105
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == matrix.numel() / 2 + 2 * (96 + 128) + 64


@pytest.mark.parametrize("shape", [(8,), (8, 7)])
def test_shapes_that_do_not_pack_are_refused(shape):
    with pytest.raises(ValueError, match=r"the matrix has shape .*; expected \[O, I\] with I even"):
        quantise(torch.ones(shape))


@pytest.mark.parametrize("zero", [slice(3, 4), slice(None)])
def test_zero_rows_stay_zero(zero):
    matrix = random_matrix()
    matrix[zero] = 0
    restored = restore(quantise(matrix))
    assert torch.isfinite(restored).all()
    assert restored[zero].abs().max() < 1e-12


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        EMBEDDING: torch.randn(10, 8, generator=generator),
        WEIGHT: torch.randn(96, 128, generator=generator),
        "model.norm.weight": torch.ones(8),
    }


@pytest.fixture
def file(tmp_path):
    matrices = {WEIGHT: (random_matrix(96, 8, seed=3), random_matrix(8, 128, seed=4))}
    save_delta(matrices, {EMBEDDING: (torch.tensor([7]), torch.full((1, 8), 5.0))}, tmp_path / "c", "a test")
    return tmp_path / "c", matrices[WEIGHT][0] @ matrices[WEIGHT][1]


def test_a_model_comes_back(base, file):
    path, delta = file
    assert {name.partition(":")[0] for name in load_file(path)} == {EMBEDDING, WEIGHT}
    restored = dict(apply_delta(base.items(), path))
    assert restored.keys() == base.keys()
    assert torch.equal(restored["model.norm.weight"], base["model.norm.weight"])
    assert torch.equal(restored[EMBEDDING][7], torch.full((8,), 5.0))
    assert torch.equal(restored[EMBEDDING][:7], base[EMBEDDING][:7])
    wrong = (restored[WEIGHT] - base[WEIGHT] - delta).norm() / delta.norm()
    assert 0 < wrong < 0.2


def test_a_file_for_another_model_is_refused(base, file):
    del base[WEIGHT]
    with pytest.raises(CheckpointError, match=r"changes model\.layers\.0.*, which this model does not have"):
        list(apply_delta(base.items(), file[0]))


def test_other_files_are_refused(base, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not a delta file; expected the format wedlm-change-2"):
        list(apply_delta(base.items(), tmp_path / "x.safetensors"))
    (tmp_path / "y.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        list(apply_delta(base.items(), tmp_path / "y.safetensors"))


@pytest.mark.long
@pytest.mark.demo_model
def test_the_demo_model_is_the_base_and_its_deltas():
    from wedlm.model import load_model
    from wedlm.model.demo import (
        DEMO_BLOCK_SIZE,
        DEMO_DELTAS,
        DEMO_ENTROPY_THRESHOLD,
        DEMO_MASK_TOKEN_ID,
        DEMO_NEXT_TOKEN,
    )

    adapted, config = load_model("demo", torch.float32)
    base, base_config = load_model("demo-base", torch.float32)
    assert (config.block_size, base_config.block_size) == (DEMO_BLOCK_SIZE, None)
    assert (config.next_token, base_config.next_token) == (DEMO_NEXT_TOKEN, None)
    assert (config.entropy_threshold, base_config.entropy_threshold) == (DEMO_ENTROPY_THRESHOLD, None)
    assert config.mask_token_id == base_config.mask_token_id == DEMO_MASK_TOKEN_ID
    assert sum(delta.stat().st_size for delta in DEMO_DELTAS) < 20_000_000
    same = {name for name, p in base.named_parameters() if torch.equal(p, adapted.get_parameter(name))}
    assert same == {name for name, p in base.named_parameters() if p.ndim == 1}  # norms
    rows = (base.model.embed_tokens.weight != adapted.model.embed_tokens.weight).any(dim=1).nonzero().flatten()
    assert rows.tolist() == [DEMO_MASK_TOKEN_ID]
    tensors = ((name, parameter.detach()) for name, parameter in base.named_parameters())
    for delta in DEMO_DELTAS:
        tensors = apply_delta(tensors, delta)
    for name, tensor in tensors:
        assert torch.equal(tensor, adapted.get_parameter(name)), name
