# SPDX-License-Identifier: Apache-2.0
"""Result folders read back and compared."""

import json
from pathlib import Path
from statistics import pstdev

import pytest
import typer.testing
from scipy.stats import binomtest

from tests.engine.tiny_llm import save_tiny
from tests.evaluate.result_files import samples_of, write_run
from wedlm.cli import app
from wedlm.engine.llm import LLM
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.compare import compare_runs, compare_samples, mcnemar
from wedlm.evaluate.divergence import divergences
from wedlm.evaluate.result_folder import read_run, read_runs, read_samples


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 0), (1, 0), (5, 5), (3, 11), (11, 3), (0, 30), (400, 460), (9, 2000)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def run(tmp_path: Path, name: str, correct: list[bool], **changes):
    return read_run(write_run(tmp_path / name, name * 16, samples_of(correct), **changes))


def test_counts(tmp_path):
    a = run(tmp_path, "a", [True, True, False, False, True])
    b = run(tmp_path, "b", [True, False, True, False, False, True])
    (comparison,) = compare_runs(a, b).values()
    counts = (comparison.both, comparison.only_a, comparison.only_b, comparison.neither)
    assert counts == (1, 2, 1, 1)
    assert comparison.difference == pytest.approx(-1 / 5)
    assert comparison.p_value == 1.0
    assert comparison.half_width == pytest.approx(1.96 * pstdev([-1, -1, 1, 0, 0]) / 5**0.5)
    assert [x.doc_id for x, _ in comparison.differing] == [1, 2, 4]
    assert comparison.same_text == pytest.approx(2 / 5)
    assert (comparison.num_unpaired, comparison.num_other_prompts) == (1, 0)


def test_what_does_not_compare_is_told(tmp_path):
    a = run(tmp_path, "a", [True])
    with pytest.raises(ValueError, match="A has gsm8k and B has mbpp; expected at least one task in common"):
        compare_runs(a, run(tmp_path, "b", [True], task="mbpp"))
    with pytest.raises(ValueError, match=r"version 1 \(exact_match\) in A and version 2"):
        compare_runs(a, run(tmp_path, "c", [True], version=2.0))
    with pytest.raises(ValueError, match="no question in common"):
        compare_samples(read_samples(a.tasks["gsm8k"]), [])


def test_runs_are_read_with_labels(tmp_path):
    write_run(tmp_path, "0" * 16, samples_of([True]), "streaming", entropy_threshold=None, temperature=0.1)
    write_run(tmp_path, "1" * 16, samples_of([True]))
    (tmp_path / "samples-2222-gsm8k.jsonl.partial").write_text("{")
    labels = [run.label for run in read_runs([tmp_path, tmp_path])]
    assert labels == ["autoregressive", "streaming W=16 τ=none λ=0.02 T=0.1"]


POINT_FAULTS = {
    "no JSON": (lambda p: "{", "is not valid JSON"),
    "no object": (lambda p: [], r"is \[\]; expected a JSON object"),
    "format": (lambda p: {**p, "format": 2}, "has format 2; expected 1"),
    "no model": (lambda p: {k: v for k, v in p.items() if k != "model"}, "has no model; expected an object"),
    "no tasks": (lambda p: {**p, "tasks": {}}, "has no tasks; expected at least one"),
    "key": (lambda p: {**p, "key": 3}, "key is 3; expected a string"),
    "value": (lambda p: task_changed(p, value=float("nan")), "tasks.gsm8k: value is nan; expected a number"),
    "stderr": (lambda p: task_changed(p, stderr="x"), "stderr is 'x'; expected a number"),
    "kind": (lambda p: task_changed(p, kind="guess"), "kind is 'guess'; expected generate or likelihood"),
    "speed": (lambda p: task_changed(p, speed={"p_cache": None}), "p_cache is None; expected a number"),
    "path": (lambda p: task_changed(p, samples_file="../x.jsonl"), "expected the name of a file in the same folder"),
    "count": (lambda p: task_changed(p, num_samples=9), "has 2 samples; expected 9"),
    "gone": (lambda p: task_changed(p, samples_file="x.jsonl"), "x.jsonl is missing; expected the samples of gsm8k"),
}


