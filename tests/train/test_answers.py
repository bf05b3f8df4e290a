# SPDX-License-Identifier: Apache-2.0
"""A model's own answers as training data: by the engine, continuations go on from their text."""

import json

import pytest

from tests.engine.tiny_llm import check_empty
from tests.train.tiny_run import questions, save_base, write_chats
from wedlm import LLM, SamplingParams
from wedlm.engine.outputs import GenerationOutput
from wedlm.train.answers import AnswerSettings, write_answers, write_continuations
from wedlm.train.encode import encode
from wedlm.train.sources import read_samples

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, decoding="autoregressive")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("answers") / "base", mask_token_id=None)
    return LLM(base, dtype="float32", device="cpu", max_num_seqs=2)


def prompts_of(llm, count):
    return [llm.tokenizer.encode(question, False) for question, _ in questions(count)]


def test_each_answer_is_that_of_generate(llm):
    prompts = prompts_of(llm, 12)
    found = dict(llm.generate_each(prompts, PARAMS))
    assert [found[place].token_ids for place in range(12)] == [o.token_ids for o in llm.generate(prompts, PARAMS)]
    check_empty(llm)


def test_who_stops_leaves_nothing_running(llm):
    each = llm.generate_each(prompts_of(llm, 12), PARAMS)
    next(each)
    each.close()
    check_empty(llm)


@pytest.fixture
def decided(monkeypatch):
    """Every answer has text, and its prompt says whether it ends by itself."""

    def each(llm, prompts, params):
        for place, prompt in enumerate(prompts):
            yield place, GenerationOutput("it is cat", [], None, "stop" if sum(prompt) % 2 else "length")

    monkeypatch.setattr(LLM, "generate_each", each)


def test_what_does_not_end_is_left_out_unless_kept(llm, tmp_path, decided):
    source, unfinished = write_chats(tmp_path / "in.jsonl", 9), {}
    for keep in (False, True):
        target = tmp_path / f"{keep}.jsonl"
        written, left_out = write_answers(llm, source, target, AnswerSettings(keep_cut=keep))
        unfinished[keep] = [sample.unfinished for sample in read_samples(target, skip_bad=False)]
        assert (written, left_out) == (len(unfinished[keep]), 9 - len(unfinished[keep]))
    assert len(unfinished[True]) == 9
    assert set(unfinished[True]) == {False, True}
    assert unfinished[False] == [one for one in unfinished[True] if not one]


def test_continuations_begin_with_their_text(llm, tmp_path):
    long = "one two three cat sat on mat " * 9
    source = write_chats(tmp_path / "in.jsonl", 2)
    source.write_text(source.read_text() + json.dumps({"text": f"short\n\n{long}\n\n{long}"}) + "\n")
    settings = AnswerSettings(max_tokens=6, temperature=1.0)
    written = write_continuations(llm, source, tmp_path / "out.jsonl", settings, num_prompt_tokens=4)
    texts = [sample.text for sample in read_samples(tmp_path / "out.jsonl", skip_bad=False)]
    assert written == len(texts) == 2
    assert all(text is not None and text.startswith("one two") for text in texts)


def test_parts_are_the_whole_and_cut_answers_have_no_end(llm, tmp_path, decided):
    source, settings = write_chats(tmp_path / "in.jsonl", 9), AnswerSettings(keep_cut=True)
    for name, part in (("whole", (0, 1)), ("first", (0, 2)), ("second", (1, 2))):
        write_answers(llm, source, tmp_path / f"{name}.jsonl", settings, part)
    whole, first, second = (list(read_samples(tmp_path / f"{name}.jsonl", skip_bad=False))
                            for name in ("whole", "first", "second"))  # fmt: skip
    texts = [sorted(str(sample.messages) for sample in samples) for samples in (whole, [*first, *second])]
    assert texts[0] == texts[1]
    assert len(first) > len(second) > 0
    (end,) = llm.model_config.eos_token_ids
    for sample in whole:
        document = encode(sample, llm.tokenizer, eos_token_id=end)
        assert document.trainable.any()
        assert (end in document.tokens[document.trainable]) == (not sample.unfinished)
    assert any(sample.unfinished for sample in whole)


def test_answers_keep_their_questions(llm, tmp_path):
    source = write_chats(tmp_path / "in.jsonl", 5)
    settings = AnswerSettings(max_tokens=8, num_samples=2, temperature=1.0, keep_cut=True)
    written, left_out = write_answers(llm, source, tmp_path / "out.jsonl", settings)
    assert written + left_out == 10
    asked = {question for question, _ in questions(5)}
    for sample in read_samples(tmp_path / "out.jsonl", skip_bad=False):
        assert sample.messages[0]["content"] in asked
        assert sample.messages[1]["role"] == "assistant"
