# SPDX-License-Identifier: Apache-2.0
"""Configurations and data of the original's fine-tuning code: each key, its example run as it is, losses by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.chat_data import chat, chat_tokenizer
from tests.train.tiny_run import metrics, questions, save_base
from wedlm.train import parallel
from wedlm.train.alpaca import conversation, download
from wedlm.train.batch import noised_rows
from wedlm.train.config import load_config
from wedlm.train.encode import encode_documents
from wedlm.train.sources import Sample
from wedlm.train.trainer import Trainer

LEAST = {"model_path": "model", "train_data": "a.jsonl"}
# The values of its example.yaml.
EXAMPLE = {
    "model_path": "tencent/WeDLM-8B-Base",
    "trust_remote_code": True,
    "train_data": "data/alpaca_cleaned_sft.jsonl",
    "max_seq_length": 2048,
    "block_size": 32,
    "mask_per_block": True,
    "loss_weighting_scheme": "weighted",
    "mask_eps": 1e-8,
    "num_learnable_im_end": 0,
    "enable_ar_loss": True,
    "ar_loss_weight": 1.0,
    "attention_backend": "dense",
    "output_dir": "outputs/wedlm-sft",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-6,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "rebuild_cache": False,
    "use_deepspeed": True,
    "deepspeed_zero_stage": 2,
    "deepspeed_offload_optimizer": True,
    "deepspeed_offload_param": False,
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 3,
    "bf16": True,
    "seed": 42,
}
# What its configuration class has besides, with its defaults.
OTHERS = {
    "deepspeed_offload_nvme": False,
    "deepspeed_nvme_path": "/tmp/deepspeed_offload",
    "deepspeed_pin_memory": True,
    "deepspeed_overlap_comm": True,
    "deepspeed_contiguous_gradients": True,
    "deepspeed_reduce_bucket_size": 50000000,
    "deepspeed_stage3_prefetch_bucket_size": 50000000,
    "deepspeed_stage3_param_persistence_threshold": 100000,
    "deepspeed_stage3_max_live_parameters": 1000000000,
    "deepspeed_stage3_max_reuse_distance": 1000000000,
    "deepspeed_config_file": None,
    "use_wandb": False,
    "wandb_project": None,
    "wandb_team": None,
    "wandb_group": None,
    "wandb_host": "",
    "wandb_key": None,
}
OFFLOAD = "deepspeed_offload_optimizer is true: moments stay on the GPUs here"


def test_its_example_and_all_other_keys_are_read(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump({**EXAMPLE, **OTHERS}))
    with pytest.warns(UserWarning, match=OFFLOAD):
        config = load_config(path, {})
    read = config.model_dump()
    for name, value in {**EXAMPLE, "num_learnable_im_end": 1}.items():
        if name == "train_data":
            assert read[name] == [{"path": value, "repeat": 1.0}]
        elif name in read:
            assert read[name] == value, name
    assert read["wandb_host"] is None
    gone = {name for name in {**EXAMPLE, **OTHERS} if name not in read}
    assert {name for name in gone if not name.startswith("deepspeed_")} == {
        "trust_remote_code",
        "mask_eps",
        "rebuild_cache",
        "use_deepspeed",
        "wandb_key",
    }


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"use_deepspeed": False, "deepspeed_zero_stage": 2}, {"deepspeed_zero_stage": 0}),
        ({"use_deepspeed": True}, {"deepspeed_zero_stage": 2}),
        ({"use_deepspeed": True, "deepspeed_zero_stage": 1}, {"deepspeed_zero_stage": 1}),
        ({"lr_scheduler_type": "constant_with_warmup"}, {"lr_scheduler_type": "constant"}),
        ({"trust_remote_code": False, "rebuild_cache": True, "mask_eps": 0}, {}),
        ({"num_learnable_im_end": 0}, {"num_learnable_im_end": 1}),
    ],
)
def test_what_keys_mean(given, meant):
    config = load_config(None, {**LEAST, **given})
    assert {name: getattr(config, name) for name in meant} == meant


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"trust_remote_code": "yes"}, "trust_remote_code is 'yes'; expected true or false"),
        ({"rebuild_cache": 1}, "rebuild_cache is 1; expected true or false"),
        ({"mask_eps": 0.1}, "mask_eps is 0.1; expected 0 to 1e-07"),
        ({"mask_eps": "x"}, "mask_eps is 'x'; expected 0 to 1e-07"),
        ({"mask_eps": True}, "mask_eps is True; expected 0 to 1e-07"),
        ({"num_learnable_im_end": -1}, "num_learnable_im_end is -1; input should be greater than or equal to 1"),
        ({"use_deepspeed": 1}, "use_deepspeed is 1; expected true or false"),
        ({"use_deepspeed": True, "deepspeed_zero_stage": 3}, "deepspeed_zero_stage is 3; expected 1 or 2: acc.*FSDP"),
        ({"deepspeed_offload_optimizer": "cpu"}, "deepspeed_offload_optimizer is 'cpu'; expected true or false"),
        ({"deepspeed_config_file": "ds.json"}, "deepspeed_config_file is set; expected deepspeed_zero_stage"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type is 'polynomial'; input should be 'cosine'"),
        ({"wandb_key": "hidden"}, "wandb_key is set; expected none: set the environment variable WANDB_API_KEY"),
    ],
)
def test_what_is_refused_says_why(given, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}") as caught:
        load_config(None, {**LEAST, **given})
    assert "hidden" not in str(caught.value)


def test_zero_is_for_several_gpus_that_nothing_else_configured(monkeypatch):
    made: list[int] = []
    monkeypatch.setattr(parallel, "DeepSpeedPlugin", lambda zero_stage: made.append(zero_stage))
    monkeypatch.setattr(parallel, "require", lambda *_: None)
    for name in ("WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parallel._zero_plugin(2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    parallel._zero_plugin(0)
    for kind in ("DEEPSPEED", "FSDP"):
        monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
        parallel._zero_plugin(2)
        monkeypatch.delenv(f"ACCELERATE_USE_{kind}")
    assert made == []
    parallel._zero_plugin(2)
    assert made == [2]


def alpaca_rows(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": question, "input": f"{question} cat" if number % 3 else " ", "output": answer}
        for number, (question, answer) in enumerate(questions(count))
    ]


def fetch_of(path: Path, rows: Any) -> Any:
    path.write_text(json.dumps(rows))

    def fetch(repository: str, file: str, repo_type: str) -> str:
        assert (repository, file, repo_type) == ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json", "dataset")
        return str(path)

    return fetch


def test_alpaca_as_its_script_writes_it(tmp_path):
    rows = [
        {"instruction": "Say it.", "input": "", "output": "é"},
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
    ]
    path = tmp_path / "data" / "alpaca.jsonl"
    assert download(path, fetch_of(tmp_path / "rows.json", rows)) == (path, 2)
    assert path.read_text(encoding="utf-8") == (
        '[{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "é"}]\n'
        '[{"role": "user", "content": "Add.\\n\\n1, 2"}, {"role": "assistant", "content": "3"}]\n'
    )
    assert download(path, None) == (path, 2)  # nothing is fetched twice


def test_alpaca_offline_says_so(tmp_path):
    def fetch(*_: Any, **__: Any) -> str:
        raise OSError("no route to the hub\nand a long story")

    with pytest.raises(ValueError, match=r"alpaca-cleaned could not be fetched from the hub: no route to the hub$"):
        download(tmp_path / "a.jsonl", fetch)
    for rows in ({}, [1], [{"instruction": "a", "output": "b"}]):
        with pytest.raises(ValueError, match="has other contents; expected rows of instruction, input, output"):
            download(tmp_path / "a.jsonl", fetch_of(tmp_path / "rows.json", rows))
    assert not (tmp_path / "a.jsonl").exists()


def by_hand_document(tokenizer: Any, messages: list[dict[str, str]], num_im_end: int) -> tuple[list[int], int]:
    """(tokens, where what is learnt begins) as the original makes a sample."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")] * max(0, num_im_end - 1)
    return tokens + ends, min(len(tokens), len(tokenizer.encode(prompt, add_special_tokens=False)))


