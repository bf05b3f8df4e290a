# SPDX-License-Identifier: Apache-2.0
"""Batch work: every prompt once and in order, whatever ends; with a stub of Ray, and with Ray itself."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.deploy.stub_ray import install
from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, SamplingParams
from wedlm.cluster import Share
from wedlm.deploy.batch import Batch, BatchJob, BatchWorker
from wedlm.engine.outputs import GenerationOutput

ONE_CPU = Share(num_gpus=0, num_cpus=1)
PARAMS = SamplingParams(max_tokens=4)
JOB = BatchJob("stub", {}, PARAMS, False)


def job_of(directory):
    return BatchJob(str(directory), {"dtype": "float32"}, PARAMS, False)


def lines_of(path):
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def echoing(monkeypatch):
    """Workers without a model."""

    def outputs(worker, prompts):
        return [GenerationOutput(prompt.upper(), [1], None, "stop") for prompt in prompts]

    monkeypatch.setattr(BatchWorker, "_outputs", outputs)


@pytest.mark.parametrize("seed", range(20))
def test_histories_of_ends(tmp_path, monkeypatch, echoing, seed):
    """Workers end, this process stops anywhere, lines are torn: the file is the same as if nothing had happened."""
    rng = random.Random(seed)
    prompts = [f"prompt {i}" for i in range(rng.randint(1, 200))]
    path, size = tmp_path / "answers.jsonl", rng.randint(1, 20)
    for _ in range(1000):
        ray = install(monkeypatch, lambda _: rng.random() < 0.15, seed)
        batch = Batch(JOB, prompts, path, ONE_CPU, rng.randint(1, 4), size)
        stop_at = rng.randint(1, len(prompts))
        batch.run(lambda batch=batch, stop_at=stop_at: batch.num_done >= stop_at)
        assert not any(actor.alive for actor in ray.started), "a worker was left behind"
        if batch.num_done == len(prompts):
            break
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - rng.randint(0, min(30, len(data)))])  # a machine may lose the last of it
    lines = lines_of(path)
    assert [line["prompt"] for line in lines] == prompts
    given_up = [line for line in lines if line["finish_reason"] == "error"]
    assert all("the worker ended at this prompt, 3 times" in line["error"] for line in given_up)
    assert [line["text"] for line in lines if line not in given_up] == [
        line["prompt"].upper() for line in lines if line not in given_up
    ]


def test_a_prompt_that_ends_workers_is_given_up_alone(tmp_path, monkeypatch, echoing):
    install(monkeypatch, lambda prompts: "poison" in prompts)
    prompts = [*(f"a{i}" for i in range(10)), "poison", *(f"b{i}" for i in range(10))]
    batch = Batch(JOB, prompts, tmp_path / "out", ONE_CPU, 2, 8)
    batch.run()
    lines = lines_of(tmp_path / "out")
    assert [line["prompt"] for line in lines] == prompts
    assert [line["prompt"] for line in lines if line["finish_reason"] == "error"] == ["poison"]
    assert batch.num_refused == 1


def test_workers_that_never_answer_end_the_job(tmp_path, monkeypatch, echoing):
    install(monkeypatch, lambda prompts: bool(prompts))
    with pytest.raises(ChildProcessError, match="workers ended 9 times in a row and answered nothing: the process was"):
        Batch(JOB, [f"{i}" for i in range(100)], tmp_path / "out", ONE_CPU, 2, 8).run()


def test_nothing_runs_far_ahead(tmp_path, monkeypatch, echoing):
    """What waits for its turn to be written is bounded, and lost if this process ends."""
    asked = []
    install(monkeypatch, lambda prompts: bool(prompts) and asked.append((batch.num_done, int(prompts[0]))) is not None)
    batch = Batch(JOB, [f"{i}" for i in range(2000)], tmp_path / "out", ONE_CPU, 2, 10)
    batch.run()
    assert max(start - done for done, start in asked) < 4 * 2 * 10


def test_another_job_is_refused(tmp_path, monkeypatch, echoing):
    install(monkeypatch)
    path = tmp_path / "out"
    Batch(JOB, ["a", "b"], path, ONE_CPU, 1).run()
    before = path.read_bytes()
    Batch(JOB, ["a", "b"], path, ONE_CPU, 1).run()
    other = BatchJob("stub", {}, SamplingParams(max_tokens=5), False)
    with pytest.raises(ValueError, match=r"max_tokens is 5 and .*out was begun with 4; expected the same, or another"):
        Batch(other, ["a", "b"], path, ONE_CPU, 1).run()
    with pytest.raises(ValueError, match=r"prompts is '3, sha256 .*' and .*out was begun with '2, sha256"):
        Batch(JOB, ["a", "b", "c"], path, ONE_CPU, 1).run()
    assert path.read_bytes() == before
    (tmp_path / "notes").write_text("mine\n")
    with pytest.raises(ValueError, match=r"--output is .*notes, which has content of something else"):
        Batch(JOB, ["a"], tmp_path / "notes", ONE_CPU, 1).run()
    assert (tmp_path / "notes").read_text() == "mine\n"


def test_two_processes_do_not_share_a_file(tmp_path, monkeypatch, echoing):
    install(monkeypatch)
    path = tmp_path / "out"

    def again(done):
        with pytest.raises(ValueError, match="which another process writes to; expected another file"):
            Batch(JOB, ["a"], path, ONE_CPU, 1).run()

    Batch(JOB, ["a"], path, ONE_CPU, 1).run(wrote=again)


def test_answers_are_those_of_one_engine(tmp_path, monkeypatch):
    """Refused prompts say why in their place."""
    install(monkeypatch)
    directory = save_tiny(tmp_path / "tiny")
    prompts = [f"Hello {i}" for i in range(10)]
    prompts[3] = "too long " * 40
    Batch(job_of(directory), prompts, tmp_path / "out", ONE_CPU, 1, 4).run()
    lines = lines_of(tmp_path / "out")
    known = [prompt for prompt in prompts if prompt != prompts[3]]
    wanted = [output.text for output in LLM(directory, dtype="float32", device="cpu").generate(known, PARAMS)]
    assert [line["text"] for line in lines if line["prompt"] != prompts[3]] == wanted
    assert lines[3]["finish_reason"] == "error"
    assert "the prompt has 360 tokens" in lines[3]["error"]
    Batch(job_of(directory), [prompts[3]] * 2, tmp_path / "other", ONE_CPU, 1, 4).run()
    assert [line["finish_reason"] for line in lines_of(tmp_path / "other")] == ["error"] * 2


@pytest.fixture
def ray():
    """Two processors of Ray's, with little memory."""
    ray = pytest.importorskip("ray")
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init(num_cpus=2, address="local", object_store_memory=2 * 10**8, **quiet)
    yield ray
    ray.shutdown()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ten_thousand_prompts_with_a_worker_killed_every_thousand(tmp_path, ray, record_property):
    directory, path = save_tiny(tmp_path / "tiny"), tmp_path / "out"
    prompts = [f"Prompt {i}" for i in range(10_000)]
    batch = Batch(job_of(directory), prompts, path, ONE_CPU, 2, 50)
    killed = []

    def kill(done):
        if done // 1000 > len(killed):
            os.kill(next(iter(batch.loaded.values())), signal.SIGKILL)
            killed.append(done)

    start = time.monotonic()
    batch.run(wrote=kill)
    seconds = time.monotonic() - start
    lines = lines_of(path)
    assert [line["prompt"] for line in lines] == prompts
    wanted = [output.text for output in LLM(directory, dtype="float32", device="cpu").generate(prompts, PARAMS)]
    assert [line["text"] for line in lines] == wanted
    assert len(killed) == 10
    record_property("answers", len(lines))
    record_property("of them twice", len(lines) - len({line["prompt"] for line in lines}))
    record_property("texts of one engine", sum(a["text"] == b for a, b in zip(lines, wanted, strict=True)))
    record_property("workers killed", len(killed))
    record_property("replaced", batch.num_replaced)
    record_property("seconds", round(seconds))


