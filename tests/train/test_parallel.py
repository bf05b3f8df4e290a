# SPDX-License-Identifier: Apache-2.0
"""Several processes: the same losses and weights as one, for every kind of training, and nothing done in silence."""

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from tests.train.processes import DEEPSPEED, FSDP2, RUN_DEEPSPEED, RUN_FSDP, run_processes
from tests.train.tiny_run import add_texts, config_of, metrics, save_base, train, weights, write_chats
from wedlm.train import deepspeed, optional_deps, parallel
from wedlm.train.checkpoint import latest_checkpoint
from wedlm.train.parallel import make_accelerator

# Of weights that moved by 2e-3 to 9e-3. Sums in another order, and Adam where gradients vanish, gave up to 1.1e-6.
TOLERANCE = 5e-6
MASKED_LORA = {"lora_rank": 4, "lora_rows": "masked", "merge_lora": False, "enable_ar_loss": False}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(base checkpoint, data, directory for runs)"""
    directory = tmp_path_factory.mktemp("parallel")
    return save_base(directory / "base"), write_chats(directory / "data.jsonl", 30), directory


def numbers(record: dict[str, Any]) -> list[float]:
    """All figures of a record; None, where a list has no figure, becomes -1."""
    values = [value for name, value in record.items() if name != "kind"]
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return [-1.0 if one is None else one for one in flat]


def results(directory: Path) -> dict[str, torch.Tensor]:
    adapter = directory / "adapter_model.safetensors"
    return load_file(adapter) if adapter.is_file() else weights(directory)


def check_equal(run: Path, other: Path) -> None:
    first, second = results(run / "final"), results(other / "final")
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )
    for kind in ("train", "eval", "eval_suffix"):
        records, expected = metrics(run, kind), metrics(other, kind)
        assert records
        assert len(records) == len(expected)
        for mine, theirs in zip(records, expected, strict=True):
            assert mine.keys() == theirs.keys()
            assert numbers(mine) == pytest.approx(numbers(theirs), abs=1e-5, rel=1e-5)


def run_both(parts, name: str, program_settings: dict[str, str], **settings) -> tuple[Path, Path]:
    """(run of two processes, run of one process with twice their batch)"""
    base, data, directory = parts
    # Rows of validation are no multiple of what a forward takes.
    settings |= {"validation_documents": 5, "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    one, two = directory / f"{name}-one", directory / f"{name}-two"
    train(base, data, one, per_device_train_batch_size=2, **settings)
    config = config_of(base, data, two, per_device_train_batch_size=1, **settings)
    return run_processes(config, 2, **program_settings), one


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"lora_rank": 4}, MASKED_LORA], ids=["all", "masked"])
def test_lora_in_two_processes(parts, settings):
    check_equal(*run_both(parts, f"lora-{len(settings)}", {}, **settings))


@pytest.mark.long
def test_fsdp2_and_its_checkpoint_in_one_process(parts):
    two, one = run_both(parts, "fsdp", {"program": RUN_FSDP, **FSDP2})
    check_equal(two, one)
    for path in (two / "checkpoint-000004").iterdir():
        path.unlink()  # as if the run had ended before
    assert latest_checkpoint(two).name == "checkpoint-000002"
    base, data, _ = parts
    settings = {"validation_documents": 5, "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    train(base, data, two, per_device_train_batch_size=4, gradient_accumulation_steps=1, **settings)
    check_equal(two, one)


@pytest.mark.long
def test_fsdp2_with_a_teacher(tmp_path):
    """The teacher is of another width, and whole in each process."""
    base, other = save_base(tmp_path / "base"), save_base(tmp_path / "other", hidden_size=48)
    data = add_texts(write_chats(tmp_path / "data.jsonl", 30))
    settings = {"distill_text": True, "teacher_model": str(other)}
    check_equal(*run_both((base, data, tmp_path), "teacher", {"program": RUN_FSDP, **FSDP2}, **settings))


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"lora_rank": 4}, MASKED_LORA, {"train_embeddings": False}], ids=str)
def test_fsdp2_with_frozen_weights(parts, settings):
    check_equal(
        *run_both(parts, f"fsdp-{next(iter(settings))}-{len(settings)}", {"program": RUN_FSDP, **FSDP2}, **settings)
    )


@pytest.mark.long
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("settings", [{}, MASKED_LORA], ids=["full", "masked-lora"])
def test_zero_and_its_checkpoint_in_one_process(parts, stage, settings):
    """ZeRO in two processes is one process; a checkpoint of one goes on in the other."""
    name = f"zero{stage}-{len(settings)}"
    program = {"program": RUN_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage), **DEEPSPEED}
    two, one = run_both(parts, name, program, **settings)
    check_equal(two, one)
    base, data, _ = parts
    more = {**settings, "validation_documents": 5, "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    for run, processes in ((two, 1), (one, 2)):  # each goes on from the other's kind of checkpoint
        for path in (run / "checkpoint-000004").iterdir():
            path.unlink()  # as if the run had ended before
        if processes == 1:
            train(base, data, run, per_device_train_batch_size=4, gradient_accumulation_steps=1, **more)
        else:
            run_processes(config_of(base, data, run, per_device_train_batch_size=1, **more), 2, **program)
    check_equal(two, one)


@pytest.mark.parametrize(
    ("zero_config", "sentence"),
    [
        ({"stage": 3}, "asks for ZeRO stage 3; expected 1 or 2, or FSDP with fsdp_version 2"),
        ({}, "asks for ZeRO stage None; expected 1 or 2"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "has offload_optimizer to cpu; expected none"),
    ],
)
def test_what_zero_is_not_run_with(zero_config, sentence):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero_config})
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match=sentence):
        deepspeed.configure(accelerator, bf16=True, sequences=1, max_grad_norm=1.0)


def test_what_accelerate_would_leave_out_in_silence(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="asks for FSDP, which it only runs on GPUs; expected GPUs"):
        make_accelerator(bf16=False)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(optional_deps, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"needs the package deepspeed.*pip install deepspeed"):
        make_accelerator(bf16=False)
    monkeypatch.setattr(optional_deps, "find_spec", lambda _: True)
    alone = SimpleNamespace(distributed_type=DistributedType.NO, is_fsdp2=False)
    monkeypatch.setattr(parallel, "Accelerator", lambda **_: alone)
    with pytest.raises(ValueError, match="asks for DeepSpeed, which it only runs on GPUs; expected GPUs"):
        make_accelerator(bf16=False)
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")  # without ACCELERATE_USE_CPU
    with pytest.raises(ValueError, match="2 processes were started, of which accelerate sees 1; expected as many"):
        make_accelerator(bf16=False)
