# SPDX-License-Identifier: Apache-2.0
"""Answers by the engine, one by one to the disk: AR's own, none twice, a line that was cut repaired."""

import json

import pytest

from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, SamplingParams
from wedlm.accelerate.answers import answer_prompts, read_log, write_training_data

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, decoding="autoregressive")
PROMPTS = [{"messages": [{"role": "user", "content": text}]} for text in "abcdefghijkl"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(save_tiny(tmp_path_factory.mktemp("answers") / "tiny"), device="cpu", max_num_seqs=2)


def test_only_what_lacks_is_answered(llm, tmp_path):
    whole, log = tmp_path / "whole.jsonl", tmp_path / "log.jsonl"
    answer_prompts(llm, PROMPTS, PARAMS, whole, lambda *_: None)
    lines = whole.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:5]) + lines[5][:-4])  # killed within a line
    calls = []
    answer_prompts(llm, PROMPTS, PARAMS, log, lambda *told: calls.append(told[0]))
    assert calls == [5, 6, 7, 8, 9, 10, 11, 12]
    assert read_log(log) == read_log(whole)
    assert len(log.read_bytes().splitlines()) == 12


def test_what_cannot_be_learnt_is_left_out_and_counted(tmp_path):
    log, target = tmp_path / "log.jsonl", tmp_path / "data.jsonl"
    texts = [
        ("fine", True),
        ("cut", False),
        ("  ", True),
        ("half \N{REPLACEMENT CHARACTER}", True),
        ("line\u2028two", True),
    ]
    records = [{"prompt": n, "answer": text, "tokens": 3, "ended": ended} for n, (text, ended) in enumerate(texts)]
    log.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in reversed(records)))
    prompts = [*PROMPTS[:4], {"text": "so "}]
    counts = write_training_data(prompts, log, target)
    assert (counts.written, counts.cut, counts.unusable, counts.tokens) == (3, 1, 2, 9)
    first, cut, second = (json.loads(line) for line in target.read_bytes().split(b"\n") if line)
    assert first["messages"][1] == {"role": "assistant", "content": "fine"}
    assert (cut["messages"][1]["content"], cut["unfinished"]) == ("cut", True)
    assert "unfinished" not in first
    assert second == {"text": "so line\u2028two"}
    log.write_text(json.dumps({**records[2], "prompt": 0}) + "\n")
    with pytest.raises(ValueError, match="none of the 1 answers can be trained on"):
        write_training_data(prompts[:1], log, target)
