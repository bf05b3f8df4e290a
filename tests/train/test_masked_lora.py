# SPDX-License-Identifier: Apache-2.0
"""Training a LoRA of masked rows: a plain loop with explicit matrices, a base that stays, and its text made faster."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.train.plain_loop import (
    LENGTH,
    MASK,
    VOCAB,
    gradients,
    plain_loop,
    run,
    settings,
    two_micro_batches,
)
from tests.train.processes import run_processes
from tests.train.tiny_run import config_of, metrics, questions, save_base, train, weights, write_chats
from wedlm import LLM, SamplingParams
from wedlm.model import Transformer
from wedlm.model.errors import CheckpointError
from wedlm.model.formats.checkpoint import read_config
from wedlm.model.lora.packed_adapter import lower_rank, pack_adapter
from wedlm.model.lora.peft import read_adapter
from wedlm.train import batch as batch_module
from wedlm.train.lora import add_masked_lora
from wedlm.train.step import TrainingModel, hidden_states

ROOT = Path(__file__).parents[2]
LORA = {"lora_rank": 4, "lora_rows": "masked", "merge_lora": False, "enable_ar_loss": False}


class ExplicitLora:
    """The model of a plain loop: each masked row of each layer's product gets scale · B A x, written out.

    The rows of these tests hold the mask token where they are masked, and nowhere else.
    """

    def __init__(self, model: Transformer) -> None:
        self.model, self.masked = model, torch.zeros(0)
        for module in model.modules():
            if hasattr(module, "masked_lora_A"):
                module.base_layer.register_forward_hook(self.added_by(module))
        model.model.embed_tokens.register_forward_hook(self.embedded)

    def added_by(self, layer):
        def hook(_: torch.nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
            a, b = layer.masked_lora_A.weight, layer.masked_lora_B.weight
            rows = [y[row] + 1.5 * b @ (a @ x) if self.masked[row] else y[row] for row, x in enumerate(inputs[0])]
            return torch.stack(rows)

        return hook

    def embedded(self, _: torch.nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor:
        return torch.where(self.masked[:, None], self.model.model.mask_embedding, x)

    def __call__(self, tokens: Tensor, positions: Tensor, attend) -> Tensor:
        self.masked = tokens == MASK
        return self.model(tokens, positions, attend)  # without the flags the layers add nothing themselves


def with_random_lora(transformer: Transformer) -> Transformer:
    """A copy with a random LoRA scaled by 6 / 4."""
    model = Transformer(transformer.config)
    model.load_state_dict(transformer.state_dict())
    torch.manual_seed(1)
    config = settings(**LORA, lora_alpha=6.0)
    add_masked_lora(model, config, torch.randn(transformer.config.hidden_size))
    for name, parameter in model.named_parameters():
        if "masked_lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def trained_gradients(model: Transformer) -> dict[str, Tensor]:
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradients(model)


def test_losses_and_gradients_equal_a_plain_loop_with_explicit_factors(transformer):
    micro_batches = two_micro_batches(settings(**LORA))
    loop_model, model = with_random_lora(transformer), with_random_lora(transformer)
    loop = plain_loop(ExplicitLora(loop_model), micro_batches)
    expected = loop.loss(a=0.0, uniform=False)
    expected.backward()
    losses = run(TrainingModel(model, "dense", MASK, False), micro_batches, a=0.0)
    torch.testing.assert_close(losses.loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(losses.statistics.double(), loop.statistics, rtol=1e-5, atol=1e-5)
    found, wanted = trained_gradients(model), trained_gradients(loop_model)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        trained = "masked_lora" in name or "mask_embedding" in name
        assert bool(gradient.any()) == trained, name


def test_observed_rows_of_both_streams_are_the_bases_bit_for_bit(transformer):
    model = with_random_lora(transformer)
    for batch in two_micro_batches(settings(**LORA)):
        with torch.no_grad():
            states = [hidden_states(one, batch, "dense") for one in (transformer, model)]
        masked = batch.masked.flatten()
        observed = ~masked & (batch.document.flatten() >= 0)
        assert (observed & batch.prediction.flatten()).any()
        assert torch.equal(states[0][observed], states[1][observed])
        assert (states[0][masked] != states[1][masked]).any(dim=1).all()


def test_streams_apart_are_one_forward(transformer):
    """The clean stream before the other and without gradients, against all rows at once."""
    micro_batches = two_micro_batches(settings(**LORA, suffix_noise=0.5))
    assert all(batch.num_clean_rows == LENGTH for batch in micro_batches)
    together = [dataclasses.replace(batch, num_clean_rows=0) for batch in micro_batches]
    results = []
    for batches in (micro_batches, together):
        model = with_random_lora(transformer)
        results.append((run(TrainingModel(model, "dense", MASK, False), batches, a=0.0), trained_gradients(model)))
    (apart, found), (whole, expected) = results
    torch.testing.assert_close(apart.loss, whole.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apart.statistics, whole.statistics, rtol=1e-6, atol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_padding_that_all_sequences_share_is_left_out(transformer, monkeypatch):
    config = settings(**LORA)
    whole = two_micro_batches(config)
    monkeypatch.setattr(batch_module, "_PREDICTION_ROWS_MULTIPLE", 4)
    cut = two_micro_batches(config)
    assert all(batch.tokens.shape[1] == 2 * LENGTH for batch in whole)
    for batch in cut:
        assert LENGTH < batch.tokens.shape[1] < 2 * LENGTH
        assert batch.prediction[:, -4:].any()
    losses = [run(TrainingModel(with_random_lora(transformer), "dense", MASK, False), own, 0.0) for own in (whole, cut)]
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    torch.testing.assert_close(losses[0].statistics, losses[1].statistics)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_masked_rows_learn_the_ar_heads_distribution(transformer, share):
    """Against the definition, masked row by masked row: the AR head is the base's, at the token before."""
    trained, model = with_random_lora(transformer), with_random_lora(transformer)
    micro_batches = two_micro_batches(settings(**LORA))
    losses = run(TrainingModel(trained, "dense", MASK, False, distill_masked=share), micro_batches, a=0.0)
    found, expected, weights = trained_gradients(trained), [], []
    for batch in micro_batches:
        rows = [part.flatten() for part in (batch.tokens, batch.document, batch.positions, batch.prediction)]
        tokens, document, position, prediction = rows
        sequence = torch.arange(len(tokens)) // batch.tokens.shape[1]
        hidden = hidden_states(model, batch, "dense")
        logits = model.logits(hidden)
        for rank, row in enumerate(batch.loss_rows.tolist()):
            weight = float(batch.weight[rank])
            if not weight:
                continue
            earlier = (document == document[row]) & (sequence == sequence[row]) & ~prediction
            (before,) = torch.nonzero(earlier & (position == position[row] - 1)).flatten().tolist()
            token = F.one_hot(batch.target[rank], VOCAB).float()
            goal = share * logits[before].detach().softmax(-1) + (1 - share) * token
            expected.append(-(goal * logits[row].log_softmax(-1)).sum() * weight)
            weights.append(weight)
    loss = sum(expected) / sum(weights)
    torch.testing.assert_close(losses.loss, loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    for name, gradient in trained_gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_lora_of_some_layers(runs):
    ar, _, _, directory = runs
    options = {**LORA, "max_steps": 1, "lora_layers": [1], "distill_masked": 0.5}
    result = train(ar, directory / "data.jsonl", directory / "layers", **options)
    names = set(load_file(result / "adapter_model.safetensors")) - {"base_model.model.model.mask_embedding"}
    assert len(names) == 2 * 7
    assert all(".layers.1." in name for name in names)
    answer = SamplingParams(temperature=0.0, max_tokens=12, decoding="verified")
    texts = [LLM(ar, device="cpu", **extra).generate("box a", answer)[0]["text"] for extra in ({"adapter": result}, {})]
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(AR model, its adapter, training records, directory), both after a few steps"""
    return both_runs(tmp_path_factory.mktemp("masked"), 12)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The same, of an AR model that knows 50 answers by heart."""
    return both_runs(tmp_path_factory.mktemp("learned"), 80)


def both_runs(directory, steps: int):
    base = save_base(directory / "raw", hidden_size=96, mask_token_id=None)
    data = write_chats(directory / "data.jsonl", 50)
    common = {
        "max_seq_length": 128,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "warmup_ratio": 0.05,
        "weight_decay": 0.0,
        "logging_steps": 40,
    }
    ar = train(base, data, directory / "ar", objective="autoregressive", max_steps=steps, learning_rate=4e-3, **common)
    settings = {**LORA, "lora_rank": 16, "max_steps": steps, "learning_rate": 1e-2}
    adapter = train(ar, data, directory / "adapter", **settings, **common)
    return ar, adapter, metrics(directory / "adapter"), directory


@pytest.mark.long
def test_the_ar_loss_stays_and_the_masked_loss_falls(learned):
    records = learned[2]
    assert records[-1]["masked_loss"] < 0.7 * records[0]["masked_loss"]
    assert records[-1]["ar_loss"] == pytest.approx(records[0]["ar_loss"], rel=0.05)  # of other rows


@pytest.mark.long
def test_fifty_documents_are_decoded_faster_with_the_bases_text(learned):
    ar, adapter, _, _ = learned
    chats = [[{"role": "user", "content": question}] for question, _ in questions(50)]
    mask = read_config(adapter).mask_token_id
    base, adapted = LLM(ar, device="cpu", mask_token_id=mask), LLM(ar, device="cpu", adapter=adapter)

    def answers(llm: LLM, decoding: str) -> tuple[list[list[int]], float]:
        outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=40, decoding=decoding))
        forwards = sum(output.stats.num_forwards for output in outputs)
        return [output.token_ids for output in outputs], sum(output.stats.num_tokens for output in outputs) / forwards

    expected, _ = answers(base, "autoregressive")
    assert len({tuple(one) for one in expected}) > 20
    for decoding in ("verified", "autoregressive", "auto"):
        found, per_forward = answers(adapted, decoding)
        assert found == expected
        if decoding == "verified":
            assert per_forward > 1.5


