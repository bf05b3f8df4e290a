# SPDX-License-Identifier: Apache-2.0
"""Tables on terminals of any width."""

import sys

import pytest
from rich.text import Text

from wedlm.tables import show_table

LABELS, FIGURES = ["mode", "batch"], ["tok/s", "tokens/forward", "p_cache", "first token ms", "between ms", "runs"]
ROWS = [["autoregressive", "1", "201 ±6%", "1", "1", "12.5", "3.2", "5"], ["verified", "", *"234567"]]
WORDS = {*FIGURES, *LABELS, *ROWS[0], *ROWS[1]} - {""}


@pytest.mark.parametrize(("width", "num_tables"), [(40, 5), (80, 2), (200, 1)])
def test_no_cell_is_cut(capsys, monkeypatch, width, num_tables):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_table("steps: of a run", LABELS, FIGURES, ROWS)
    text = Text.from_ansi(capsys.readouterr().out).plain
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text for word in WORDS)
    assert "…" not in text
    assert sum(line.startswith("mode") for line in text.splitlines()) == num_tables


def test_a_pipe_has_no_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    show_table(None, LABELS, FIGURES, ROWS)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert head == " ".join([*LABELS, *FIGURES]).split()
    assert len(rows) == 2
