# SPDX-License-Identifier: Apache-2.0
"""The curves: what they need, which panels they have, and that every run is in them."""

import json

import pytest

from wedlm.train import optional_deps
from wedlm.train.plot import draw_curves

PNG = b"\x89PNG\r\n\x1a\n"
MASKED = {"masked_loss": 2.0, "masked_accuracy": 0.5, "loss_by_depth": [1.0, None, 3.0], "loss_by_ratio": [None, 2.0]}


def write_run(directory, *records):
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def wedlm_run(directory, validation=True):
    kinds = ("train", "eval", "eval_suffix") if validation else ("train",)
    return write_run(
        directory,
        *({"kind": kind, "step": step, "loss": 2.5, "ar_loss": 1.0, **MASKED} for step in (1, 2) for kind in kinds),
    )


def drawn(monkeypatch, *directories):
    """The figure that was drawn: for each panel its title, and the lines that hold something."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    path = draw_curves(directories)
    assert path == directories[0] / "curves.png"
    assert path.read_bytes().startswith(PNG)
    return {axes.get_title(): axes.get_lines() for axes in figures[0].axes}


def test_one_run(tmp_path, monkeypatch):
    panels = drawn(monkeypatch, wedlm_run(tmp_path / "run"))
    assert len(panels) == 9
    assert all(panels.values())
    by_depth = next(lines[0] for title, lines in panels.items() if "by depth" in title)
    assert by_depth.get_xdata().tolist() == [0, 1, 2]
    assert [value == value for value in by_depth.get_ydata()] == [True, False, True]  # None is a gap
    both = next(lines for title, lines in panels.items() if title.startswith("validation: masked loss"))
    assert [line.get_linestyle() for line in both] == ["-", "--"]


@pytest.mark.long
def test_runs_lie_over_each_other(tmp_path, monkeypatch):
    panels = drawn(monkeypatch, wedlm_run(tmp_path / "a"), wedlm_run(tmp_path / "b"))
    lines = panels["masked loss (nats)"]
    assert [line.get_label() for line in lines] == ["a", "b"]
    assert lines[0].get_color() != lines[1].get_color()


@pytest.mark.long
def test_equal_names_are_told_apart(tmp_path, monkeypatch):
    panels = drawn(monkeypatch, wedlm_run(tmp_path / "x" / "run"), wedlm_run(tmp_path / "y" / "run"))
    labels = [line.get_label() for line in panels["masked loss (nats)"]]
    assert labels == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


@pytest.mark.long
def test_profiles_compare_under_the_same_noise_or_not_at_all(tmp_path, monkeypatch):
    """Where one of the runs was never measured, all show their training figures, and the title says so."""
    a, b = wedlm_run(tmp_path / "a"), wedlm_run(tmp_path / "b", validation=False)
    assert any("by ratio" in title and "validation" in title for title in drawn(monkeypatch, a))
    titles = drawn(monkeypatch, a, b)
    assert any("by ratio" in title and "training" in title for title in titles)


def test_ar_training_has_its_own_panels_alone(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", {"kind": "train", "step": 1, "loss": 1.0, "ar_loss": 1.0})
    assert sorted(drawn(monkeypatch, run)) == ["AR loss (nats)", "loss that is trained"]


@pytest.mark.long
def test_a_cut_last_line_is_no_fault(tmp_path):
    run = wedlm_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert draw_curves([run]).is_file()


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="--plot has no directory; expected the output_dir of a run"):
        draw_curves([])
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl; expected the output_dir of a run"):
        draw_curves([tmp_path])
    with pytest.raises(ValueError, match="has no losses yet"):
        draw_curves([write_run(tmp_path / "empty")])
    with pytest.raises(ValueError, match="line 1 is not a record of a run; expected an object with kind and step"):
        draw_curves([write_run(tmp_path / "list", [1, 2])])
    broken = write_run(tmp_path / "broken", {"kind": "train", "step": 1})
    (broken / "metrics.jsonl").write_text("nonsense\n{}\n")
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        draw_curves([broken])


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(optional_deps, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"drawing curves needs the package matplotlib.*pip install 'wedlm\[train\]'"):
        draw_curves([tmp_path])
