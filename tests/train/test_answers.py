# SPDX-License-Identifier: Apache-2.0
"""A model's own answers as training data: greedy ones are AR decoding's, continuations go on from their text."""

import json

import pytest
import torch

from tests.train.tiny_run import questions, save_base, write_chats
from wedlm import LLM, SamplingParams
from wedlm.model import load_model, load_tokenizer
from wedlm.train import answers
from wedlm.train.answers import AnswerSettings, sample_answers, write_answers, write_continuations
from wedlm.train.encode import encode
from wedlm.train.sources import read_samples


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("answers") / "base", mask_token_id=None)


def test_greedy_answers_are_ar_decodings(base):
    model, config = load_model(base, torch.float32)
    tokenizer = load_tokenizer(base)
    prompts = [tokenizer.encode(question, False) for question, _ in questions(9)]
    prompts = [prompt[: 1 + i % len(prompt)] for i, prompt in enumerate(prompts)]
    settings = AnswerSettings(max_tokens=20, keep_cut=True)
    found = sample_answers(model, prompts, settings, torch.Generator())
    llm = LLM(base, dtype="float32", device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=20, decoding="autoregressive")
    for output, answer in zip(llm.generate(prompts, params), found, strict=True):
        ids = list(output["token_ids"])
        assert answer == (ids[:-1] if ids[-1] in config.eos_token_ids else ids)


def test_what_does_not_end_is_left_out_unless_kept(base):
    model, _ = load_model(base, torch.float32)
    prompts = [[5, 6, 7]] * 3
    cut, kept = (
        sample_answers(model, prompts, AnswerSettings(max_tokens=2, keep_cut=keep), torch.Generator())
        for keep in (False, True)
    )
    assert all(answer is not None for answer in kept)
    assert [answer is None for answer in cut] == [len(answer) == 2 for answer in kept]


def test_continuations_begin_with_their_text(base, tmp_path):
    model, _ = load_model(base, torch.float32)
    long = "one two three cat sat on mat " * 9
    source = write_chats(tmp_path / "in.jsonl", 2)
    source.write_text(source.read_text() + json.dumps({"text": f"short\n\n{long}\n\n{long}"}) + "\n")
    settings = AnswerSettings(max_tokens=6, temperature=1.0, keep_cut=True)
    written = write_continuations(
        model, load_tokenizer(base), source, tmp_path / "out.jsonl", settings, num_prompt_tokens=4
    )
    texts = [sample.text for sample in read_samples(tmp_path / "out.jsonl", skip_bad=False)]
    assert written == len(texts) == 2
    assert all(text is not None and text.startswith("one two") for text in texts)


def test_parts_are_the_whole_and_cut_answers_have_no_end(base, tmp_path, monkeypatch):
    model, config = load_model(base, torch.float32)
    tokenizer, source = load_tokenizer(base), write_chats(tmp_path / "in.jsonl", 9)
    settings = AnswerSettings(max_tokens=3, keep_cut=True)
    words = tokenizer.encode("it is cat", False)
    monkeypatch.setattr(answers, "sample_answers", lambda _, prompts, *__: [words[: 2 + sum(p) % 2] for p in prompts])
    for name, part in (("whole", (0, 1)), ("first", (0, 2)), ("second", (1, 2))):
        write_answers(model, tokenizer, source, tmp_path / f"{name}.jsonl", settings, part)
    whole, first, second = (list(read_samples(tmp_path / f"{name}.jsonl", skip_bad=False))
                            for name in ("whole", "first", "second"))  # fmt: skip
    texts = [sorted(str(sample.messages) for sample in samples) for samples in (whole, [*first, *second])]
    assert texts[0] == texts[1]
    assert len(first) > len(second) > 0
    (end,) = config.eos_token_ids
    for sample in whole:
        document = encode(sample, tokenizer, eos_token_id=end)
        assert document.trainable.any()
        assert (end in document.tokens[document.trainable]) == (not sample.unfinished)
    assert any(sample.unfinished for sample in whole)


def test_answers_keep_their_questions(base, tmp_path):
    model, _ = load_model(base, torch.float32)
    source = write_chats(tmp_path / "in.jsonl", 5)
    settings = AnswerSettings(max_tokens=8, num_samples=2, temperature=1.0, keep_cut=True)
    written, left_out = write_answers(model, load_tokenizer(base), source, tmp_path / "out.jsonl", settings)
    assert written + left_out == 10
    asked = {question for question, _ in questions(5)}
    for sample in read_samples(tmp_path / "out.jsonl", skip_bad=False):
        assert sample.messages[0]["content"] in asked
        assert sample.messages[1]["role"] == "assistant"
