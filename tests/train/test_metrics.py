# SPDX-License-Identifier: Apache-2.0
"""What a run logs: figures, what a resumed run repeats of them, TensorBoard, and that no secret is told."""

import json
import sys
import types

import pytest
import torch
from accelerate import Accelerator

from tests.train.tiny_run import (
    StopHereError,
    at_step,
    config_of,
    metrics,
    poison,
    save_base,
    stop_here,
    train,
    write_chats,
)
from wedlm.train.batch import AR_GROUP, NUM_DEPTHS, NUM_GROUPS
from wedlm.train.metrics import Meter, Records, read_metrics, rewind, summarise

SECRET = "0123456789abcdef-a-secret-key"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(base checkpoint, data, directory for runs)"""
    directory = tmp_path_factory.mktemp("records")
    return save_base(directory / "base"), write_chats(directory / "data.jsonl", 30), directory


def test_summaries_are_means_over_rows():
    statistics = torch.zeros(NUM_GROUPS, 3)
    statistics[AR_GROUP] = torch.tensor([4.0, 6.0, 1.0])
    statistics[1] = torch.tensor([2.0, 5.0, 2.0])
    statistics[3] = torch.tensor([3.0, 3.0, 0.0])
    statistics[1 + NUM_DEPTHS + 9] = torch.tensor([5.0, 8.0, 2.0])
    figures = summarise(statistics)
    assert (figures["ar_loss"], figures["ar_accuracy"]) == (1.5, 0.25)
    assert (figures["masked_loss"], figures["masked_accuracy"]) == (1.6, 0.4)
    assert figures["loss_by_depth"] == [2.5, None, 1.0] + [None] * (NUM_DEPTHS - 3)
    assert figures["accuracy_by_depth"][:3] == [1.0, None, 0.0]
    assert figures["loss_by_ratio"] == [None] * 9 + [1.6]
    assert summarise(torch.zeros(NUM_GROUPS, 3)) == {}


def test_a_meter_goes_on_where_another_stopped():
    accelerator = Accelerator(mixed_precision="no")
    whole, first, second = (Meter(accelerator) for _ in range(3))
    torch.manual_seed(0)
    for number in range(4):
        loss, statistics = torch.rand(()), torch.rand(NUM_GROUPS, 3)
        for meter in (whole, first if number < 2 else second):
            meter.add(loss, statistics, 10)
        if number == 1:
            second.restore(json.loads(json.dumps(first.state())))
    mine, theirs = second.flush(), whole.flush()
    assert mine.pop("tokens_per_second") > 0
    assert theirs.pop("tokens_per_second") > 0
    assert mine == theirs
    whole.add(torch.tensor(3.0), torch.zeros(NUM_GROUPS, 3), 1)
    assert whole.flush()["loss"] == 3.0  # begun anew


@pytest.mark.long
def test_a_resumed_run_tells_the_same_between_its_checkpoints(parts, monkeypatch):
    """Figures are means over 4 steps, checkpoints come every 3, so that one falls between two records."""
    base, data, directory = parts
    settings = {"max_steps": 8, "logging_steps": 4, "save_steps": 3, "eval_steps": 4, "validation_documents": 4}
    train(base, data, directory / "whole", **settings, tensorboard=True)
    at_step(monkeypatch, 5, stop_here)
    with pytest.raises(StopHereError):
        train(base, data, directory / "broken", **settings)
    monkeypatch.undo()
    with (directory / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # as a kill leaves
    train(base, data, directory / "broken", **settings)
    for kind in ("train", "eval", "eval_suffix"):
        assert metrics(directory / "broken", kind) == metrics(directory / "whole", kind)
        assert [record["step"] for record in metrics(directory / "whole", kind)] == [4, 8]


def test_validation_is_the_same_however_it_is_split(parts):
    """5 documents fill no forward of 2 or 4 rows; training goes on from the same weights, so only the first record."""
    base, data, directory = parts
    found = []
    for batch, noise in ((1, 0.0), (2, 0.5), (4, 1.0)):
        output = directory / f"validation{batch}"
        settings = {"max_steps": 1, "eval_steps": 1, "validation_documents": 5, "learning_rate": 1e-12}
        accumulation = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        train(base, data, output, **settings, **accumulation, suffix_noise=noise)
        found.append(metrics(output, "eval") + metrics(output, "eval_suffix"))
    for records in found:
        assert [record["kind"] for record in records] == ["eval", "eval_suffix"]
        for mine, theirs in zip(records, found[0], strict=True):
            assert mine["masked_loss"] == pytest.approx(theirs["masked_loss"], abs=2e-5)
            assert mine["ar_loss"] == pytest.approx(theirs["ar_loss"], abs=2e-5)
            assert mine["masked_accuracy"] == theirs["masked_accuracy"]
    random, suffix = found[0]
    assert random["masked_loss"] != suffix["masked_loss"]
    # Suffix noise masks whole blocks of random lengths.
    assert [value is None for value in suffix["loss_by_ratio"]] == [True] * 9 + [False]


def test_ar_training_measures_ar_alone(parts):
    base, data, directory = parts
    settings = {"max_steps": 1, "eval_steps": 1, "validation_documents": 5, "objective": "autoregressive"}
    train(base, data, directory / "ar", **settings)
    (record,) = metrics(directory / "ar", "eval")
    assert record.keys() == {"kind", "step", "ar_loss", "ar_accuracy"}
    assert not metrics(directory / "ar", "eval_suffix")


def test_rewind_keeps_what_stays_true(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rewind(tmp_path, 3)  # nothing to do
    assert not path.exists()
    lines = [{"kind": kind, "step": step} for step in (2, 3, 4) for kind in ("train", "eval")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind"')
    rewind(tmp_path, 3)
    assert read_metrics(path) == lines[:4]
    path.write_text('nonsense\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is not valid JSON; expected one record per line"):
        rewind(tmp_path, 3)


def test_no_figure_of_a_bad_step_is_told(parts, monkeypatch):
    base, data, directory = parts
    at_step(monkeypatch, 2, poison)
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        train(base, data, directory / "bad")
    assert [record["step"] for record in metrics(directory / "bad")] == [1, 2]
    assert "NaN" not in (directory / "bad" / "metrics.jsonl").read_text()


def read_scalars(directory) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_tensorboard_shows_every_step_once(parts, monkeypatch):
    base, data, directory = parts
    output = directory / "board"
    at_step(monkeypatch, 5, stop_here)
    with pytest.raises(StopHereError):
        train(base, data, output, save_steps=3, tensorboard=True)
    monkeypatch.undo()
    train(base, data, output, save_steps=3, tensorboard=True)
    scalars = read_scalars(output / "tensorboard")
    expected = [(record["step"], pytest.approx(record["loss"], rel=1e-6)) for record in metrics(output)]
    assert scalars["train/loss"] == expected
    assert "train/loss_by_ratio/9" in scalars


def test_nothing_is_reported_unless_asked(parts):
    base, data, directory = parts
    output = directory / "quiet"
    train(base, data, output, max_steps=1)
    assert not (output / "tensorboard").exists()
    assert "wandb" not in sys.modules


def test_weights_and_biases_gets_figures_and_no_secret(parts, monkeypatch):
    base, data, directory = parts
    told = types.SimpleNamespace(started=None, logged=[], ended=None)

    class Run:
        def log(self, scalars, step):
            told.logged.append((step, scalars))

        def finish(self, exit_code):
            told.ended = exit_code

    def init(**arguments):
        told.started = arguments
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=object()))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    settings = {"use_wandb": True, "wandb_project": "p", "wandb_team": "t", "max_steps": 2}
    output = directory / "reported"
    train(base, data, output, **settings)
    assert (told.started["project"], told.started["entity"], told.started["group"]) == ("p", "t", None)
    assert [step for step, _ in told.logged] == [1, 2]
    assert told.logged[0][1]["train/loss"] == metrics(output)[0]["loss"]
    assert told.ended == 0
    assert SECRET not in str(told)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


def test_a_process_that_is_not_the_first_tells_nothing(parts, tmp_path):
    base, data, _ = parts
    with Records(config_of(base, data, tmp_path, tensorboard=True), tmp_path, 3, active=False) as records:
        records.log("a word")
        records.log_metrics(1, {"loss": 1.0})
        records.update_progress(1)
    assert not list(tmp_path.iterdir())