def test_the_result_is_an_adapter_of_masked_rows(runs):
    ar, adapter, _, _ = runs
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("MASKED_LORA", 16, 32)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 1 + 2 * 2 * 7
    assert tensors["base_model.model.model.mask_embedding"].shape == (96,)
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.masked_lora_A.weight"].shape == (16, 192)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    noted, base = read_config(adapter), read_config(ar)
    assert (noted.block_size, base.block_size, base.mask_token_id) == (8, None, None)


def test_an_adapter_in_four_bits(runs, tmp_path):
    ar, adapter, _, _ = runs
    size, lost = pack_adapter(adapter, tmp_path / "packed", "adapter_model.safetensors")
    assert size < 0.25 * (adapter / "adapter_model.safetensors").stat().st_size
    assert lost < 0.02
    whole, packed = (read_adapter(directory) for directory in (adapter, tmp_path / "packed"))
    assert packed.masked_rows
    assert packed.low_rank.keys() == whole.low_rank.keys()
    for name, delta in whole.low_rank.items():
        for matrix, restored in ((delta.a, packed.low_rank[name].a), (delta.b, packed.low_rank[name].b)):
            assert (restored - matrix).norm() < 0.2 * matrix.norm()
    chats = [[{"role": "user", "content": question}] for question, _ in questions(12)]
    base = LLM(ar, device="cpu", mask_token_id=read_config(adapter).mask_token_id)
    adapted = LLM(ar, device="cpu", adapter=tmp_path / "packed")
    expected, found = (
        [one.token_ids for one in llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=20, decoding=decoding))]
        for llm, decoding in ((base, "autoregressive"), (adapted, "verified"))
    )
    assert found == expected


