# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: the mask token and its embedding, the data, and what is refused before a step is paid for."""

import json

import pytest
import torch
from accelerate import Accelerator

from tests.train.chat_data import chat_tokenizer
from tests.train.tiny_run import config_of, questions, save_base, weights, write_chats
from wedlm.model.formats.checkpoint import read_config
from wedlm.train.setup import Setup

TOKENIZER = chat_tokenizer()
UNUSED, FIRST, END = (TOKENIZER.token_id(text) for text in ("<|unused|>", "<s>", "<|im_end|>"))
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(AR checkpoint whose config names no mask token, data, directory)"""
    directory = tmp_path_factory.mktemp("setup")
    base = save_base(directory / "base", mask_token_id=None)
    return base, write_chats(directory / "data.jsonl", 20), directory


def load(parts, base=None, **settings):
    own, data, directory = parts
    return Setup.load(config_of(base or own, data, directory / "out", **settings), Accelerator(mixed_precision="no"))


def test_the_mask_token_is_chosen_and_recorded(parts):
    setup = load(parts)
    assert setup.mask_token_id == setup.model_config.mask_token_id == UNUSED
    assert setup.model_config.block_size == 8
    # Its embedding is the mean of the tokenizer's other rows; nothing else is touched.
    before, after = weights(parts[0])[EMBEDDING], setup.transformer.model.embed_tokens.weight.detach()
    others = torch.arange(TOKENIZER.vocab_size) != UNUSED
    torch.testing.assert_close(after[UNUSED], before[: TOKENIZER.vocab_size][others].mean(dim=0))
    assert torch.equal(after[others.nonzero()[:, 0]], before[others.nonzero()[:, 0]])


def test_a_trained_mask_token_is_left_alone(parts):
    base = save_base(parts[2] / "adapted", block_size=4, mask_token_id=UNUSED)
    setup = load(parts, base)
    assert torch.equal(setup.transformer.model.embed_tokens.weight, weights(base)[EMBEDDING])
    assert setup.model_config.block_size == 8  # that of this training


@pytest.mark.parametrize("untied", [False, True])
def test_frozen_output_rows_stay(parts, untied):
    """What is frozen cannot be trained back, so only the mask's embedding changes, which the result stores."""
    base = save_base(parts[2] / f"untied-{untied}", tie_word_embeddings=not untied, mask_token_id=None)
    setup = load(parts, base, train_embeddings=False)
    assert setup.embeddings_frozen
    assert not setup.transformer.lm_head.weight.requires_grad
    assert not setup.transformer.model.embed_tokens.weight.requires_grad
    if untied:
        assert torch.equal(setup.transformer.lm_head.weight, weights(base)["lm_head.weight"])


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (END, "mask_token_id is .*, which is the end token"),
        (TOKENIZER.encode("cat", add_special_tokens=False)[0], "of ordinary text"),
        (10_000, "mask_token_id is 10000; expected an id from 0 to"),
    ],
)
def test_a_mask_token_that_text_needs(parts, mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(parts, mask_token_id=mask)


def test_a_mask_token_that_the_data_uses(parts):
    """As the chat template writes it: a text that spells it has other tokens."""
    base = save_base(parts[2] / "uses", mask_token_id=None)
    config = json.loads((base / "tokenizer_config.json").read_text())
    mask = "{{ '<|unu' + 'sed|>' if messages[0].content != 'x' }}"  # what no look at the template tells
    config["chat_template"] = mask + config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    plain = parts[2] / "plain.jsonl"
    plain.write_text('{"text": "a <|unused|> b"}\n' * 4)
    load(parts, base, mask_token_id=UNUSED, train_data=str(plain))
    with pytest.raises(ValueError, match=r"tokens of the training data use, first in .*data\.jsonl line 1"):
        load(parts, base, mask_token_id=UNUSED)
    with pytest.raises(ValueError, match=r"data\.jsonl line 1"):
        load(parts, base, mask_token_id=UNUSED, train_data=str(plain), validation_data=str(parts[1]))


def test_ar_training_masks_nothing(parts):
    setup = load(parts, objective="autoregressive")
    assert setup.model_config == read_config(parts[0])
    assert torch.equal(setup.transformer.model.embed_tokens.weight, weights(parts[0])[EMBEDDING])


def test_a_model_that_sees_by_blocks(parts):
    base = save_base(parts[2] / "sdar", model_type="sdar", qk_norm=True, block_size=4, mask_token_id=UNUSED)
    with pytest.raises(ValueError, match=r"model_path is .*sdar, of type 'sdar'; expected a causal model"):
        load(parts, base)


def test_longer_rows_than_the_model_reads(parts):
    with pytest.raises(ValueError, match="max_seq_length is 512; expected at most the model's 256"):
        load(parts, max_seq_length=512)


def test_validation_data_are_all_of_their_documents_and_no_others(parts):
    held_out = write_chats(parts[2] / "held_out.jsonl", 7)
    setup = load(parts, validation_data=str(held_out))
    assert len(setup.train_data.documents) == len(questions(20))
    assert setup.validation_data is not None
    assert len(setup.validation_data.documents) == 7
    assert setup.validation_data.cache.paths == (str(held_out),)
    assert setup.train_data.fingerprint == load(parts).train_data.fingerprint


def test_validation_documents_are_taken_from_training(parts):
    setup = load(parts, validation_documents=5)
    assert setup.validation_data is not None
    train, held_out = (set(data.documents.tolist()) for data in (setup.train_data, setup.validation_data))
    assert (len(train), len(held_out), train & held_out) == (15, 5, set())
    assert load(parts).validation_data is None


def test_lora_trains_its_factors_alone(parts):
    setup = load(parts, lora_rank=4, lora_targets=["q_proj"])
    trained = [name for name, parameter in setup.transformer.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".q_proj.lora_" in name for name in trained)
    again = load(parts, lora_rank=4, lora_targets=["q_proj"])
    for one, other in zip(setup.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r"lora_targets has 'qproj'; expected some of .*q_proj"):
        load(parts, lora_rank=4, lora_targets=["qproj"])


def test_a_lora_of_masked_rows_leaves_the_model_alone(parts):
    settings = {"lora_rank": 4, "lora_rows": "masked", "merge_lora": False, "enable_ar_loss": False}
    setup = load(parts, **settings, lora_targets=["q_proj"])
    trained = [name for name, parameter in setup.transformer.named_parameters() if parameter.requires_grad]
    assert "model.mask_embedding" in trained
    assert all(".q_proj.masked_lora_" in name for name in trained if name != "model.mask_embedding")
    assert torch.equal(setup.transformer.model.embed_tokens.weight, weights(parts[0])[EMBEDDING])
    assert (setup.mask_token_id, setup.model_config.block_size) == (UNUSED, 8)
    with pytest.raises(ValueError, match="lora_layers has 7; expected numbers from 0 to 1"):
        load(parts, **settings, lora_layers=[0, 7])
    with pytest.raises(ValueError, match="lora_targets has 'lm_head'; expected some of down_proj"):
        load(parts, **settings, lora_targets=["lm_head"])
    adapted = save_base(parts[2] / "trained-mask", block_size=4, mask_token_id=UNUSED)
    trained_row = weights(adapted)[EMBEDDING][UNUSED]
    assert torch.equal(load(parts, adapted, **settings).transformer.model.mask_embedding, trained_row)


def test_a_model_without_an_end_token(parts):
    base = save_base(parts[2] / "endless", eos_token_ids=())
    assert read_config(base).eos_token_ids == ()
    assert load(parts, base).train_data.pad_token_id == END  # the tokenizer's