@pytest.mark.parametrize("num_im_end", [1, 8])
@pytest.mark.parametrize(
    "messages",
    [
        chat("one", "two"),
        chat("one", "two", "three", "the cat sat"),
        chat("one", "two", system="be a cat"),
        chat("one", "two", "and what follows is the user's"),
    ],
    ids=["one turn", "two turns", "system", "trailing user"],
)
def test_the_last_message_is_learnt_as_there(tmp_path, messages, num_im_end):
    tokenizer = chat_tokenizer()
    tokenizer.save(tmp_path)
    expected, start = by_hand_document(AutoTokenizer.from_pretrained(tmp_path), messages, num_im_end)
    sample = Sample("a.jsonl", 1, messages=tuple(messages))
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    options = {"num_end_tokens": num_im_end, "eos_token_id": end}
    (document,) = encode_documents(sample, tokenizer, last_message=True, **options)
    assert document.tokens.tolist() == expected
    assert document.trainable.tolist() == [number >= start for number in range(len(expected))]
    (ours,) = encode_documents(sample, tokenizer, **options)
    assert ours.tokens.tolist() != expected  # the line feed after the end, other ends, or the user's last turn


def test_an_unfinished_reply_has_no_end_to_learn():
    sample = Sample("a.jsonl", 3, messages=tuple(chat("one", "two")), unfinished=True)
    with pytest.raises(ValueError, match=r"a\.jsonl:3 is unfinished; expected trainable_messages replies"):
        encode_documents(sample, chat_tokenizer(), eos_token_id=2, last_message=True)


