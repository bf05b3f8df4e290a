# SPDX-License-Identifier: Apache-2.0
"""Runs that are interrupted, split over processes, poisoned or out of disk: what is kept, and what stays equal."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests.train.processes import RUN, config_file, run_processes
from tests.train.tiny_run import (
    StopHereError,
    at_step,
    config_of,
    metrics,
    poison,
    save_base,
    stop_here,
    train,
    weights,
    write_chats,
)
from wedlm.model.formats import checkpoint as model_checkpoint
from wedlm.train import checkpoint as checkpoint_module
from wedlm.train.checkpoint import latest_checkpoint
from wedlm.train.trainer import Trainer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(base checkpoint, data, directory for runs)"""
    directory = tmp_path_factory.mktemp("trainer")
    return save_base(directory / "base"), write_chats(directory / "data.jsonl", 30), directory


@pytest.fixture(scope="module")
def unbroken(parts):
    base, data, directory = parts
    train(base, data, directory / "unbroken")
    return directory / "unbroken"


def same_weights(a: Path, b: Path, tolerance: float = 0.0) -> None:
    first, second = weights(a / "final"), weights(b / "final")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=0, atol=tolerance), name


def test_a_resumed_run_equals_an_unbroken_one(parts, unbroken, monkeypatch):
    base, data, directory = parts
    config = config_of(base, data, directory / "resumed", save_steps=2)
    at_step(monkeypatch, 5, stop_here)
    with pytest.raises(StopHereError):
        Trainer(config).run()
    assert latest_checkpoint(directory / "resumed").name == "checkpoint-000004"
    assert len(metrics(directory / "resumed")) == 5  # the fifth step was told and will be told again
    monkeypatch.undo()
    Trainer(config).run()
    same_weights(directory / "resumed", unbroken)
    assert metrics(directory / "resumed") == metrics(unbroken)


def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(parts, unbroken, monkeypatch, capsys):
    base, data, directory = parts
    config = config_of(base, data, directory / "interrupted", save_steps=100)
    at_step(monkeypatch, 2, lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).run()
    assert "stopping after this step, with a checkpoint" in capsys.readouterr().err
    assert latest_checkpoint(directory / "interrupted").name == "checkpoint-000003"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    Trainer(config).run()
    same_weights(directory / "interrupted", unbroken)
    assert metrics(directory / "interrupted") == metrics(unbroken)


