# SPDX-License-Identifier: Apache-2.0
"""``wedlm train`` from its arguments to its exit code."""

import importlib.util
import json
import runpy
import sys

import pytest
import yaml

from tests.train.tiny_run import config_of, metrics, save_base, write_chats
from wedlm.cli.train import FAILED, INTERRUPTED, main
from wedlm.model import DemoModelError
from wedlm.train import optional_deps
from wedlm.train.config import TrainConfig
from wedlm.train.trainer import Trainer

SECRET = "a-key-that-nobody-may-read"
LEAST = ["--model_path", "model", "--train_data", "a.jsonl"]


def fails(capsys, *arguments, code=FAILED):
    """The one sentence on standard error of a call that fails."""
    assert main(list(arguments)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.rstrip("\n")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(configuration file, data)"""
    directory = tmp_path_factory.mktemp("cli")
    base, data = save_base(directory / "base"), write_chats(directory / "data.jsonl", 12)
    settings = config_of(base, data, directory / "unused", max_steps=2).model_dump()
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path, data


def test_a_run(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    config, data = parts
    arguments = ["--validation_data", str(data), "--eval_steps=1", "--tensorboard", "true", "--suffix-noise=0.25"]
    assert main([str(config), "--output_dir", str(tmp_path), *arguments]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'final'}\n"
    assert (tmp_path / "final" / "model.safetensors").is_file()
    assert list((tmp_path / "tensorboard").glob("events.out.*"))
    written = yaml.safe_load((tmp_path / "training_config.yaml").read_text())
    assert (written["suffix_noise"], written["max_steps"]) == (0.25, 2)
    random, suffix = metrics(tmp_path, "eval"), metrics(tmp_path, "eval_suffix")
    assert [record["step"] for record in random] == [record["step"] for record in suffix] == [1, 2]
    assert random[0]["masked_loss"] != suffix[0]["masked_loss"]
    assert random[0]["ar_loss"] > 0
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path


def test_curves(parts, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0}) + "\n")
    assert main(["--plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    assert (tmp_path / "curves.png").is_file()
    assert fails(capsys, "--plot") == "--plot has no directory; expected the output_dir of a run, or of several"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run.yaml", "-h"]])
def test_help_has_every_key(capsys, arguments):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert [name for name in TrainConfig.model_fields if f"\n--{name}" not in out] == []


def test_input_that_cannot_be_used(parts, tmp_path, capsys):
    config, _ = parts
    assert fails(capsys, str(config), "--block_sizes", "8") == "block_sizes is not a setting; expected block_size"
    assert fails(capsys, str(config), "block_size=8").startswith("the argument 'block_size=8' stands alone")
    assert "none.yaml cannot be read" in fails(capsys, "none.yaml")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnonsense\n')
    told = fails(
        capsys, str(config), "--train_data", str(tmp_path / "bad.jsonl"), "--output_dir", str(tmp_path / "out")
    )
    assert "bad.jsonl line 2: not valid JSON" in told


@pytest.mark.parametrize("error", [FloatingPointError, ValueError, OSError, DemoModelError])
def test_what_stops_a_run_is_one_sentence(monkeypatch, capsys, error):
    def stops(*_):
        raise error("what happened")

    monkeypatch.setattr(Trainer, "__init__", stops)
    assert fails(capsys, *LEAST) == "what happened"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def stops(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "__init__", stops)
    with pytest.raises(RuntimeError, match="a bug"):
        main(LEAST)


def test_ctrl_c(monkeypatch, capsys):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "__init__", stops)
    assert "continues from the latest checkpoint" in fails(capsys, *LEAST, code=INTERRUPTED)


def test_one_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["--nonsense", "1"]) == FAILED
    assert main(["--help"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("accelerate", []),
        ("pydantic", []),
        ("yaml", []),
        ("peft", ["--lora_rank", "4"]),
        ("tensorboard", ["--tensorboard", "true"]),
    ],
)
def test_a_missing_package(monkeypatch, capsys, package, settings):
    monkeypatch.setattr(
        optional_deps, "find_spec", lambda name: None if name == package else importlib.util.find_spec(name)
    )
    told = fails(capsys, *LEAST, *settings)
    assert f"needs the package {package}, which is not installed" in told
    assert told.endswith(f"{sys.executable} -m pip install 'wedlm[train]'")


def test_help_without_the_packages_of_training(monkeypatch, capsys):
    monkeypatch.setattr(optional_deps, "find_spec", lambda _: None)
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("Train a WeDLM from an AR checkpoint")
    assert told.splitlines()[-1].endswith(f"installed: {sys.executable} -m pip install 'wedlm[train]'")


def test_wandb_is_a_package_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(
        optional_deps, "find_spec", lambda name: None if name == "wandb" else importlib.util.find_spec(name)
    )
    assert fails(capsys, *LEAST, "--use_wandb", "true").endswith("pip install wandb")


def test_the_module_can_be_launched(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wedlm.train", "--nonsense", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("wedlm.train", run_name="__main__")
    assert ended.value.code == FAILED
    assert "nonsense is not a setting" in capsys.readouterr().err


def test_the_originals_data_is_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wedlm.train.alpaca.download", lambda: (tmp_path / "a.jsonl", 51760))
    assert main(["--data", "alpaca", "--download"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.jsonl'}: 51,760 conversations\n"
    assert main(["--data", "other"]) == FAILED
    assert "--data other; expected --data alpaca --download" in capsys.readouterr().err


def test_the_originals_arguments(tmp_path, monkeypatch, capsys):
    made = []

    class Stub:
        def __init__(self, config: TrainConfig) -> None:
            made.append(config)

        def run(self) -> str:
            return "final"

    monkeypatch.setattr("wedlm.train.trainer.Trainer", Stub)
    path = tmp_path / "example.yaml"
    path.write_text("model_path: a\ntrain_data: b.jsonl\nblock_size: 8\n")
    assert main(["--config", str(path), "--rebuild_cache", "--loss_weighting_scheme", "uniform"]) == 0
    assert (made[0].block_size, made[0].loss_weighting_scheme) == (8, "uniform")
    for arguments in (["--config"], ["--config", "--rebuild_cache"]):
        assert main(arguments) == FAILED
        assert "--config has no value; expected --config FILE" in capsys.readouterr().err
