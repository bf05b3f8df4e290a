# SPDX-License-Identifier: Apache-2.0
"""Training from random weights until the answers are known by heart, and decoding them back in every mode."""

import pytest
import torch

from tests.train.tiny_run import metrics, questions, save_base, train, write_chats
from wedlm import LLM, SamplingParams

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("overfit")
    base = save_base(directory / "base", hidden_size=96)
    data = write_chats(directory / "data.jsonl", 50)
    final = train(
        base,
        data,
        directory / "out",
        max_seq_length=128,
        suffix_noise=0.5,
        max_steps=320,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=1,
        warmup_ratio=0.05,
        weight_decay=0.0,
        learning_rate=4e-3,
        logging_steps=80,
    )
    return final, metrics(directory / "out")


def test_the_losses_fall(run):
    _, records = run
    assert records[-1]["ar_loss"] < 0.35
    assert records[-1]["masked_loss"] < 0.35 < records[0]["masked_loss"]


@pytest.mark.parametrize("decoding", ["streaming", "verified", "autoregressive", "block"])
def test_fifty_documents_are_reproduced(run, decoding):
    llm = LLM(run[0], dtype="float32", device="cpu")
    chats = [[{"role": "user", "content": question}] for question, _ in questions(50)]
    # Windows as wide as the blocks of training. Block decoding gets a careful threshold: it never goes back to a block.
    settings = {
        "streaming": {"wedlm_window_size": 8},
        "block": {"wedlm_window_size": 8, "wedlm_entropy_threshold": 0.1},
    }.get(decoding, {})
    outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=40, decoding=decoding, **settings))
    wrong = [
        (output["text"], answer)
        for output, (_, answer) in zip(outputs, questions(50), strict=True)
        if output["text"] != answer
    ]
    assert not wrong, wrong[:3]
    if decoding != "autoregressive":
        forwards = sum(output.stats.num_forwards for output in outputs)
        assert sum(output.stats.num_tokens for output in outputs) > 1.5 * forwards


def test_the_result_says_what_it_is(run):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run[0])
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.block_size, model.dtype) == (8, torch.float32)
