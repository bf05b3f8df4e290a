# SPDX-License-Identifier: Apache-2.0
"""``wedlm accelerate`` from its arguments to its report, whole, and killed and gone on with in every stage."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.accelerate.tiny_base import accelerate, killed_at, make_base, words
from tests.cli.command import wedlm
from tests.train.tiny_run import write_chats
from wedlm import LLM, SamplingParams
from wedlm.accelerate import measure
from wedlm.accelerate import run as run_module
from wedlm.accelerate.measure import same_texts
from wedlm.model.formats.checkpoint import read_config
from wedlm.train.trainer import Trainer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(checkpoint, prompts, the output of a whole run, what it printed)"""
    directory = tmp_path_factory.mktemp("accelerate")
    base, prompts = make_base(directory)
    with pytest.MonkeyPatch.context() as patch:  # how fast so small a model is says nothing
        patch.setattr(measure, "_SPEED_PROMPTS", 2)
        patch.setattr(measure, "_SPEED_ROUNDS", 1)
        done = accelerate(base, directory / "whole", "--prompts", prompts)
    assert done.exit_code == 0, done.stderr
    return base, prompts, directory / "whole", done


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_whole_run(parts):
    base, prompts, output, done = parts
    assert done.stdout.splitlines()[-1] == str(output / "report.html")
    for number in range(1, 6):
        assert f"stage {number} of 5" in done.stderr
    held_out, training = lines(output / "prompts/held_out.jsonl"), lines(output / "prompts/training.jsonl")
    assert (len(held_out), len(training)) == (6, 44)
    asked = {one["messages"][0]["content"] for one in (*held_out, *training)}
    assert asked == set(prompts.read_text().splitlines())
    # The training data are AR's own answers.
    llm = LLM(base, device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=32, decoding="autoregressive")
    texts = [output.text for output in llm.chat([one["messages"] for one in training], params)]
    taught = {
        line["messages"][0]["content"]: line["messages"][1]["content"]
        for line in lines(output / "answers/training.jsonl")
    }
    assert len(taught) > 30
    assert all(
        taught.get(one["messages"][0]["content"], text) == text for one, text in zip(training, texts, strict=True)
    )


def test_the_adapter_drafts_and_leaves_the_text(parts):
    base, _, output, _ = parts
    measured = json.loads((output / "measurement/parts.json").read_text())
    for part in ("before", "after_ar", "after"):
        assert same_texts(measured, part) == 6
    before, after = (measured[when]["tokens_per_forward"] for when in ("before", "after"))
    assert after > before + 0.1
    # As anyone would load it, on other prompts.
    chats = [[{"role": "user", "content": question}] for question in ("box a a x", "mat", "cat on mat", "two")]
    mask = read_config(output / "adapter").mask_token_id
    plain, adapted = (
        LLM(base, device="cpu", mask_token_id=mask),
        LLM(base, device="cpu", adapter=str(output / "adapter")),
    )
    params = SamplingParams(temperature=0.0, max_tokens=32, decoding="verified")
    assert [o.token_ids for o in plain.chat(chats, params)] == [o.token_ids for o in adapted.chat(chats, params)]


def test_the_report_says_what_was_measured(parts):
    base, prompts, output, done = parts
    measured = json.loads((output / "measurement/parts.json").read_text())
    markdown, page = (output / "report.md").read_text(), (output / "report.html").read_text()
    for text in (markdown, page):
        assert f"{measured['after']['tokens_per_forward']:.2f} tokens a forward" in text
        assert "6 of 6" in text
        assert str(prompts) in text
        assert f"{measured['speed']['tok_per_s']['auto']:.3g}" in text
        assert f"wedlm serve --model {base} --adapter {output / 'adapter'}" in text
    assert page.count("data:image/svg+xml") == 2
    assert "<script" not in page
    assert all((output / "figures" / name).is_file() for name in ("acceptance.svg", "training.svg"))
    assert "6 of 6 texts equal to the base's" in " ".join(done.stderr.split())