def task_changed(run: dict, **changes) -> dict:
    return {**run, "tasks": {"gsm8k": {**run["tasks"]["gsm8k"], **changes}}}


@pytest.mark.parametrize("fault", POINT_FAULTS)
def test_a_malformed_point_is_told(tmp_path, fault):
    change, message = POINT_FAULTS[fault]
    path = write_run(tmp_path, "0" * 16, samples_of([True, False]))
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        read_samples(read_run(path).tasks["gsm8k"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("3", "line 2 is 3; expected a JSON object"),
        ('{"doc_id": 1}', "line 2 has no text; expected a string"),
        ({"correct": 1}, "correct is 1; expected true or false"),
        ({"doc_id": 0}, "second sample of question 0"),
        ({"doc_id": True}, "doc_id is True; expected an integer"),
        ({"token_steps": [0]}, "has 9 token_ids and 1 token_steps"),
        ({"token_ids": ["x"]}, "token_ids holds something else than integers"),
    ],
)
def test_a_malformed_sample_is_told(tmp_path, line, message):
    path = write_run(tmp_path, "0" * 16, samples_of([True, True]))
    samples = next(tmp_path.glob("samples-*"))
    first, second = samples.read_text().splitlines()
    wanted = line if isinstance(line, str) else json.dumps({**json.loads(second), **line})
    samples.write_text(f"{first}\n{wanted}\n")
    with pytest.raises(ValueError, match=message):
        read_samples(read_run(path).tasks["gsm8k"])


def invoke(*words: object) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_the_command_tells_counts_and_texts(tmp_path):
    write_run(tmp_path / "a", "a" * 16, samples_of([True, True, False]))
    write_run(tmp_path / "b", "b" * 16, samples_of([True, False, False]), "verified")
    result = invoke("compare", tmp_path / "a", tmp_path / "b" / f"point-{'b' * 16}.json")
    assert result.exit_code == 0, result.output
    for text in (
        "B  toy (abababab, float32), verified W=16 H=2.5",
        "gsm8k, 3 questions",
        "only A           1   33.3 %",
        "-33.3 points (95 %: -86.7 to +20.0), p = 1 (McNemar, exact)",
        "same text   66.7 %, 1 differ",
        "A right: The answer is four, of course.",
        "B wrong: The answer is The answer is four",
    ):
        assert text in result.output


def test_wrong_use_of_the_command_is_told(tmp_path):
    write_run(tmp_path, "a" * 16, samples_of([True]))
    write_run(tmp_path, "b" * 16, samples_of([True]), "verified")
    for words, message in (
        ((tmp_path, tmp_path), "has 2 runs; expected one of its files"),
        ((tmp_path / "none", tmp_path), "is not a file; expected a point-*.json"),
        ((tmp_path, tmp_path, "--texts", -1), "--texts is -1; expected 0 or more"),
    ):
        result = invoke("compare", *words)
        assert result.exit_code == 2
        assert message in result.output.replace("\n", "")


def test_divergences_say_where_and_how_undecided_ar_was(tmp_path):
    llm = LLM(save_tiny(tmp_path, chat=False), device="cpu", dtype="float32")
    prompt = llm.tokenizer.encode("some prompt")
    ask = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, decoding="autoregressive")
    output = llm.generate([prompt], ask)[0]
    line = {"doc_id": 5, "prompt": "some prompt", "token_ids": output.token_ids}
    changed = [*output.token_ids[:3], output.token_ids[3] + 1, *output.token_ids[4:]]

    found = divergences(llm, [line, line], [line, {**line, "token_ids": changed}], chat=False)
    shorter = divergences(llm, [line], [{**line, "token_ids": output.token_ids[:2]}], chat=False)

    first, second = (logprob for _, logprob in output.top_logprobs[3])
    assert [(one.doc_id, one.token) for one in found + shorter] == [(5, 3), (5, 2)]
    assert found[0].gap == pytest.approx(first - second, abs=1e-5)
    with pytest.raises(ValueError, match="question 5 is paired with question 6; expected the same questions"):
        divergences(llm, [line], [{**line, "doc_id": 6}], chat=False)