@pytest.mark.long
def test_the_command_goes_on_after_it_was_killed(tmp_path, record_property):
    pytest.importorskip("ray")
    directory, path = save_tiny(tmp_path / "tiny"), tmp_path / "answers.jsonl"
    prompts = [f"Prompt {i}" for i in range(3000)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    words = ["generate", "--model", str(directory), "--raw", "--max-tokens", "4", "--device", "cpu", "--workers", "ray"]
    words += ["--file", str(tmp_path / "prompts.txt"), "--output", str(path), "--num-workers", "2"]
    main = [sys.executable, "-c", "from wedlm.cli import main; main()", *words]
    kills = []
    for _ in range(2):
        with subprocess.Popen(
            main, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        ) as process:
            size = path.stat().st_size if path.exists() else 0
            while process.poll() is None and (not path.exists() or path.stat().st_size <= size):
                time.sleep(0.05)
            assert process.poll() is None, process.stdout.read()
            process.kill()
            kills.append(path.read_text().count("\n"))
    done = subprocess.run(main, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "3000 of 3000 prompts are answered" in done.stderr
    lines = lines_of(path)
    assert [line["prompt"] for line in lines] == prompts
    assert 0 < kills[0] <= kills[1] < 3000
    record_property("command killed after", " and ".join(map(str, kills)))
    record_property("answers", len(lines))
    record_property("of them twice", len(lines) - len({line["prompt"] for line in lines}))
