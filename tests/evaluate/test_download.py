# SPDX-License-Identifier: Apache-2.0
"""Rows as the hub has them become the files that tasks read. The hub itself is not asked here."""

import pytest

from wedlm.evaluate.data import load, read_rows
from wedlm.evaluate.download import SOURCES, download_all

ARC = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"}
SWAG = {
    "activity_label": "Tea",
    "ctx_a": "Boil [step] it.",
    "ctx_b": "she",
    "endings": ["a [title] b", *"cde"],
    "label": "0",
}
ROWS = {
    "openai/gsm8k": [{"question": "1 + 1?", "answer": "#### 2"}],
    "allenai/ai2_arc": [ARC],
    "Rowan/hellaswag": [SWAG],
    "cais/mmlu": [{"subject": "law", "question": "q", "choices": list("wxyz"), "answer": 2}],
    "google-research-datasets/mbpp": [
        {"task_id": i, "text": "t", "code": "c", "test_list": ["assert f()"], "test_setup_code": ""}
        for i in (2, 11, 600)
    ],
    "ybisk/piqa": [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}],
    "allenai/winogrande": [{"sentence": "I saw _ there.", "option1": "A", "option2": "B", "answer": "2"}],
    "google/boolq": [{"passage": "p", "question": "is it", "answer": True}],
}


def fake_load(path, config, split):
    return ROWS.get(path, [{"prompt": "p", "split": split}])


def test_every_source_becomes_a_file(tmp_path):
    names = download_all(tmp_path, fake_load)

    assert names == sorted(names, key=[f"{name}.jsonl.gz" for name in SOURCES].index)
    arc = load(data_dir=str(tmp_path), test="arc_e_test", form="lettered")["test"][0]
    assert (arc["choices"], arc["gold"]) == (["x", "y", "z"], 1)
    swag = load(data_dir=str(tmp_path), test="hellaswag_val", form="lettered")["test"][0]
    assert (swag["question"], swag["choices"][0]) == ("Tea: Boil it. She", "a. b")
    assert load(data_dir=str(tmp_path), test="mmlu_test", form="lettered")["test"][0]["gold"] == 2
    assert [row["task_id"] for row in read_rows(tmp_path, "mbpp_test")] == [11]
    assert [row["task_id"] for row in read_rows(tmp_path, "mbpp_prompt")] == [2]
    winogrande = read_rows(tmp_path, "winogrande_val")[0]
    assert winogrande == {"context_options": ["I saw A", "I saw B"], "continuation": "there.", "gold": 1}
    assert read_rows(tmp_path, "boolq_val")[0]["gold"] == 1
    assert read_rows(tmp_path, "piqa_val")[0]["choices"] == ["a", "b"]


def test_what_is_there_is_not_fetched_again(tmp_path):
    download_all(tmp_path, fake_load)

    def load_nothing(*_, **__):
        raise AssertionError

    assert len(download_all(tmp_path, load_nothing)) == len(SOURCES)


def test_a_failure_is_a_sentence(tmp_path):
    def fail(*_, **__):
        raise ConnectionError("no route\nmore")

    with pytest.raises(ValueError, match=r"gsm8k_test could not be fetched from openai/gsm8k: no route$"):
        download_all(tmp_path, fail)
    assert list(tmp_path.iterdir()) == []
