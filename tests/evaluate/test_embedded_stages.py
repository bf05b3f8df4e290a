# SPDX-License-Identifier: Apache-2.0
"""The stages of benchmarks/embedded_eval.py: what there is, and who takes which."""

from dataclasses import asdict

from benchmarks.embedded_eval import AR, STREAMING, Stage, claimed, difference, pairs_of, stages
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
