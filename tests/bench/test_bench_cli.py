# SPDX-License-Identifier: Apache-2.0
"""``wedlm bench`` as it is called: every part, the file, the line of JSON, the figures, refusals."""

import json
import math

import pytest

from tests.cli.command import wedlm
from wedlm.bench import vllm
from wedlm.bench.record import Record, read_record
from wedlm.bench.settings import PARTS, PRIORITY

SMALL = [
    *("--batches", "1,2", "--runs", "2", "--pairs", "2", "--steps", "1", "--answer", "5", "--requests", "2"),
    *("--contexts", "20", "--long-prompt", "40", "--device", "cpu", "--dtype", "float32", "--threads", "1"),
]


def run(*words: str) -> dict:
    """The last line of standard output."""
    result = wedlm("bench", *words, *SMALL)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.long
def test_all_parts_on_random_weights(tmp_path):
    summary = run("all", "--shape", "tiny", "--prompt", "10", "--accept", "0.8,0.5", "--output", str(tmp_path))
    record = json.loads((tmp_path / "bench.json").read_text())
    assert set(record["parts"]) == set(PRIORITY) - {"scenarios"} == set(PARTS) - {"scenarios"}
    assert summary["file"] == str(tmp_path / "bench.json")
    assert summary["skipped"] == []
    for part, rows in record["parts"].items():
        assert rows, part
        for row in rows:
            assert row["runs"] == 2
            assert row["spread"]
        assert len(summary["parts"][part]) == len(rows), "a label stands for several rows"
    assert {"cpu", "threads"} <= record["hardware"].keys()
    assert {"python", "torch"} <= record["versions"].keys()
    assert record["settings"]["workload"]["batches"] == [1, 2]
    # Keys and values of 2 layers of 2 heads of 16 float32 numbers.
    assert record["target"]["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert record["memory"]["host_peak_gb"] > 0
    names = {path.name for path in tmp_path.glob("*.svg")}
    assert names == {
        "step_time_against_rows.svg",
        "rows_processed_against_tokens_kept.svg",
        "throughput_against_batch.svg",
    }
    for path in tmp_path.glob("*.svg"):
        path.unlink()
    shown = wedlm("bench", "--show", str(tmp_path))
    assert shown.exit_code == 0, shown.stderr
    assert "accept: auto decoding" in shown.stdout
    assert {path.name for path in tmp_path.glob("*.svg")} == names
    accepted = {(row["accepted"], row["batch"]): row for row in record["parts"]["accept"]}
    assert ("0.8, 0.5", 1) in accepted
    assert all(1 <= row["tokens_per_step"] <= 3.6 for row in accepted.values())
    modes = {row["mode"]: row for row in record["parts"]["latency"]}
    assert modes["autoregressive"]["p_cache"] == modes["autoregressive"]["tokens_per_forward"] == 1
    assert modes["autoregressive"]["vs_ar"] == 1


@pytest.mark.parametrize("given", ["1.5", "inf", None])
@pytest.mark.parametrize("weights", ["random", "checkpoint"])
def test_options_of_prompt_chunks(tmp_path, tiny_checkpoint, weights, given):
    target = ("--shape", "tiny", "--prompt", "10") if weights == "random" else ("--model", str(tiny_checkpoint))
    words = ("--capture-chunks", "--chunk-step-ratio", given) if given else ()
    run("prefill", *target, *words, "--no-plots", "--output", str(tmp_path))
    text = (tmp_path / "bench.json").read_text()
    assert "Infinity" not in text
    engine = json.loads(text)["target"]["engine"]["options"]
    expected = (True, 1.5 if given == "1.5" else "inf")
    assert (engine["capture_chunks"], engine["chunk_step_ratio"]) == expected


@pytest.mark.parametrize("weights", ["random", "checkpoint"])
def test_weights_in_eight_bits(tmp_path, tiny_checkpoint, weights):
    target = ("--shape", "tiny", "--prompt", "10") if weights == "random" else ("--model", str(tiny_checkpoint))
    run("prefill", *target, "--quantization", "int8", "--no-plots", "--output", str(tmp_path))
    assert read_record(tmp_path)["settings"]["engine"] == {"quantization": "int8"}


def test_a_figure_that_is_no_number_costs_no_record(tmp_path):
    record = object.__new__(Record)
    record.values = {"parts": {"steps": [{"step_ms": math.nan}]}}
    record.write(tmp_path)
    assert read_record(tmp_path)["parts"]["steps"] == [{"step_ms": "nan"}]


def test_scenarios_of_a_checkpoint(tiny_checkpoint):
    summary = run("scenarios", "--model", str(tiny_checkpoint), "--modes", "autoregressive,streaming,block")
    assert len(summary["parts"]["scenarios"]) == 4 * 3
    assert summary["file"] is None


def test_a_budget_cuts_and_says_so():
    summary = run("latency", "steps", "--shape", "tiny", "--prompt", "10", "--budget-s", "0.001")
    assert summary["parts"] == {"latency": {}, "steps": {}}
    assert any(text.startswith("latency: auto") for text in summary["skipped"])


def fails(*words: str) -> str:
    result = wedlm("bench", *words, "--device", "cpu")
    assert result.exit_code == 2, result.stdout
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("speed",), "the part is 'speed'; expected all or some of latency,"),
        (("scenarios", "--shape", "tiny"), "expected --model"),
        (("--shape", "huge"), "--shape is 'huge'; expected one of qwen3-8b,"),
        (("--shape", "tiny", "--model", "demo"), "expected one target"),
        (("--modes", "ar"), "--modes contains 'ar'; expected some of auto,"),
        (("--batches", "1,x"), "--batches is '1,x'; expected numbers from 1"),
        (("--batches", "1.5"), "--batches has 1.5; expected integers of at least 1"),
        (("--runs", "0"), "--runs has 0; expected integers of at least 1"),
        (("--accept", "1.2"), "--accept is '1.2'; expected numbers from 0 to 1"),
        (("--rate", "0"), "--rate is 0; expected a number above 0"),
        (("--chunk-step-ratio", "1"), "chunk_step_ratio is 1.0; expected a number > 1, or inf"),
        (("--shape", "tiny", "--chunk-step-ratio", "nan"), "chunk_step_ratio is nan; expected a number > 1, or inf"),
        (("--quantization", "int4"), "quantization is 'int4'; expected one of auto, none, int8, fp8"),
        (("--against", "sglang"), "--against is 'sglang'; expected vllm or llamacpp"),
        (
            ("--against", "llamacpp", "latency"),
            "the part is 'latency'; expected, with llama.cpp, all or some of step,",
        ),
        (("--against", "llamacpp", "--model", "x"), "--model is x, and --gguf is missing"),
        (("--against", "llamacpp", "--llama-server", "/nowhere"), "--llama-server is /nowhere; expected the path"),
        (("--gguf", "x.gguf"), "--gguf is given without --against llamacpp"),
        (("--evaluation", "x"), "--evaluation is given without --output"),
        (("--show", "nowhere"), "nowhere/bench.json cannot be read"),
    ],
)
def test_refusals(words, message):
    assert message in fails(*words)


def test_vllm_that_is_not_there(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda _: None)
    assert "--against is vllm, which is not installed here; expected" in fails("--shape", "tiny", "--against", "vllm")
