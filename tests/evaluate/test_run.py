# SPDX-License-Identifier: Apache-2.0
"""Runs from start to files, with a tiny model: what the files say, resuming, and sharing of prompts."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
from lm_eval.api.instance import Instance

from tests.engine.tiny_llm import save_tiny
from tests.evaluate.eval_data import write_rows, write_small_sets
from tests.evaluate.result_files import samples, without_time
from wedlm.engine.llm import LLM
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.caching_lm import GenerationSettings
from wedlm.evaluate.data import load
from wedlm.evaluate.harness import EngineBackend, EngineLM
from wedlm.evaluate.provenance import model_provenance
from wedlm.evaluate.run import Evaluation, load_tasks
from wedlm.evaluate.settings import Params, Settings
from wedlm.native import is_available

ALL = ("gsm8k", "arc_e", "winogrande", "mmlu", "humaneval")
PARAMS = Params(max_tokens=12, window_size=4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=768)


@pytest.fixture(scope="module")
def llm(directory):
    return LLM(directory, device="cpu", dtype="float32")


@pytest.fixture
def sandbox(monkeypatch):
    """A sandbox that passes every other program; returns the programs it was given."""
    programs = []

    def run_program(source, limits=None):
        assert limits.seconds > 2 * limits.cpu_seconds  # a busy machine is no fault of the program
        programs.append(source)
        return SimpleNamespace(status="passed" if len(programs) % 2 else "failed")

    module = ModuleType("wedlm.evaluate.sandbox")
    module.run_program, module.Limits, module.SandboxUnavailable = run_program, SimpleNamespace, RuntimeError
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return programs


@pytest.fixture
def evaluation(llm, directory, tmp_path):
    def make(*tasks, **changes):
        data = write_small_sets(tmp_path / "data")
        settings = Settings(tasks, data, tmp_path / "out", **{"num_fewshot": 1, **changes})
        return Evaluation(backend(llm, directory), settings, load_tasks(settings))

    return make


def backend(llm, directory):
    return EngineBackend(llm, model_provenance(llm, str(directory), None))


@pytest.mark.skipif(not is_available(), reason="the native library was not built: no C++ compiler")
def test_weights_in_few_bits_are_another_run(llm, directory):
    """Else what is there already of one would stand for the other."""
    eight = LLM(directory, device="cpu", quantization="int8")
    cached = LLM(directory, device="cpu", quantization="int8", kv_cache_dtype="int8")
    found = [model_provenance(one, str(directory), None).dtype for one in (llm, eight, cached)]
    assert found == ["float32", "float32, int8 weights", "float32, int8 weights, int8 cache"]


def test_the_files_of_a_run(evaluation, llm, sandbox):
    run = evaluation(*ALL)
    told = []

    record = run.run(PARAMS, {"window_size": 4}, lambda *news: told.append(news))

    assert record == run.find(PARAMS)
    assert sorted(path.name for path in run.settings.output.iterdir()) == sorted(
        [f"point-{record['key']}.json", *(f"samples-{record['key']}-{name}.jsonl" for name in ALL)]
    )
    assert {name: task["num_samples"] for name, task in record["tasks"].items()} == {
        "gsm8k": 6,
        "arc_e": 5,
        "winogrande": 3,
        "mmlu": 4,
        "humaneval": 2,
    }
    assert ("gsm8k", 6, 6) in told
    assert ("arc_e", 15, 15) in told
    for name, task in record["tasks"].items():
        lines = samples(run, record, name)
        assert [line["doc_id"] for line in lines] == list(range(task["num_samples"]))
        assert task["value"] == pytest.approx(sum(line["correct"] for line in lines) / len(lines))
        assert task["value"] == task["metrics"][task["metric"]]["value"]
        assert task["stderr"] is not None
        assert task["speed"]["seconds"] == pytest.approx(sum(line["seconds"] for line in lines))
    speed = record["tasks"]["gsm8k"]["speed"]
    lines = samples(run, record, "gsm8k")
    assert speed["num_tokens"] == sum(len(line["token_ids"]) for line in lines) > 0
    assert speed["p_cache"] == speed["num_tokens"] / sum(line["rows"] for line in lines)
    for line in lines:
        output = llm.generate(line["prompt"], SamplingParams(max_tokens=12, stop=["\nQuestion:"]))[0]
        assert (line["text"], line["token_ids"]) == (output.text, output.token_ids)
        assert len(line["token_steps"]) == len(line["token_ids"])
        assert max(line["token_steps"]) < line["forwards"]
    assert record["tasks"]["humaneval"]["value"] == 0.5
    assert len(sandbox) == 3  # the first asks whether there is a sandbox at all
    assert all("check(half)" in program for program in sandbox[1:])


def test_prompts_and_choices(evaluation):
    run = evaluation("gsm8k", "arc_e", "winogrande", "mmlu")
    record = run.run(PARAMS, {})

    gsm8k = samples(run, record, "gsm8k")
    assert gsm8k[0]["prompt"] == "Question: 1 + 1?\nAnswer: \n#### 2\n\nQuestion: 0 + 1?\nAnswer:"  # not itself
    assert gsm8k[3]["prompt"] == "Question: 0 + 1?\nAnswer: \n#### 1\n\nQuestion: 3 + 1?\nAnswer:"
    arc = samples(run, record, "arc_e")[1]
    assert arc["choices"] == [" a", " b1", " c c"]
    assert arc["target"] == " b1"
    assert arc["metrics"]["acc"] == (arc["chosen"] == 1)
    winogrande = samples(run, record, "winogrande")[1]
    assert (winogrande["choices"], winogrande["target"]) == (["x0 z.\n\nx1 z.", "x0 z.\n\ny1 z."], "x0 z.\n\ny1 z.")
    mmlu = samples(run, record, "mmlu")
    assert "law mmlu_dev 0" in mmlu[2]["prompt"]
    assert "high" not in mmlu[2]["prompt"]
    assert record["tasks"]["mmlu"]["shots_from"] == "mmlu_dev"


def test_an_example_is_dropped_only_if_it_is_a_question(tmp_path):
    """Not if it merely begins like one, or is asked in another subject, as some of MMLU's do."""
    row = {"subject": "law", "question": "Which is true?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "D"}
    write_rows(tmp_path, "mmlu_test", [row])
    others = [{**row, "B": "5"}, {**row, "subject": "ethics"}]
    write_rows(tmp_path, "mmlu_dev", [row, *others])
    shots = load(data_dir=str(tmp_path), test="mmlu_test", form="lettered", shots=["mmlu_dev"])["test"].shots
    assert [(shot["choices"][1], shot["subject"]) for shot in shots] == [("5", "law"), ("2", "ethics")]


def test_chat_template(evaluation):
    run = evaluation("gsm8k", chat_template=True, num_fewshot=0, limit=2)
    record = run.run(PARAMS, {})

    assert [line["prompt"] for line in samples(run, record, "gsm8k")] == [
        f"<|user|>{i} + 1?<|assistant|>" for i in range(2)
    ]
    assert record["tasks"]["gsm8k"]["num_samples"] == 2


def test_keys_change_with_what_changes_answers(evaluation, tmp_path):
    run = evaluation("gsm8k")
    keys = {run.key(PARAMS), run.key(Params(max_tokens=13, window_size=4)), evaluation("gsm8k", limit=2).key(PARAMS)}
    keys |= {evaluation("gsm8k", num_fewshot=2).key(PARAMS), evaluation("gsm8k", chat_template=True).key(PARAMS)}
    assert len(keys) == 5
    assert evaluation("gsm8k").key(PARAMS) in keys
    write_rows(tmp_path / "data", "gsm8k_train", [{"question": "7?", "answer": "#### 7"}])
    settings = run.settings
    assert Evaluation(run.backend, settings, load_tasks(settings)).key(PARAMS) not in keys


@pytest.mark.parametrize("task", ["gsm8k", "arc_e"])
def test_a_killed_run_goes_on_at_its_first_missing_answer(evaluation, monkeypatch, task):
    class KilledError(Exception):
        pass

    def kill(name, done, total):
        if done == 4:
            raise KilledError

    run = evaluation(task)
    whole = run.run(PARAMS, {})
    expected = [without_time(line) for line in samples(run, whole, task)]
    for path in run.settings.output.iterdir():
        path.unlink()
    if task == "arc_e":  # one forward a context
        monkeypatch.setattr("wedlm.evaluate.harness.LikelihoodScorer", lambda llm: scorer(llm, 1))
    with pytest.raises(KilledError):
        run.run(PARAMS, {}, kill)
    (partial,) = run.settings.output.iterdir()
    assert partial.name == f"samples-{whole['key']}-{task}.jsonl.partial"
    assert partial.read_text().count('"doc_id"') == 4
    with partial.open("a") as file:
        file.write('{"doc_id": 5, "ind')  # half a line
    assert run.find(PARAMS) is None
    assert not run.backend.llm.engine.has_work
    told = []

    resumed = run.run(PARAMS, {}, lambda name, done, total: told.append(done))

    assert told[0] == 4
    assert resumed["tasks"][task]["value"] == whole["tasks"][task]["value"]
    assert [without_time(line) for line in samples(run, resumed, task)] == expected
    assert not partial.exists()


def test_a_long_answer_keeps_no_other_from_the_log(llm):
    """Else a run that is killed loses all that ended after it."""
    lengths = (24, 2, 4)
    requests = [
        Instance("generate_until", {}, ("1 + 1?", {"max_gen_toks": count}), 0, metadata=("", index, 1))
        for index, count in enumerate(lengths)
    ]
    lm = EngineLM(llm, GenerationSettings(SamplingParams(ignore_eos=True)))
    found = [(request.doc_id, len(entry["token_ids"])) for request, entry in lm.answer(requests)]
    assert found == [(1, 2), (2, 4), (0, 24)]


def scorer(llm, max_rows):
    from wedlm.evaluate.likelihood import LikelihoodScorer

    return LikelihoodScorer(llm, max_rows)


def test_too_long_prompts_lose_their_beginning(directory, tmp_path):
    llm = LLM(directory, device="cpu", dtype="float32", max_model_len=60)
    settings = Settings(("gsm8k",), write_small_sets(tmp_path / "data"), tmp_path / "out", num_fewshot=3)
    run = Evaluation(backend(llm, directory), settings, load_tasks(settings))

    lines = samples(run, run.run(PARAMS, {}), "gsm8k")

    assert all(line["truncated"] and line["prompt_tokens"] == 48 for line in lines)
    with pytest.raises(ValueError, match="max_tokens is 60; expected less than the model's length, 60"):
        run.run(Params(max_tokens=60), {})


def test_code_tasks_do_not_start_without_a_sandbox(evaluation, monkeypatch, sandbox):
    def refuse(source, limits=None):
        raise RuntimeError("no namespaces")

    monkeypatch.setattr(sys.modules["wedlm.evaluate.sandbox"], "run_program", refuse)
    with pytest.raises(ValueError, match="generated code cannot be run here: no namespaces"):
        evaluation("gsm8k", "humaneval")


def test_wrong_data_files(evaluation, tmp_path):
    run = evaluation("gsm8k", num_fewshot=6)
    with pytest.raises(ValueError, match="num_fewshot is 6, but there are 5 examples"):
        run.run(PARAMS, {})
    with pytest.raises(ValueError, match=r"has no math500\.jsonl\.gz; expected that file"):
        evaluation("math500")
    (tmp_path / "data" / "math500.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        evaluation("math500")
    write_rows(tmp_path / "data", "math500", [])
    with pytest.raises(ValueError, match="has no rows"):
        evaluation("math500")
    write_rows(tmp_path / "data", "math500", [["a"]])
    with pytest.raises(ValueError, match="not a JSON object"):
        evaluation("math500")


def test_gpqa_reads_the_official_columns(tmp_path):
    names = ["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    rows = [",".join(names), *(f"q{i},right,w1,w2,w3" for i in range(20))]
    (tmp_path / "gpqa_diamond.csv").write_text("\n".join(rows))

    docs = load(data_dir=str(tmp_path), test="gpqa_diamond", form="gpqa")["test"]

    assert all(
        doc["choices"][doc["gold"]] == "right" and sorted(doc["choices"])[1:] == ["w1", "w2", "w3"] for doc in docs
    )
    assert {doc["gold"] for doc in docs} == {0, 1, 2, 3}


def test_answers_of_one_machine_are_scored_on_another(evaluation, llm, directory, monkeypatch, sandbox):
    run = evaluation("gsm8k", "arc_e", "humaneval")
    whole = run.run(PARAMS, {})
    expected = {name: [without_time(line) for line in samples(run, whole, name)] for name in whole["tasks"]}
    for path in run.settings.output.iterdir():
        path.unlink()
    num_programs = len(sandbox)
    monkeypatch.setattr("wedlm.evaluate.provenance.cpu_name", lambda: "another machine")

    replace(run, backend=backend(llm, directory)).answer(PARAMS)

    assert len(sandbox) == num_programs
    assert run.find(PARAMS) is None
    assert all(path.suffix == ".partial" for path in run.settings.output.iterdir())
    monkeypatch.setattr(llm.engine.runner.eager, "model", None)  # no forward is left to run
    record = run.run(PARAMS, {})
    assert record["environment"]["device_name"] == "another machine"
    assert {name: [without_time(line) for line in samples(run, record, name)] for name in record["tasks"]} == expected


def test_answers_without_a_sandbox(evaluation, monkeypatch, tmp_path):
    data = write_small_sets(tmp_path / "data")
    monkeypatch.setattr("wedlm.evaluate.run.check_sandbox", lambda: (_ for _ in ()).throw(ValueError("none here")))
    settings = Settings(("humaneval",), data, tmp_path / "out", num_fewshot=0)

    with pytest.raises(ValueError, match="none here"):
        load_tasks(settings)
    assert load_tasks(settings, scores=False)