def test_a_second_start_does_nothing_again(parts, monkeypatch):
    base, prompts, output, _ = parts
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl")}
    for name in ("LLM", "train"):
        monkeypatch.setattr(run_module, name, None)  # whoever calls it fails
    again = accelerate(base, output, "--prompts", prompts)
    assert again.exit_code == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl")} == before


# Where each stage is cut: the function at whose so-manieth call the process is killed.
CUTS = {
    "prompts": ("wedlm.accelerate.prompts:encode_prompt", 30),
    "answers": ("wedlm.train.answers:GenerationOutput.of", 20),
    "training": ("wedlm.train.trainer:Trainer._step", 7),
    "measurement": ("wedlm.accelerate.measure:drafted", 2),
    "report": ("wedlm.accelerate.report:_markdown", 1),
}


@pytest.mark.long
def test_killed_in_each_stage_it_goes_on(parts, tmp_path, monkeypatch):
    base, prompts, whole, _ = parts
    output = tmp_path / "cut"
    arguments = words(base, output, "--prompts", prompts)
    for stage, (place, count) in CUTS.items():
        done = subprocess.run(killed_at(place, count, *arguments), capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, (stage, done.stderr)
    answered = len((output / "answers/answers.jsonl").read_text().splitlines())
    assert answered == 44
    steps = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, number, *rest: steps.append(number) or step(self, number, *rest))
    last = accelerate(base, output, "--prompts", prompts)
    assert last.exit_code == 0, last.stderr
    assert not steps, "training ran again"
    for name in ("prompts/training.jsonl", "prompts/held_out.jsonl", "answers/training.jsonl"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (load_file(one / "adapter/adapter_model.safetensors") for one in (output, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    measured, expected = (json.loads((one / "measurement/parts.json").read_text()) for one in (output, whole))
    for part in ("base_ar", "after_ar", "after"):
        assert measured[part]["token_ids"] == expected[part]["token_ids"]
    assert measured["after"]["shares"] == expected["after"]["shares"]
    assert (output / "report.md").is_file()


@pytest.mark.long
def test_two_processes_train_the_same(parts, tmp_path):
    """Through accelerate's launcher; the same sequences make up each step, so weights agree up to rounding."""
    base, prompts, whole, _ = parts
    done = accelerate(base, tmp_path / "out", "--prompts", prompts, "--processes", "2")
    assert done.exit_code == 0, done.stderr
    ours, theirs = (load_file(one / "adapter/adapter_model.safetensors") for one in (tmp_path / "out", whole))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-3, msg=name)


def test_ctrl_c_keeps_answers(parts, tmp_path, monkeypatch):
    base, prompts, _, _ = parts
    answer_prompts = run_module.answer_prompts

    def stops(llm, asked, params, log, told):
        def progress(done, *rest):
            told(done, *rest)
            if done == 9:
                raise KeyboardInterrupt

        answer_prompts(llm, asked, params, log, progress)

    monkeypatch.setattr(run_module, "answer_prompts", stops)
    cut = accelerate(base, tmp_path / "out", "--prompts", prompts)
    assert cut.exit_code == 130
    assert "the same command continues from here" in cut.stderr
    assert len(lines(tmp_path / "out/answers/answers.jsonl")) == 9


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--max-tokens", "30"], '--max-tokens is 30 and was 32 when the stage "answers"'),
        (["--rank", "4"], '--rank is 4 and was 8 when the stage "training"'),
        (["--set", "save_steps=4", "--set", "weight_decay=0.1"], "--set is"),
        (["--rows", "32"], '--rows is 32 and was 16 when the stage "measurement"'),
        (["--held-out", "7"], '--held-out is 7 and was 6 when the stage "prompts"'),
        (["--dtype", "bfloat16"], "--dtype is bfloat16"),
    ],
)
def test_a_changed_option_is_named(parts, changed, told):
    base, prompts, output, _ = parts
    again = accelerate(base, output, "--prompts", prompts, *changed)
    assert again.exit_code == 2
    (sentence,) = [line for line in again.stderr.splitlines() if line.startswith("error: ")]
    assert told in sentence
    assert sentence.endswith("expected the same, or another --output")


