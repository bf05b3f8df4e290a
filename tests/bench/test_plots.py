# SPDX-License-Identifier: Apache-2.0
"""Figures from rows and from results of ``wedlm eval``."""

from tests.evaluate.result_files import write_sweep
from wedlm.bench.plots import draw_bench, write_plots
from wedlm.bench.stats import make_row
from wedlm.evaluate.plots import draw_folder


def test_speed_against_quality(tmp_path):
    write_sweep(tmp_path / "results")
    plots = draw_folder(tmp_path / "results")
    assert any("Threshold sweep" in plot.title for plot in plots)
    paths = write_plots(plots, tmp_path / "drawn")
    assert len({*paths}) == len(plots), "a figure overwrote another"
    assert all(path.read_text().startswith("<?xml") for path in paths)


def test_a_record_without_rows_draws_nothing():
    assert draw_bench({"parts": {}}) == []
    assert draw_bench({"parts": {"steps": [], "throughput": []}}) == []


def test_rows_kept():
    figures = {"tokens_per_forward": 2.0, "p_cache": 0.25, "tok_per_s": 9.0}
    row = make_row({"mode": "verified"}, [figures] * 3)
    (plot,) = draw_bench({"parts": {"latency": [row]}})
    assert plot.title == "Rows processed against tokens kept"
    assert "latency verified" in plot.svg