def test_a_lower_rank_is_the_nearest(runs):
    """No pair of that rank has a product nearer to the whole one's: what is lost are the last singular values."""
    tensors = load_file(runs[1] / "adapter_model.safetensors")
    for rank in (1, 5, 16, 99):
        lower = lower_rank(tensors, rank)
        assert lower.keys() == tensors.keys()
        for name, a in tensors.items():
            if name.endswith("lora_A.weight"):
                other = name.replace("lora_A", "lora_B")
                whole, found = tensors[other] @ a, lower[other] @ lower[name]
                assert lower[name].shape == (min(rank, len(a)), a.shape[1])
                left_out = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
                assert (found - whole).norm() <= left_out + 1e-5 * whole.norm()
            elif not name.endswith("lora_B.weight"):
                assert lower[name] is a


@pytest.mark.long
def test_an_adapter_is_packed_in_a_lower_rank_by_one_command(runs, tmp_path):
    command = [
        sys.executable,
        ROOT / "recipes/smollm2_135m/pack_masked.py",
        runs[1],
        tmp_path / "packed",
        "--rank",
        "4",
    ]
    subprocess.run(list(map(str, command)), check=True)
    whole, packed = read_adapter(runs[1]), read_adapter(tmp_path / "packed")
    expected = lower_rank(load_file(runs[1] / "adapter_model.safetensors"), 4)
    for name, delta in packed.low_rank.items():
        assert len(delta.a) == 4
        assert delta.scale == whole.low_rank[name].scale
        key = f"base_model.model.{name.removesuffix('.weight')}.masked_lora_A.weight"
        assert (delta.a - expected[key]).norm() < 0.2 * expected[key].norm()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("codes", lambda tensor: tensor[0]),
        ("codes", lambda tensor: tensor.int()),
        ("row", lambda tensor: tensor[:-1]),
        ("column", lambda tensor: tensor.repeat(2)),
        ("levels", lambda tensor: tensor[:3]),
        ("levels", None),
    ],
)
def test_a_damaged_packed_matrix_is_refused(runs, tmp_path, part, change):
    pack_adapter(runs[1], tmp_path / "packed", "adapter_model.safetensors")
    path = tmp_path / "packed" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(f":{part}"))
    tensor = tensors.pop(name)
    save_file(tensors if change is None else {**tensors, name: change(tensor).contiguous()}, path)
    with pytest.raises(
        CheckpointError, match=r"the packed matrix .*masked_lora_\w.weight has parts .*; expected codes"
    ):
        read_adapter(tmp_path / "packed")


