# SPDX-License-Identifier: Apache-2.0
"""Settings of a run: what is refused, in which words, and how a file and the command line go together."""

import re
from pathlib import Path

import pytest
import yaml

from wedlm.train.config import RENAMED, TrainConfig, load_config, parse_overrides

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "examples").glob("*.yaml"), *(ROOT / "recipes").rglob("*.yaml")])
LEAST = {"model_path": "model", "train_data": "a.jsonl"}
MASKED = {"lora_rank": 4, "lora_rows": "masked"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learning_rates": 1}, "learning_rates is not a setting; expected learning_rate or min_learning_rate"),
        ({"zzz": 1}, "zzz is not a setting; expected one that wedlm train --help lists"),
        ({"train_data": [{"path": "a", "repeats": 2}]}, "train_data.0.repeats is not a setting; expected repeat"),
        ({"model_path": None}, "model_path is None; input should be a valid string"),
        ({"block_size": "x"}, "block_size is 'x'; input should be a valid integer"),
        ({"block_size": 0}, "block_size is 0; input should be greater than or equal to 1"),
        ({"block_size": True}, "block_size is True; expected a value that is not true or false"),
        ({"bf16": "maybe"}, "bf16 is 'maybe'; input should be a valid boolean"),
        ({"seed": 1.5}, "seed is 1.5; input should be a valid integer"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; input should be a finite number"),
        ({"suffix_noise": 1.5}, "suffix_noise is 1.5; input should be less than or equal to 1"),
        ({"objective": "mlm"}, "objective is 'mlm'; input should be 'wedlm' or 'autoregressive'"),
        ({"train_data": []}, r"train_data is \[\]; list should have at least 1 item"),
        ({"train_data": [{"path": "a", "repeat": 0}]}, "train_data.0.repeat is 0; input should be greater than 0"),
        ({"lora_targets": "q_proj"}, "lora_targets is 'q_proj'; input should be a valid list"),
    ],
)
def test_a_bad_setting_is_named(settings, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        load_config(None, {**LEAST, **settings})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"min_learning_rate": 1.0}, "min_learning_rate is 1.0; expected at most learning_rate"),
        ({"eval_steps": 5}, "eval_steps is 5 without anything to measure on"),
        ({"validation_documents": 3, "validation_data": "b.jsonl"}, "are both given; expected one of them"),
        ({"objective": "autoregressive", "enable_ar_loss": False}, "expected a loss to train on"),
        ({"lora_rows": "masked"}, "lora_rows is masked; expected objective wedlm and a lora_rank above 0"),
        ({**MASKED, "objective": "autoregressive"}, "lora_rows is masked; expected objective wedlm"),
        (MASKED, "so that the AR loss has no gradient; expected enable_ar_loss false"),
        (
            {**MASKED, "enable_ar_loss": False},
            "merge_lora is true with lora_rows masked, .*; expected merge_lora false",
        ),
    ],
)
def test_settings_that_do_not_fit_together(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(None, {**LEAST, **settings})


def test_every_fault_is_told():
    with pytest.raises(ValueError, match="model_path is missing; expected a value; train_data is missing"):
        load_config(None, {})


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_keys_of_earlier_versions_name_the_present_one(old, new):
    with pytest.raises(ValueError, match=f"^{old} has a new name; expected {new}$"):
        load_config(None, {**LEAST, old: 1})
    assert new in TrainConfig.model_fields
    assert old not in TrainConfig.model_fields


def test_what_is_said_on_the_command_line_counts(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model_path: model\ntrain_data: a.jsonl\nlearning_rate: 3e-6\nblock_size: 8\n")
    config = load_config(path, {"block_size": 16})
    assert config.learning_rate == 3e-6  # YAML 1.1 reads it as text
    assert config.block_size == 16
    assert [source.model_dump() for source in config.train_data] == [{"path": "a.jsonl", "repeat": 1.0}]


def test_several_sources():
    config = load_config(None, {**LEAST, "train_data": ["a.jsonl", {"path": "b.jsonl.gz", "repeat": 0.5}]})
    assert [(source.path, source.repeat) for source in config.train_data] == [("a.jsonl", 1.0), ("b.jsonl.gz", 0.5)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"model_path: [unclosed", r"bad.yaml is not valid YAML: .*line 1"),
        (b"model_path: \xff\xfe", r"bad.yaml is not valid YAML"),
        (b"- a\n- b\n", r"bad.yaml holds list; expected keys and values"),
        (b"!!python/object/apply:os.getcwd []", r"bad.yaml is not valid YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, sentence):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_config(path, {})
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none.yaml cannot be read: No such file"):
        load_config(tmp_path / "none.yaml", {})


def test_overrides_are_read_as_yaml():
    arguments = ["--learning_rate", "1e-4", "--bf16=false", "--block-size", "8", "--lora_alpha", "null"]
    arguments += ["--train_data", "[a.jsonl, {path: b.jsonl, repeat: 2}]"]
    assert parse_overrides(arguments) == {
        "learning_rate": "1e-4",
        "bf16": False,
        "block_size": 8,
        "lora_alpha": None,
        "train_data": ["a.jsonl", {"path": "b.jsonl", "repeat": 2}],
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["block_size", "8"], "the argument 'block_size' stands alone; expected --key value"),
        (["--block_size"], "--block_size has no value; expected --block_size value"),
        (["--lora_targets", "[q_proj"], "--lora_targets is '.q_proj'; expected a value that YAML reads"),
    ],
)
def test_arguments_that_are_no_settings(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_overrides(arguments)


def test_a_run_reports_to_nobody_unless_asked():
    assert not load_config(None, LEAST).use_wandb
    assert not [name for name in TrainConfig.model_fields if "key" in name]  # no setting could hold a secret


def test_every_setting_is_explained():
    assert [name for name, field in TrainConfig.model_fields.items() if not field.description] == []


def test_there_are_examples():
    assert {path.name for path in FILES} >= {"sft.yaml", "pretrain.yaml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_configurations_of_this_repository_load(path):
    load_config(path, {})


def test_the_documentation_has_every_setting_with_its_default():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) ?\|", text.partition("## Settings")[2], re.MULTILINE))
    for name, field in TrainConfig.model_fields.items():
        assert name in told
        if field.is_required() or name == "lora_targets":  # whose list stands in the text
            continue
        value = None if told[name] == "none" else yaml.safe_load(told[name])
        assert value == field.default, name


def test_shown_commands_name_settings_that_exist():
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "docs" / "training.md", *FILES]]
    commands = [
        line for text in texts for line in re.findall(r"^(?:#\s+)?(?:wedlm train|accelerate launch) .*", text, re.M)
    ]
    assert len(commands) > 5
    own = {"plot", "data", "download"}
    known = {*TrainConfig.model_fields, *own, "num_processes", "config_file"}  # the last two are accelerate's
    for line in commands:
        assert {word.partition("=")[0] for word in re.findall(r"(?<=\s--)\S+", line)} <= known, line