@pytest.mark.long
def test_a_killed_run_goes_on(parts, unbroken):
    base, data, directory = parts
    config = config_of(base, data, directory / "killed", save_steps=1, save_total_limit=2)
    command = [sys.executable, "-c", RUN, str(config_file(config))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((directory / "killed").glob("checkpoint-000002*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (directory / "killed" / ".checkpoint-000099.1").mkdir()  # as a kill in the middle of writing leaves
    found = latest_checkpoint(directory / "killed")
    assert found is not None
    assert 1 <= int(found.name[-6:]) <= 6
    Trainer(config).run()
    same_weights(directory / "killed", unbroken)
    kept = sorted(path.name for path in (directory / "killed").glob("*checkpoint-*"))
    assert kept == ["checkpoint-000005", "checkpoint-000006"]


def test_a_finished_run_is_not_trained_again(parts, unbroken, monkeypatch):
    base, data, _ = parts
    before = weights(unbroken / "final")
    monkeypatch.setattr("wedlm.train.trainer.collate_sequences", lambda *_: 1 / 0)  # no step is made
    train(base, data, unbroken)
    after = weights(unbroken / "final")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_run_is_no_continuation(parts, unbroken):
    base, data, _ = parts
    with pytest.raises(ValueError, match=r"made with seed 42, this run has 7; expected the same"):
        train(base, data, unbroken, seed=7)
    with pytest.raises(ValueError, match="expected an empty directory, or resume true"):
        train(base, data, unbroken, resume=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error")])
def test_a_full_disk_leaves_the_last_checkpoint(parts, monkeypatch, error):
    base, data, directory = parts
    output = directory / f"full-{type(error).__name__}"
    save, calls = checkpoint_module.save_file, []

    def fails_later(tensors, path, *arguments):
        calls.append(path)
        if len(calls) > 3:  # two files a checkpoint
            raise error
        save(tensors, path, *arguments)

    monkeypatch.setattr(checkpoint_module, "save_file", fails_later)
    with pytest.raises(ValueError, match=r"checkpoint-000004 cannot be written .*earlier checkpoints are untouched"):
        train(base, data, output, save_steps=2)
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-000002"]
    monkeypatch.undo()
    train(base, data, output, save_steps=2)


def test_a_full_disk_at_the_end_leaves_a_checkpoint_that_is_finished_later(parts, unbroken, monkeypatch):
    base, data, directory = parts
    output = directory / "full-at-the-end"
    for error in (OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(model_checkpoint, "save_shared", fails)
        with pytest.raises(ValueError, match=r"final cannot be written .*; the last checkpoint is complete"):
            train(base, data, output)
        assert latest_checkpoint(output).name == "checkpoint-000006"
        assert not (output / "final" / "config.json").exists()
        monkeypatch.undo()
    train(base, data, output)
    same_weights(output, unbroken)


def test_a_damaged_checkpoint_is_no_start(parts):
    base, data, directory = parts
    output = directory / "damaged"
    train(base, data, output, save_steps=3)
    path = output / "checkpoint-000006" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        ValueError, match=r"optimizer\.safetensors cannot be read .*delete checkpoint-000006 to continue"
    ):
        train(base, data, output, save_steps=3)


def test_other_directories_are_left_alone(parts):
    base, data, directory = parts
    output = directory / "crowded"
    half_removed, copy = output / "checkpoint-000001", output / "checkpoint-000001-copy"
    for path in (half_removed, copy):
        path.mkdir(parents=True)
    train(base, data, output, max_steps=2)
    assert not half_removed.exists()
    assert copy.exists()


def test_a_loss_that_is_no_number_stops_the_run(parts, monkeypatch):
    base, data, directory = parts
    output = directory / "nan"
    at_step(monkeypatch, 3, poison)
    with pytest.raises(
        FloatingPointError, match=r"step 3: the loss is nan .* The batch is saved in .*bad_batch_step3_rank0"
    ):
        train(base, data, output, save_steps=2)
    assert latest_checkpoint(output).name == "checkpoint-000002"
    saved = load_file(output / "bad_batch_step3_rank0.safetensors")
    assert saved["0.tokens"].shape == saved["1.tokens"].shape == (2, 128)
    monkeypatch.undo()
    train(base, data, output, save_steps=2)  # the last checkpoint was good


@pytest.mark.long
def test_two_processes_train_like_one(parts, unbroken):
    """One process with batches of 2, two with batches of 1: rows, noise, losses and weights are the same."""
    base, data, directory = parts
    two = run_processes(config_of(base, data, directory / "two", per_device_train_batch_size=1), 2)
    same_weights(two, unbroken, tolerance=1e-6)
    for mine, theirs in zip(metrics(two), metrics(unbroken), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        assert mine["masked_accuracy"] == pytest.approx(theirs["masked_accuracy"], abs=2e-3)


def test_accumulation_is_only_a_matter_of_memory(parts, unbroken):
    base, data, directory = parts
    whole = directory / "whole"
    train(base, data, whole, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    same_weights(whole, unbroken, tolerance=2e-5)  # sums in another order, which AdamW divides by small numbers


def test_recomputed_activations_change_nothing(parts, unbroken):
    base, data, directory = parts
    train(base, data, directory / "recomputed", activation_checkpointing=True)
    same_weights(directory / "recomputed", unbroken, tolerance=5e-5)


@pytest.mark.long
def test_compiled_layers_change_nothing(parts, unbroken):
    """In a process of its own: the shape checks of the tests are nothing that torch.compile reads."""
    base, data, directory = parts
    compiled = run_processes(config_of(base, data, directory / "compiled", compile=True), 1)
    same_weights(compiled, unbroken, tolerance=5e-5)


def test_ar_training_alone_leaves_no_trace_of_wedlm(parts):
    from wedlm.model.formats.checkpoint import read_config

    base, data, directory = parts
    final = train(base, data, directory / "ar", objective="autoregressive", max_steps=2)
    assert read_config(final) == read_config(base)
    records = metrics(directory / "ar")
    assert "masked_loss" not in records[0]
    assert records[0]["loss"] == pytest.approx(records[0]["ar_loss"], abs=1e-4)


def test_frozen_embeddings_change_in_the_mask_row_alone(parts):
    base, data, directory = parts
    final = train(base, data, directory / "frozen", train_embeddings=False)
    name = "model.embed_tokens.weight"
    before, after = weights(base)[name], weights(final)[name]
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    from wedlm.model.formats.checkpoint import read_config

    assert changed == [read_config(final).mask_token_id]
