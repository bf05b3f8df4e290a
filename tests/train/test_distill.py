# SPDX-License-Identifier: Apache-2.0
"""Plain text distilled from another model's distributions, and a LoRA that goes on from another one."""

import pytest
import torch

from tests.train.tiny_run import add_texts, config_of, metrics, save_base, train, write_chats
from wedlm.algorithm.objective import LossTotals
from wedlm.train.batch import collate_sequences
from wedlm.train.trainer import Trainer

LORA = {"lora_rank": 4, "learning_rate": 3e-2, "max_steps": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("distill") / "base", mask_token_id=None)


@pytest.fixture
def data(tmp_path):
    """Chats and plain text."""
    return add_texts(write_chats(tmp_path / "data.jsonl", 12))


def test_text_rows_are_those_of_texts(base, data, tmp_path):
    trainer = Trainer(config_of(base, data, tmp_path / "run", **LORA))
    chats = write_chats(tmp_path / "chats.jsonl", 12)
    other = Trainer(config_of(base, chats, tmp_path / "chats", **LORA))
    for run, has_text in ((trainer, True), (other, False)):
        rows = run.data.sequences_in_epoch(0)
        batch = collate_sequences(
            [run.data.sequence(i) for i in range(rows)], range(rows), run.config, run.setup.mask_token_id
        )
        assert bool(batch.is_text.any()) == has_text
        assert not (batch.is_text & ~batch.is_ar).any()
        assert (batch.is_ar & ~batch.is_text).any()
        documents = batch.document.flatten()[batch.loss_rows] + 1000 * (batch.loss_rows // batch.document.shape[1])
        assert not set(documents[batch.is_text].tolist()) & set(documents[batch.is_ar & ~batch.is_text].tolist())


def largest_gradient_of_text(config):
    """Of a first step's layers, when only text pulls."""
    trainer = Trainer(config)
    rows = trainer.data.sequences_in_epoch(0)
    indices = range(rows)
    batch = collate_sequences([trainer.data.sequence(i) for i in indices], indices, config, trainer.setup.mask_token_id)
    batch = batch.to(trainer.device, LossTotals(1.0, 1.0), 1.0)
    only_text = batch.coefficient * batch.is_text
    object.__setattr__(batch, "coefficient", only_text)
    trainer.model(batch).loss.backward()
    found = [p.grad.abs().max() for p in trainer.model.transformer.model.layers.parameters() if p.grad is not None]
    return float(torch.stack(found).max())


def test_distilled_text_has_no_gradient_where_training_begins(base, data, tmp_path):
    """A new LoRA changes nothing, so the base's distribution is the model's own: only chats and masks pull."""
    plain, distilled = (
        largest_gradient_of_text(config_of(base, data, tmp_path / f"run{on}", **LORA, distill_text=on))
        for on in (False, True)
    )
    assert distilled < 1e-4 * plain


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 4}])
def test_text_can_be_distilled_from_a_model_that_is_named(base, data, tmp_path, settings):
    """To the base itself: no gradient, of all weights either. To another one: its text pulls."""
    other = save_base(tmp_path / "other", mask_token_id=None, hidden_size=48)
    gradients = [
        largest_gradient_of_text(
            config_of(base, data, tmp_path / name, distill_text=True, teacher_model=str(path), **settings)
        )
        for name, path in (("own", base), ("others", other))
    ]
    assert gradients[0] < 1e-3 * gradients[1]


def test_the_teacher_is_neither_trained_nor_saved(base, data, tmp_path):
    config = config_of(base, data, tmp_path / "run", **LORA, distill_text=True, teacher_model=str(base))
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.setup.teacher_model.state_dict().items()}
    trainer.run()
    assert all(torch.equal(before[name], t) for name, t in trainer.setup.teacher_model.state_dict().items())
    without = Trainer(config_of(base, data, tmp_path / "without", **LORA))
    assert trainer.model.state_dict().keys() == without.model.state_dict().keys()


def test_a_teacher_of_another_vocabulary_is_refused(base, data, tmp_path):
    other = save_base(tmp_path / "other", mask_token_id=None, eos_token_ids=(), vocab_size=300)
    config = config_of(base, data, tmp_path / "run", distill_text=True, teacher_model=str(other))
    with pytest.raises(ValueError, match=r"teacher_model is .*, of 300 tokens and length \d+; expected \d+ tokens"):
        Trainer(config)


def test_a_teacher_without_use_is_refused(base, data, tmp_path):
    with pytest.raises(ValueError, match=r"teacher_model is set; expected distill_text true and an AR loss"):
        config_of(base, data, tmp_path / "run", teacher_model=str(base))


def test_a_distilled_run_trains_and_saves(base, data, tmp_path):
    plain = train(base, data, tmp_path / "plain", **LORA)
    distilled = train(base, data, tmp_path / "distilled", **LORA, distill_text=True)
    assert plain != distilled
    assert metrics(tmp_path / "plain")[-1]["loss"] != metrics(tmp_path / "distilled")[-1]["loss"]


def test_training_goes_on_from_an_adapter(base, data, tmp_path):
    first = train(base, data, tmp_path / "first", **LORA, merge_lora=False)
    config = config_of(base, data, tmp_path / "second", **LORA, lora_alpha=2.0, lora_init=str(first))
    merged = train(base, data, tmp_path / "merged", **LORA)
    losses = []
    for trainer in (Trainer(config), Trainer(config_of(merged, data, tmp_path / "third", **LORA))):
        rows = trainer.data.sequences_in_epoch(0)
        indices = range(rows)
        batch = collate_sequences(
            [trainer.data.sequence(i) for i in indices], indices, config, trainer.setup.mask_token_id
        )
        losses.append(trainer.model(batch.to(trainer.device, LossTotals(1.0, 1.0), 1.0)).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_adapter_of_another_rank_is_refused(base, data, tmp_path):
    first = train(base, data, tmp_path / "first", **LORA, merge_lora=False)
    config = config_of(base, data, tmp_path / "second", **{**LORA, "lora_rank": 2}, lora_init=str(first))
    with pytest.raises(ValueError, match=r"lora_init is .*; expected an adapter of rank 2 of these lora_targets"):
        Trainer(config)


def test_an_adapter_of_fewer_layers_is_refused(base, data, tmp_path):
    fewer, more = ({**LORA, "lora_targets": targets} for targets in (["q_proj"], ["q_proj", "down_proj"]))
    first = train(base, data, tmp_path / "first", **fewer, merge_lora=False)
    config = config_of(base, data, tmp_path / "second", **more, lora_init=str(first))
    sentence = (
        r"lora_init is .*, which has no LoRA of .*down_proj; expected an adapter of lora_targets q_proj, down_proj"
    )
    with pytest.raises(ValueError, match=sentence):
        Trainer(config)


@pytest.mark.parametrize("setting", [{"distill_text": True}, {"lora_init": "x"}])
def test_without_a_lora_there_is_nothing_to_go_back_to(base, data, tmp_path, setting):
    with pytest.raises(ValueError, match=r"expected a lora_rank above 0 and lora_rows all"):
        config_of(base, data, tmp_path / "run", **setting)
