# SPDX-License-Identifier: Apache-2.0
"""Factors for masked rows alone: what they compute, that observed rows are the base's bit for bit, and refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.model.masked_adapters import CONFIG, PREFIX, WEIGHTS, random_lora, write_adapter
from tests.model.tiny import causal_attend, our_model
from wedlm.model import CheckpointError, Transformer, pack_for_inference, save_model
from wedlm.model.lora.masked_rows import MaskedLora, attach_masked_lora, attach_to_layer, linear_of
from wedlm.model.lora.peft import apply_adapter, read_adapter

NAME = "llama-biases"
TOKENS, POSITIONS = torch.tensor([5, 90, 7, 90, 90, 90]), torch.tensor([0, 1, 4, 2, 3, 5])
OBSERVED = 3  # the second observed row holds the mask token as an ordinary one
MASKED = torch.arange(len(TOKENS)) >= OBSERVED


def adapted(name: str = NAME, layers: str = "proj.weight") -> Transformer:
    model = our_model(name)
    attach_masked_lora(model, random_lora(model, layers=layers), torch.randn(model.config.hidden_size))
    return model


def logits(model: Transformer, masked: Tensor | None) -> Tensor:
    with torch.inference_mode():
        return model(TOKENS, POSITIONS, causal_attend, masked=masked)


@pytest.mark.parametrize("masked", [MASKED, MASKED.nonzero()[:, 0], None], ids=["flags", "indices", "none"])
def test_a_layer_is_its_formula(masked):
    torch.manual_seed(0)
    base = nn.Linear(8, 5)
    a, b, x = torch.randn(3, 8), torch.randn(5, 3), torch.randn(len(TOKENS), 8)
    layer = MaskedLora(base, linear_of(a), linear_of(b), scale=0.5)
    with torch.no_grad():
        y = layer(x, masked)
        for row in range(len(x)):
            expected = base(x)[row]
            if masked is not None and MASKED[row]:
                torch.testing.assert_close(y[row], expected + 0.5 * b @ (a @ x[row]), rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(y[row], expected)


@pytest.mark.parametrize("masked", [MASKED, MASKED.nonzero()[:, 0]], ids=["flags", "indices"])
@pytest.mark.parametrize("packed", [False, True])
def test_observed_rows_are_the_bases_bit_for_bit(masked, packed):
    """Those that hold the mask token as an ordinary one, too; masked rows are others."""
    base, model = our_model(NAME), adapted()
    if packed:
        base, model = pack_for_inference(base), pack_for_inference(model)
    expected, found = logits(base, None), logits(model, masked)
    assert torch.equal(found[:OBSERVED], expected[:OBSERVED])
    assert (found[OBSERVED:] - expected[OBSERVED:]).abs().amin(dim=1).max() > 0
    assert torch.equal(logits(model, None), expected)


@pytest.mark.parametrize(
    ("layers", "dtype", "tolerance"),
    [
        ("proj.weight", torch.float32, 1e-5),
        ("q_proj.weight", torch.float32, 1e-5),  # parts of fused products alone
        ("up_proj.weight", torch.float32, 1e-5),
        ("proj.weight", torch.bfloat16, 0.2),
        ("v_proj.weight", torch.bfloat16, 0.2),
        ("proj.weight", torch.float16, 0.02),
    ],
    ids=str,
)
def test_packing_keeps_the_factors(layers, dtype, tolerance):
    expected = logits(adapted(layers=layers), MASKED)
    packed = pack_for_inference(adapted(layers=layers).to(dtype))
    for masked in (MASKED, MASKED.nonzero()[:, 0]):
        error = (logits(packed, masked).float() - expected).abs().max()
        assert error < tolerance * expected.abs().max(), error
    assert not any(parameter.requires_grad for parameter in packed.parameters())


def test_scale_is_folded_into_a_packed_layer():
    model, other = our_model(NAME), our_model(NAME)
    (weight, (a, b)), *_ = random_lora(model).items()
    attach_to_layer(model, weight.removesuffix(".weight"), a, b, scale=2.5)
    attach_to_layer(other, weight.removesuffix(".weight"), a, 2.5 * b)
    torch.testing.assert_close(logits(pack_for_inference(model), MASKED), logits(other, MASKED), rtol=0, atol=1e-5)


def test_an_adapter_is_read_and_stays_beside_the_weights(tmp_path):
    model = our_model(NAME)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_adapter(tmp_path, model, alpha=6.0)
    assert read_adapter(tmp_path).masked_rows
    expected = our_model(NAME)
    matrices = {name: (a, 2 * b) for name, (a, b) in random_lora(expected).items()}
    attach_masked_lora(expected, matrices, torch.linspace(-1, 1, expected.config.hidden_size))
    apply_adapter(model, tmp_path)
    assert torch.equal(logits(model, MASKED), logits(expected, MASKED))
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class TestRefusals:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        return write_adapter(tmp_path / "adapter", our_model(NAME))

    def test_merging(self, saved, tmp_path):
        model = our_model(NAME)
        apply_adapter(model, saved)
        with pytest.raises(ValueError, match="adapter of masked rows, which cannot be merged; expected the base"):
            save_model(model, model.config, tmp_path / "merged")
        with pytest.raises(ValueError, match="adapter of masked rows, which cannot be merged; expected one without"):
            apply_adapter(model, saved)
        assert not (tmp_path / "merged").exists()

    @pytest.mark.filterwarnings("ignore")
    def test_peft_does_not_take_it_for_lora(self, saved, tmp_path):
        import peft

        model = our_model(NAME)
        save_model(model, model.config, tmp_path / "base")
        from transformers import AutoModelForCausalLM

        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with pytest.raises(KeyError, match="MASKED_LORA"):
            peft.PeftModel.from_pretrained(twin, str(saved))

    def refused(self, saved: Path, sentence: str, **changes: Tensor) -> None:
        tensors = load_file(saved / WEIGHTS) | {PREFIX + name: tensor for name, tensor in changes.items()}
        save_file(tensors, saved / WEIGHTS)
        with pytest.raises(CheckpointError, match=sentence):
            apply_adapter(our_model(NAME), saved)

    def test_what_is_no_part_of_it(self, saved):
        name = "model.layers.0.mlp.up_proj.lora_A.weight"
        self.refused(saved, f"tensor {name} is not part of an adapter of masked rows", **{name: torch.ones(3, 48)})

    def test_factors_of_other_layers(self, saved):
        changes = {"lm_head.masked_lora_A.weight": torch.ones(3, 48), "lm_head.masked_lora_B.weight": torch.ones(97, 3)}
        self.refused(saved, r"changes lm_head\.weight, which this model does not have", **changes)

    def test_shapes(self, saved):
        self.refused(
            saved,
            r"change of model\.mask_embedding has shape \[3\]; expected \[48\]",
            **{"model.mask_embedding": torch.ones(3)},
        )

    def test_names_of_ordinary_factors(self, saved):
        """The type alone makes an ordinary adapter none of masked rows, and the other way round."""
        values = json.loads((saved / CONFIG).read_text())
        (saved / CONFIG).write_text(json.dumps(values | {"peft_type": "LORA"}))
        self.refused(saved, r"masked_lora_A\.weight, which this model does not have")


def test_explicit_rows_of_a_whole_model():
    """The layers get the flags of their rows: one row at a time, each with merged weights if it is masked."""
    model = adapted("llama")
    base, merged = our_model("llama"), our_model("llama")
    for name, (a, b) in random_lora(base).items():
        merged.get_parameter(name).data += b @ a
    embedding = model.model.mask_embedding
    assert embedding is not None
    found = logits(model, MASKED)
    with torch.no_grad():
        states = [
            embedding if MASKED[row] else base.model.embed_tokens.weight[token] for row, token in enumerate(TOKENS)
        ]
        for number in range(model.config.num_layers):
            layers = [(merged if flag else base).model.layers[number] for flag in MASKED]
            states = _one_layer(model, layers, states)
        for row, state in enumerate(states):
            torch.testing.assert_close(base.logits(state), found[row], rtol=1e-4, atol=1e-4)


def _one_layer(model: Transformer, layers: list[nn.Module], states: list[Tensor]) -> list[Tensor]:
    config = model.config
    share = config.num_heads // config.num_kv_heads
    queries, keys, values = [], [], []
    for row, (layer, state) in enumerate(zip(layers, states, strict=True)):
        x, attention = layer.input_layernorm(state), layer.self_attn
        angle = POSITIONS[row] * config.rope_theta ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        turn = torch.polar(torch.ones_like(angle), angle)
        for found, projection in ((queries, attention.q_proj), (keys, attention.k_proj)):
            halves = projection(x).unflatten(0, (-1, 2, config.head_dim // 2))
            turned = torch.complex(halves[:, 0], halves[:, 1]) * turn
            found.append(torch.cat((turned.real, turned.imag), dim=-1))
        values.append(attention.v_proj(x).unflatten(0, (-1, config.head_dim)))
    after = []
    for row, (layer, state) in enumerate(zip(layers, states, strict=True)):
        heads = []
        for head in range(config.num_heads):
            k, v = (torch.stack([one[head // share] for one in part[: row + 1]]) for part in (keys, values))
            heads.append(torch.softmax(k @ queries[row][head] / math.sqrt(config.head_dim), dim=0) @ v)
        state = state + layer.self_attn.o_proj(torch.cat(heads))
        x, mlp = layer.post_attention_layernorm(state), layer.mlp
        after.append(state + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    return after
