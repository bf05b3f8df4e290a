# SPDX-License-Identifier: Apache-2.0
"""The stages of benchmarks/embedded_eval.py: what there is, who takes which, what is scored, and the tables of it."""

import json
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.embedded_eval import (
    AR,
    STREAMING,
    Bench,
    Stage,
    chosen,
    claimed,
    difference,
    pairs_of,
    same_texts,
    score,
    stages,
)
from benchmarks.embedded_tables import filled, joined
from tests.engine.tiny_llm import save_tiny
from tests.evaluate.eval_data import write_small_sets
from wedlm.engine.llm import LLM
from wedlm.evaluate.settings import task_names
from wedlm.model.demo import DEMO_NEXT_TOKEN


def test_each_stage_is_a_run_of_its_own():
    found = stages()
    assert {stage.task for stage in found} <= set(task_names())
    assert len({stage.name for stage in found}) == len(found)
    runs = {(stage.folder, stage.task, stage.limit, stage.dtype, *asdict(stage.params).items()) for stage in found}
    assert len(runs) == len(found)


def test_every_streaming_run_has_its_baseline():
    found = [(stage, {}, []) for stage in stages()]
    pairs = pairs_of(found, "streaming")
    assert [one[0] for _, one in pairs] == [one[0] for one in found if one[0].params.decoding == "streaming"]
    assert all(ar.params.decoding == "autoregressive" and ar.asks == one.asks for (ar, *_), (one, *_) in pairs)
    assert STREAMING.next_token == DEMO_NEXT_TOKEN


def test_a_stage_is_one_process_s_at_a_time(tmp_path):
    (tmp_path / "stages").mkdir()
    stage, other = Stage("a", "table", "gsm8k", AR), Stage("b", "table", "gsm8k", AR)
    with claimed(tmp_path, stage) as first, claimed(tmp_path, stage) as second, claimed(tmp_path, other) as third:
        assert (first, second, third) == (True, False, True)
    with claimed(tmp_path, stage) as again:
        assert again


def test_difference_is_paired():
    stage = Stage("a", "table", "gsm8k", AR)

    def samples(right: str) -> list[dict]:
        text = {"prompt": "p", "target": "t"}
        return [{"doc_id": i, **text, "text": mark, "correct": mark == "1"} for i, mark in enumerate(right)]

    found = difference((stage, {}, samples("1110")), (stage, {}, samples("1001")))
    assert (found["points"], found["only_ar_right"], found["only_streaming_right"]) == (-25.0, 2, 1)
    assert found["same_text"] == 0.25


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench with a tiny model, small sets and two stages."""
    model = save_tiny(tmp_path / "model", max_position_embeddings=256)
    llm = LLM(model, device="cpu", dtype="float32")
    monkeypatch.setattr(Bench, "llm", lambda *_: llm)
    few = replace(AR, max_tokens=4)
    several = [
        Stage("ar", "table", "gsm8k", few, num_fewshot=0, chat=False),
        Stage("fast", "table", "gsm8k", replace(few, decoding="streaming"), num_fewshot=0, chat=False),
    ]
    monkeypatch.setattr("benchmarks.embedded_eval.stages", lambda: several)
    (tmp_path / "out/stages").mkdir(parents=True)
    given = {"model": str(model), "data_dir": write_small_sets(tmp_path / "data"), "output": tmp_path / "out"}
    more = {"limit": None, "only": None, "patience": 1, "dtype": None, "times": False}
    return Bench(Namespace(**given, **more, summary=tmp_path / "summary.json"))


def test_of_a_stage_that_was_cut_the_first_questions_are_scored(bench):
    whole, cut = chosen(bench.arguments)
    for stage in (whole, cut):
        bench.evaluation(stage, scores=False).answer(stage.params)
    evaluation = bench.evaluation(whole, scores=False)
    key = evaluation.key(whole.params)
    (bench.arguments.output / "stages/ar.json").write_text(json.dumps({"stage": "ar", "key": key}))
    path = bench.evaluation(cut, scores=False).partial_path(bench.evaluation(cut, False).key(cut.params), "gsm8k")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"doc_id": 2,' not in line))  # later ones were short

    for _ in range(2):  # the second call finds the first one's runs
        score(bench)
        summary = json.loads(bench.arguments.summary.read_text())
        assert [(one["stage"], one["num_samples"]) for one in summary["points"]] == [("ar", 6), ("fast first 2", 2)]
        assert [(one["stage"], one["questions"]) for one in summary["streaming_against_ar"]] == [("fast first 2", 2)]
        assert not any("seconds" in one["speed"] for one in summary["points"])
        assert path.exists()


def test_verified_is_compared_where_both_answered(bench):
    lines = [{"doc_id": number, "token_ids": [number]} for number in range(3)]
    stage = Stage("a", "table", "gsm8k", AR)
    found = same_texts(bench, (stage, {}, lines), (stage, {}, lines[:2]))
    assert (found["answers"], found["same"], found["tokens"]) == (2, 2, 2)


def test_the_page_has_the_tables_of_the_summary():
    root = Path(__file__).parents[2]
    page = (root / "docs/embedded_checkpoint.md").read_text()
    files = [
        root / "benchmarks/results/embedded" / f"{name}.json"
        for name in ("eval_h200", "eval_h200_rest", "eval_h200_0.26", "eval_cpu_0.26")
    ]
    summary = joined([json.loads(file.read_text()) for file in files])
    assert filled(page, summary) == page
    with pytest.raises(ValueError, match="the mark 'all-sets' 0 times; expected once"):
        filled(page.replace("<!-- all-sets -->", ""), summary)


def test_of_several_summaries_the_last_one_counts():
    def summary(stage: str, value: float) -> dict:
        less = [{"stage": stage, "points": value}]
        return {"points": [{"stage": stage, "value": value}], "streaming_against_ar": less, "verified_against_ar": []}

    both = joined([summary("a", 1), summary("b", 2), summary("a", 3)])
    assert both["points"] == [{"stage": "a", "value": 3}, {"stage": "b", "value": 2}]
    assert both["streaming_against_ar"] == [{"stage": "a", "points": 3}, {"stage": "b", "points": 2}]
