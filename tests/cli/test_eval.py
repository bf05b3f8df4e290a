# SPDX-License-Identifier: Apache-2.0
"""``wedlm eval``: a sweep with a table, JSON, finished runs, and errors in a sentence."""

import json

import pytest

from tests.cli.command import FAST, wedlm
from tests.engine.tiny_llm import save_tiny
from tests.evaluate.eval_data import write_small_sets
from wedlm.extras import install_extras


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command on small sets; results go to a folder of the module."""
    base = tmp_path_factory.mktemp("eval")
    model = save_tiny(base / "model", max_position_embeddings=512)
    data = write_small_sets(base / "data")
    return ["eval", "--model", str(model), "--data-dir", str(data), "--output", str(base / "out"), *FAST]


def test_a_sweep_shows_a_table_and_is_not_run_twice(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    call = [*words, "--tasks", "gsm8k,arc_e", "--num-fewshot", "1", "--limit", "2", "--max-tokens", "8"]
    call += ["--sweep", "decoding=verified,streaming", "--sweep", "entropy_threshold=0.2,none"]

    first = wedlm(*call)

    assert first.exit_code == 0, first.stderr
    assert first.stdout.count("gsm8k") == 4
    assert first.stdout.count("arc_e") == 4
    assert "strea" in first.stdout  # a narrow terminal cuts
    assert "tok/s" in first.stdout
    again = wedlm(*call, "--json")
    assert again.exit_code == 0, again.stderr
    assert again.stderr.count("already") == 4
    records = [json.loads(line) for line in again.stdout.splitlines()]
    assert [record["swept"] for record in records] == [
        {"decoding": mode, "entropy_threshold": threshold}
        for mode in ("verified", "streaming")
        for threshold in (0.2, None)
    ]
    assert all(record["params"]["max_tokens"] == 8 and record["limit"] == 2 for record in records)


def test_the_protocol_gives_way_to_options(words):
    call = [*words, "--tasks", "gsm8k", "--limit", "1", "--num-fewshot", "0", "--protocol", "paper", "--json"]
    result = wedlm(*call, "--max-tokens", "4", "--entropy-threshold", "0.3")

    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["protocol"] == "paper"
    assert record["params"]["window_size"] == 6
    assert (record["params"]["max_tokens"], record["params"]["entropy_threshold"]) == (4, 0.3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "chess"], "the task 'chess' is unknown; expected some of arc_c"),
        ([], "no task is given; expected some of arc_c"),
        (["--tasks", "math500"], "has no math500.jsonl.gz; expected that file there"),
        (["--tasks", "gsm8k", "--sweep", "speed=1"], "--sweep is 'speed=1'; expected key=value,value with a key of"),
        (["--tasks", "gsm8k", "--protocol", "mine"], "protocol is 'mine'; expected one of default, paper"),
        (["--tasks", "gsm8k", "--decoding", "fast"], "decoding is 'fast'; expected one of"),
        (["--tasks", "gsm8k", "--entropy-threshold", "low"], "expected a number or none"),
    ],
)
def test_errors(words, more, message):
    result = wedlm(*words, *more)

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_answers_first_and_scores_later(words):
    call = [*words, "--tasks", "gsm8k", "--limit", "2", "--num-fewshot", "0", "--max-tokens", "5"]

    first = wedlm(*call, "--answers-only")

    assert first.exit_code == 0, first.stderr
    assert "the answers of run 1 of 1 are in" in " ".join(first.stderr.split())
    assert first.stdout == ""
    second = wedlm(*call, "--json")
    assert second.exit_code == 0, second.stderr
    assert json.loads(second.stdout)["tasks"]["gsm8k"]["num_samples"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers is 0; expected at least 1"),
        (
            ["--workers", "2"],
            "--workers needs ray, which is not installed; expected " + install_extras("eval", "workers"),
        ),
        (["--engine", "tgi"], "--engine is tgi; expected wedlm or vllm"),
    ],
)
def test_engines_and_workers_that_cannot_be(words, monkeypatch, options, message):
    monkeypatch.setattr("wedlm.cli.eval.find_spec", lambda name: None)

    result = wedlm(*words, "--tasks", "gsm8k", *options)

    assert result.exit_code != 0
    assert message in " ".join(result.stderr.split())


@pytest.mark.long
def test_the_papers_tables(words, tmp_path):
    """A WeDLM checkpoint decodes by streaming, one of SDAR by blocks, another by AR; a second call runs nothing
    again."""
    ar = save_tiny(tmp_path / "ar", model_type="qwen3", mask_token_id=None, max_position_embeddings=512)
    sdar = save_tiny(tmp_path / "sdar", model_type="sdar", block_size=4, decoding=None, max_position_embeddings=512)
    given = dict(zip(words[1::2], words[2::2], strict=False))
    call = ["eval", "reproduce", "--paper-tables", *words[3:], "--output", str(tmp_path / "out"), "--limit", "2"]
    call += ["--tasks", "gsm8k,arc_e", "--num-fewshot", "0", "--max-tokens", "6"]
    call += ["--models", f"{given['--model']}=instruct,{ar},{sdar}=instruct"]
    result = wedlm(*call)

    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "paper_tables.md").read_text()
    assert text in result.stdout
    base, instruct = text.split("## Table 2")
    assert "**model, here (streaming)**" in instruct
    assert "**ar, here (autoregressive)**" in base
    assert "**sdar, here (block)**" in instruct
    assert base.count("(2) |") == 2
    assert instruct.count("(2) |") == 4
    again = wedlm(*call)
    assert again.stderr.count("already") == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["reproduce"], "the arguments begin with reproduce; expected reproduce --paper-tables, or options alone"),
        (["chess"], "the arguments begin with chess; expected reproduce --paper-tables"),
        (["--models", "a"], "--models is a; expected no such option with wedlm eval without reproduce"),
        (["reproduce", "--paper-tables", "--tasks", "piqa"], "the task 'piqa' is not in the paper's tables; expected"),
        (["reproduce", "--paper-tables", "--models", "x=chat"], "--models has 'x=chat'; expected NAME"),
        (["reproduce", "--paper-tables", "--model", "x"], "--model is x; expected no such option with reproduce"),
        (["reproduce", "--paper-tables", "--sweep", "seed=1,2"], "expected no such option with reproduce"),
    ],
)
def test_what_cannot_be_reproduced(words, more, message):
    result = wedlm("eval", *more, *words[3:])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