class ByHand:
    """The original's step on one packed sequence, with transformers' own network and a mask for every pair of rows."""

    def __init__(self, directory: Path, mask_token_id: int, block_size: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").float()
        self.mask, self.block_size = mask_token_id, block_size
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def step(self, documents: list[tuple[list[int], int]], noise: list[dict[int, float]], rate: float) -> float:
        """``noise``: for each document γ by masked position."""
        masked_loss, weights, ar_loss, num_ar = torch.zeros(()), 0.0, torch.zeros(()), 0
        for (tokens, start), gammas in zip(documents, noise, strict=True):
            logits, order = self._logits(tokens, set(gammas))
            for row, position in enumerate(order):
                if position in gammas:
                    weight = 1 / (gammas[position] + 1e-8)
                    masked_loss = masked_loss + weight * _nll(logits[len(tokens) + row], tokens[position])
                    weights += weight
            for position in range(max(start, 1), len(tokens)):
                ar_loss = ar_loss + _nll(logits[position - 1], tokens[position])
                num_ar += 1
        loss = (masked_loss / weights + ar_loss / num_ar) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _logits(self, tokens: list[int], masked: set[int]) -> tuple[Tensor, list[int]]:
        """Logits of the clean rows and of all blocks' rows behind them, and the positions of the latter."""
        length, size = len(tokens), self.block_size
        order = sorted(range(length), key=lambda position: (position // size, position in masked, position))
        rows = [*range(length), *order]
        ids = tokens + [self.mask if position in masked else tokens[position] for position in order]
        sees = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
        for query in range(2 * length):
            block = (query % length) // size
            if query < length:
                sees[query, : query + 1] = True
            else:
                sees[query, : block * size] = True
                sees[query, length + block * size : query + 1] = True
        bias = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
        asked = {"attention_mask": bias, "position_ids": torch.tensor([rows]), "use_cache": False}
        return self.model(input_ids=torch.tensor([ids]), **asked).logits[0], order


def _nll(logits: Tensor, target: int) -> Tensor:
    return F.cross_entropy(logits[None], torch.tensor([target]))


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 3e-3}], ids=["as it is", "larger steps"])
def test_its_example_for_20_steps_has_the_losses_made_by_hand(tmp_path, settings):
    """Of its example.yaml, only what the tiny model and its few data need is changed; masks are the run's."""
    rows = alpaca_rows(120)
    data, _ = download(tmp_path / "alpaca.jsonl", fetch_of(tmp_path / "rows.json", rows))
    base = save_base(tmp_path / "base", block_size=32)
    paths = {"model_path": str(base), "train_data": str(data), "output_dir": str(tmp_path / "out")}
    sizes = {"max_seq_length": 96, "max_steps": 20, "bf16": False, "logging_steps": 1, "tensorboard": False}
    there = {"trainable_messages": "last", "cache_dir": str(tmp_path / "cache")}
    with pytest.warns(UserWarning, match=OFFLOAD):
        config = load_config(None, {**EXAMPLE, **paths, **sizes, **there, **settings})
    trainer = Trainer(config)
    trainer.run()
    losses = [record["loss"] for record in metrics(tmp_path / "out")]
    assert len(losses) == 20

    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = {}
    for row in rows:
        tokens, start = by_hand_document(tokenizer, conversation(row), 0)
        samples[tuple(tokens)] = start
    hand = ByHand(base, trainer.setup.mask_token_id, 32)
    expected = []
    for step in range(20):
        sequence = trainer.data.sequence(step)
        stream = noised_rows(sequence, step, config, hand.mask)
        documents, noise = [], []
        for number in range(int(sequence.documents.max()) + 1):
            tokens = sequence.tokens[sequence.documents == number].tolist()
            documents.append((tokens, samples[tuple(tokens)]))
            chosen = stream.masked & (stream.labels.document == number)
            noise.append(dict(zip(stream.positions[chosen].tolist(), stream.ratio[chosen].tolist(), strict=True)))
        rate = (step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 18)) / 2
        expected.append(hand.step(documents, noise, rate * config.learning_rate))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert max(losses) - min(losses) > 0.01
