# SPDX-License-Identifier: Apache-2.0
"""Options, protocols and grids; wrong ones are told in a sentence."""

import pytest

from wedlm.evaluate.settings import Params, Settings, make_params, parse_sweep, protocol_tasks, task_names


def test_protocols():
    assert make_params("default", {}) == Params()
    paper = make_params("paper", {"seed": 3})
    assert (paper.decoding, paper.window_size, paper.pos_penalty, paper.entropy_threshold) == (
        "streaming",
        6,
        0.1,
        None,
    )
    assert (paper.temperature, paper.max_tokens, paper.seed) == (0.1, 512, 3)
    assert make_params("paper-decoding", {"seed": 3}) == paper


def test_a_sweep_is_a_grid():
    runs = parse_sweep(["entropy_threshold=0.2,none", "decoding=streaming, verified", "window-size=8"])
    assert len(runs) == 4
    assert runs[0] == {"entropy_threshold": 0.2, "decoding": "streaming", "window_size": 8}
    assert runs[3] == {"entropy_threshold": None, "decoding": "verified", "window_size": 8}
    assert parse_sweep([]) == [{}]
    assert parse_sweep(["top_k=1,1"]) == [{"top_k": 1}]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("speed=1", "expected key=value,value with a key of decoding"),
        ("top_k", "expected top_k=value,value"),
        ("top_k=1,,2", "expected top_k=value,value"),
        ("top_k=1.5", "top_k is '1.5'; expected an integer"),
        ("entropy_threshold=low", "expected a number or none"),
    ],
)
def test_wrong_sweeps(option, message):
    with pytest.raises(ValueError, match=message):
        parse_sweep([option])
    with pytest.raises(ValueError, match="names top_k twice"):
        parse_sweep(["top_k=1", "top_k=2"])


def test_wrong_parameters():
    with pytest.raises(ValueError, match="decoding is 'fast'; expected one of"):
        make_params("default", {"decoding": "fast"})
    with pytest.raises(ValueError, match="protocol is 'mine'; expected one of default, paper"):
        make_params("mine", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "no task is given; expected some of arc_c"),
        ({"tasks": ("arc_c", "chess")}, "'chess' is unknown; expected some of arc_c"),
        ({"tasks": ("arc_c", "arc_c")}, "each task once"),
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
    ],
)
def test_wrong_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"tasks": ("arc_c",), "data_dir": tmp_path, "output": tmp_path, **changes})
    with pytest.raises(ValueError, match="not a directory; expected that of the data files"):
        Settings(("arc_c",), tmp_path / "none", tmp_path)


def test_all_tasks_are_known():
    paper = "gsm8k math500 humaneval humaneval_plus mbpp mmlu arc_c arc_e hellaswag gpqa"
    own = {*paper.split(), "mbpp_plus", "piqa", "winogrande", "boolq"}
    twins = {f"{name}_paper" for name in paper.split()}
    assert set(task_names()) == own | twins
    assert protocol_tasks("paper", ["gsm8k", "mbpp_plus", "piqa"]) == ("gsm8k_paper", "mbpp_plus", "piqa")
    assert protocol_tasks("default", ["gsm8k"]) == protocol_tasks("paper-decoding", ["gsm8k"]) == ("gsm8k",)
