# SPDX-License-Identifier: Apache-2.0
"""The masked objective for others' trainers: losses and gradients are those of ours, and what the collator refuses."""

from types import SimpleNamespace

import pytest
import torch

from tests.engine.tiny_llm import END, MASK, save_tiny
from tests.hf.masked_batches import (
    BLOCK,
    ENDS,
    NumberedCollator,
    noise_without_padding,
    our_loss,
    our_model,
    settings,
    train_batch,
)
from wedlm.hf import WeDLMCollator, WeDLMForCausalLM, masked_loss, masked_training


def example(*documents: tuple[str, str, bool]) -> dict[str, list[int]]:
    """Documents of a prompt, an answer, and whether an end token and a line feed follow it."""
    tokens, labels, lengths = [], [], []
    for prompt, answer, ends in documents:
        own = [ord(c) - 33 for c in prompt + answer] + ([END, 5] if ends else [])
        tokens += own
        labels += [-100] * len(prompt) + own[len(prompt) : len(own) - ends] + [-100] * ends
        lengths.append(len(own))
    return {"input_ids": tokens, "labels": labels, "seq_lengths": lengths}


EXAMPLES = [
    example(("Hello,", "whatareyoudoing?", True), ("Andthen?", "Iwouldnotknow", False)),
    example(("x", "y", True)),
    example(("Sing!", "lalalalalalalalalalalalalalalala", True), ("", "justtext", False), ("q", "rstuvw", True)),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), block_size=BLOCK)


@pytest.fixture
def _same_noise(monkeypatch):
    for module in (train_batch, masked_training):
        monkeypatch.setattr(module, "draw_noise", noise_without_padding)


@pytest.mark.usefixtures("_same_noise")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"suffix_noise": 0.5, "loss_weighting_scheme": "uniform", "ar_loss_weight": 0.3},
        {"mask_per_block": False, "ar_loss_weight": 0.0},
    ],
)
def test_losses_and_gradients_are_those_of_our_trainer(directory, options):
    ours = our_model(directory)
    expected = our_loss(ours, EXAMPLES, 0, settings(**options))
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in ours.transformer.named_parameters()}
    for recomputes in (False, True):
        model = WeDLMForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
        if recomputes:
            model.activation_checkpointing_enable()
        batch = NumberedCollator(model.config, num_learnable_im_end=ENDS, **options)(EXAMPLES)
        output = model(**batch)
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected.detach(), rtol=1e-5, atol=0)
        output.loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_loss_is_a_share_of_the_optimisers_batch(directory):
    model = WeDLMForCausalLM.from_pretrained(directory, dtype=torch.float32)
    batch = WeDLMCollator(model.config)(EXAMPLES)
    whole = model(**batch).loss
    count = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=4 * count).loss, whole / 4)
    labels = batch.pop("labels")
    output = model(**batch, num_items_in_batch=4 * count)  # whose caller divides
    torch.testing.assert_close(masked_loss(output, labels, 4 * count), whole / 4)
    torch.testing.assert_close(masked_loss(output, labels), whole)


def test_losses_added_up_without_their_weights_are_refused(directory):
    """As SFTTrainer does it, unless it is given a loss."""
    model = WeDLMForCausalLM.from_pretrained(directory)
    batch = WeDLMCollator(model.config)(EXAMPLES)
    del batch["labels"], batch["shift_labels"]
    with pytest.raises(ValueError, match="expected compute_loss_func=masked_loss"):
        model.model(**batch)
    with torch.no_grad():  # for its metrics
        assert model.model(**batch).last_hidden_state.shape == (*batch["input_ids"].shape, 32)


def test_noise_is_the_seeds_and_another_one_each_time(directory):
    collator = WeDLMCollator(WeDLMForCausalLM.from_pretrained(directory).config)
    torch.manual_seed(3)
    first, second = (collator(EXAMPLES)["input_ids"] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(collator(EXAMPLES)["input_ids"], first)
    assert not torch.equal(first, second)


CONFIG = SimpleNamespace(mask_token_id=MASK, block_size=None, eos_token_id=None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block_size": 0}, "block_size is 0; expected at least 1"),
        ({"suffix_noise": 2}, "suffix_noise is 2; expected a share"),
        ({"num_learnable_im_end": 0}, "num_learnable_im_end is 0; expected at least 1"),
        ({"ar_loss_weight": -1}, "ar_loss_weight is -1; expected at least 0"),
        ({"loss_weighting_scheme": "none"}, "loss_weighting_scheme is 'none'; expected weighted or uniform"),
    ],
)
def test_options_that_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        WeDLMCollator(CONFIG, **options)


def test_models_and_examples_that_are_refused():
    with pytest.raises(ValueError, match="the model has no mask token; expected a directory that wedlm init"):
        WeDLMCollator(SimpleNamespace(mask_token_id=None, block_size=8, eos_token_id=None))
    collator = WeDLMCollator(CONFIG)
    assert collator.block_size == 32
    for bad, sentence in (
        ({"input_ids": [1, MASK]}, "has the mask token"),
        ({"input_ids": [1, 2], "labels": [1]}, "expected the first two alike"),
        ({"input_ids": [1, 2], "seq_lengths": [1]}, "documents that are all of it"),
        ({"input_ids": []}, "expected at least one token"),
    ):
        with pytest.raises(ValueError, match=sentence):
            collator([bad])