def test_changed_prompts_are_named(parts, tmp_path):
    base, prompts, output, _ = parts
    other = tmp_path / "other.txt"
    other.write_text(prompts.read_text() + "one more\n")
    assert "--prompts is" in accelerate(base, output, "--prompts", other).stderr
    text = prompts.read_text()
    try:
        prompts.write_text(text + "one more\n")
        assert "a file of prompts is not what it was when" in accelerate(base, output, "--prompts", prompts).stderr
    finally:
        prompts.write_text(text)


@pytest.mark.long
def test_conversations_and_texts(parts, tmp_path):
    """--data: the questions of conversations, the beginnings of texts; only the stages up to the answers."""
    base, _, _, _ = parts
    data = write_chats(tmp_path / "chats.jsonl", 12)
    with data.open("a") as file:
        file.writelines(json.dumps({"text": f"one two three {word} sat on mat"}) + "\n" for word in ("cat", "mat"))
    done = accelerate(base, tmp_path / "out", "--data", data, "--steps", "1")
    assert done.exit_code == 0, done.stderr
    asked = [*lines(tmp_path / "out/prompts/training.jsonl"), *lines(tmp_path / "out/prompts/held_out.jsonl")]
    assert sum("text" in one for one in asked) == 2
    assert all([message["role"] for message in one["messages"]] == ["user"] for one in asked if "messages" in one)
    for line in lines(tmp_path / "out/answers/training.jsonl"):
        assert "text" in line or line["messages"][-1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--prompts", "none.txt"], "none.txt cannot be read"),
        (["--prompts", "a", "--data", "b"], "--prompts and --data are both given"),
        (["--steps", "3", "--epochs", "1"], "--epochs and --steps are both given"),
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--epochs", "0"], "--epochs is 0.0; expected a number above 0"),
        (["--rows", "2"], "--rows is 2; expected at least 4"),
        (["--rank", "0"], "lora_rank above 0"),
        (["--set", "lora_rows=all"], "--set lora_rows is given, which this command decides"),
        (["--set", "lerning_rate=1"], "lerning_rate is not a setting; expected learning_rate"),
        (["--mask-token-id", "5"], "mask_token_id is 5, which is the token"),
        (["--num-prompts", "100000", "--max-tokens", "24"], "expected at most"),
        (["--max-tokens", "256"], "--max-tokens is 256; expected less than the model's length, 256"),
        (["--device", "nonsense"], "device is 'nonsense'"),
    ],
)
def test_bad_input_is_one_sentence(parts, tmp_path, more, told):
    base, *_ = parts
    arguments = ["accelerate", str(base), "--output", str(tmp_path / "out"), *more]
    done = wedlm(*arguments)
    assert done.exit_code == 2, done.stdout
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told in sentence


def test_places_and_models_that_cannot_be_used(parts, tmp_path):
    base, *_ = parts

    def told(*arguments: str | Path) -> str:
        done = wedlm("accelerate", "--max-tokens", "24", *map(str, arguments))
        assert done.exit_code == 2
        return done.stderr

    (tmp_path / "file").write_text("x")
    assert "which is a file; expected a directory" in told(base, "--output", tmp_path / "file")
    assert "is not empty and holds no run" in told(base, "--output", tmp_path)
    assert "does not exist" in told(tmp_path / "nowhere", "--output", tmp_path / "out")
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    assert "there are 2 different prompts" in told(base, "--output", tmp_path / "out", "--prompts", few)
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty.txt is empty" in told(base, "--output", tmp_path / "out2", "--prompts", tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"question": "x"}\n')
    assert "bad.jsonl line 1 has no prompt" in told(
        base, "--output", tmp_path / "out3", "--prompts", tmp_path / "bad.jsonl"
    )