def test_a_resumed_run_equals_an_unbroken_one(runs):
    ar, _, _, directory = runs
    data = directory / "data.jsonl"
    options = {**LORA, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    whole = train(ar, data, directory / "whole", **options)
    broken = directory / "broken"
    train(ar, data, broken, **options)
    for path in (broken / "checkpoint-000004").iterdir():
        path.unlink()
    expected, found = (
        load_file(train(ar, data, p.parent, **options) / "adapter_model.safetensors") for p in (whole, broken / "final")
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_base_and_its_mask_tokens_row_stay(runs):
    """Masked rows start from the mean of the vocabulary, which no weight of the base holds."""
    ar, _, _, directory = runs
    options = {**LORA, "max_steps": 1, "learning_rate": 1e-9}
    result = train(ar, directory / "data.jsonl", directory / "one", **options)
    embedding = load_file(result / "adapter_model.safetensors")["base_model.model.model.mask_embedding"]
    rows, mask = weights(ar)["model.embed_tokens.weight"].float(), read_config(result).mask_token_id
    rows = rows[: len(rows) - 4]  # the tokenizer's
    others = torch.arange(len(rows)) != mask
    torch.testing.assert_close(embedding, rows[others].mean(dim=0), rtol=0, atol=1e-6)
    checkpoint = load_file(directory / "one/checkpoint-000001/training_model.safetensors")
    for name, tensor in weights(ar).items():
        found = next(t for n, t in checkpoint.items() if n.replace(".base_layer.", ".") == f"transformer.{name}")
        assert torch.equal(found, tensor.float()), name


def same_lora(adapter, other, tolerance: float) -> None:
    expected = load_file(other / "adapter_model.safetensors")
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance, msg=name)


def test_recomputed_activations_change_nothing(runs):
    ar, _, _, directory = runs
    options = {**LORA, "max_steps": 2, "learning_rate": 1e-2, "lora_dropout": 0.2}
    plain = train(ar, directory / "data.jsonl", directory / "kept", **options)
    again = train(ar, directory / "data.jsonl", directory / "again", activation_checkpointing=True, **options)
    same_lora(again, plain, tolerance=1e-6)


@pytest.mark.long
def test_compiled_layers_change_nothing(runs):
    ar, _, _, directory = runs
    options = {**LORA, "max_steps": 4, "learning_rate": 3e-3}
    plain = train(ar, directory / "data.jsonl", directory / "plain", **options)
    config = config_of(ar, directory / "data.jsonl", directory / "compiled", compile=True, **options)
    same_lora(run_processes(config, 1) / "final", plain, tolerance=5e-5)
