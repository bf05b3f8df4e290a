# SPDX-License-Identifier: Apache-2.0
"""The report: baselines, failures, colours by forward, and a page that is safe and needs nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer.testing

from tests.evaluate.result_files import STOP, WordDecoder, sample, samples_of, write_run, write_sweep
from wedlm.cli import app
from wedlm.evaluate.plots import draw_plots
from wedlm.evaluate.report import Piece, build_sections, choose_baseline, split_by_step
from wedlm.evaluate.report_page import COLUMNS, cells, columns, html_page, markdown_page
from wedlm.evaluate.result_folder import read_run, read_runs, read_samples

HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(1)> {{ 7 * 7 }} | `x`"


def sections_of(folder: Path, **options):
    return build_sections(read_runs([folder]), **options)


def rows_of(folder: Path, **options):
    (section,) = sections_of(folder, **options)
    return {row.run.key[0]: row for row in section.rows}


class Page(HTMLParser):
    """Tags with their attributes, and whether they close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_rows_stand_beside_ar_and_baseline(tmp_path):
    write_run(tmp_path, "0" * 16, samples_of([True, True, False, False]))
    write_run(tmp_path, "1" * 16, samples_of([True, False, False, False], 3), "streaming")
    write_run(tmp_path, "2" * 16, samples_of([True] * 4), name="other", model_hash="cd" * 8)
    runs = read_runs([tmp_path])
    rows = rows_of(tmp_path, baseline=choose_baseline(runs, "other"))
    assert rows["0"].against_ar is None
    assert rows["1"].against_ar.difference == -0.25
    assert rows["1"].against_baseline.difference == -0.75
    assert rows["2"].against_ar is None
    assert rows["2"].against_baseline is None
    assert cells(rows["1"])[:6] == [
        "streaming W=16 τ=0.4 λ=0.02", "4", "25.0 ± 25.0", "-25.0 (p = 1.000)", "-75.0 (p = 0.250)", "75.0 %",
    ]  # fmt: skip
    assert cells(rows["1"])[6:] == ["2.50", "0.312", "40.0", "0"]
    assert cells(rows["1"], baseline=False) == [*cells(rows["1"])[:4], *cells(rows["1"])[5:]]
    assert len(columns("generate", baseline=False)) == len(cells(rows["1"], baseline=False))


def test_the_closest_ar_run_is_taken(tmp_path):
    write_run(tmp_path, "0" * 16, samples_of([False]), temperature=1.0)
    write_run(tmp_path, "1" * 16, samples_of([True]), temperature=0.0, max_tokens=64)
    write_run(tmp_path, "2" * 16, samples_of([False]), "verified")
    assert rows_of(tmp_path)["2"].against_ar.only_a == 1


@pytest.mark.parametrize("name", ["zzz", "0", "toy"])
def test_an_unclear_baseline_is_told(tmp_path, name):
    write_run(tmp_path, "01" * 8, samples_of([True]))
    write_run(tmp_path, "02" * 8, samples_of([True]), temperature=1.0)
    runs = read_runs([tmp_path])
    with pytest.raises(ValueError, match=rf"baseline '{name}' fits (no run|2 runs); expected a key, .* 0101"):
        choose_baseline(runs, name)
    assert choose_baseline(runs, "02").key == "02" * 8


def test_failures_have_reasons_the_worst_first(tmp_path):
    write_run(tmp_path, "0" * 16, samples_of([True, True, True, False]))
    wrong = [
        sample(0, False, [0, 1], [0, 1]),
        sample(1, False, [], [], finish_reason="length"),
        sample(2, True, [3], [0]),
        sample(3, False, [0, 2], [0, 0]),
    ]
    write_run(tmp_path, "1" * 16, wrong, "streaming")
    row = rows_of(tmp_path)["1"]
    assert [(failure.example.sample.doc_id, len(failure.reasons)) for failure in row.failures] == [(1, 3), (0, 1)]
    assert (row.num_notable, row.num_wrong) == (2, 3)
    assert len(rows_of(tmp_path, num_examples=1)["1"].failures) == 1


def test_pieces_are_the_text_by_forward(tmp_path):
    path = write_run(tmp_path, "0" * 16, [sample(0, True, [0, 1, 2, 3, STOP], [0, 0, 1, 2, 2])])
    (one,) = read_samples(read_run(path).tasks["gsm8k"])
    assert split_by_step(one, WordDecoder()) == [Piece("The answer ", 0, 2), Piece("is ", 1, 1), Piece("four", 2, 2)]


def test_pieces_end_where_a_stop_string_cut(tmp_path):
    path = write_run(tmp_path, "0" * 16, [sample(0, True, [0, 1, 2, 3], [0, 0, 1, 1], text="The ans")])
    (one,) = read_samples(read_run(path).tasks["gsm8k"])
    assert [piece.text for piece in split_by_step(one, WordDecoder())] == ["The ans", ""]


def test_the_wrong_tokenizer_is_told(tmp_path):
    write_run(tmp_path, "0" * 16, [sample(7, True, [0, 1], [0, 1], text="something else")])
    with pytest.raises(ValueError, match="tokens of question 7 do not decode to its text"):
        sections_of(tmp_path, decoder_of=lambda _: WordDecoder())


def test_nothing_that_was_said_becomes_markup(tmp_path):
    said = sample(0, False, [], [], text=HOSTILE, prompt=HOSTILE, target=HOSTILE, finish_reason="length")
    write_run(tmp_path, "0" * 16, [said, *samples_of([False, True])[1:]], name=HOSTILE)
    write_run(tmp_path, "1" * 16, samples_of([True, True]), "streaming" + HOSTILE, name=HOSTILE)
    sections = sections_of(tmp_path)
    page = Page(html_page(sections, [draw_plots(section) for section in sections], HOSTILE))
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on")}
    assert all(
        attributes["src"].startswith("data:image/svg+xml;base64,") for tag, attributes in page.tags if tag == "img"
    )
    assert page.text.count(HOSTILE) >= 4
    assert "49" not in page.text
    table = [line for line in markdown_page(sections, HOSTILE).splitlines() if line.startswith("|")]
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in table]
    assert bars == [len(columns("generate", baseline=False)) + 2] * 4
    assert not any("<script" in line for line in table)


def test_the_page_needs_no_host(tmp_path):
    write_run(tmp_path, "0" * 16, samples_of([True, False]))
    write_run(tmp_path, "1" * 16, samples_of([True, False], 2), "verified")
    sections = sections_of(tmp_path, decoder_of=lambda _: WordDecoder(), num_examples=2)
    plots = [draw_plots(section) for section in sections]
    assert [len(drawn) for drawn in plots] == [1]
    assert plots == [draw_plots(section) for section in sections]  # the same figure, byte for byte
    page = html_page(sections, plots, "Sweep")
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "@import" not in page
    assert 'class="c1" title="forward 1: 2 tokens">is four</mark>' in page


def test_the_plots_that_there_are_runs_for(tmp_path):
    write_sweep(tmp_path / "all")
    (section,) = sections_of(tmp_path / "all")
    plots = draw_plots(section)
    titles = ["Accuracy against speed", "Threshold sweep", "Penalty sweep", "Streaming against block"]
    assert [plot.title for plot in plots] == titles
    assert all("<svg" in plot.svg for plot in plots)
    assert all("tokens / second" in plot.svg for plot in plots)
    kept = draw_plots(section, seconds=False)
    assert [plot.title for plot in kept] == titles
    for plot in kept:
        assert "tokens / forward" in plot.svg
        assert "tokens / second" not in plot.svg
    write_run(tmp_path / "one", "0" * 16, samples_of([True]))
    (section,) = sections_of(tmp_path / "one")
    assert draw_plots(section) == []


def test_plots_without_matplotlib_are_refused_in_a_sentence(tmp_path, monkeypatch):
    write_sweep(tmp_path)
    monkeypatch.setattr("wedlm.plotting.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"plots need the package matplotlib, .* or --no-plots"):
        draw_plots(sections_of(tmp_path)[0])


def test_likelihood_tasks_have_their_own_columns(tmp_path):
    choices = {"choices": ["one", "two"], "logprobs": [-1.0, -2.0], "greedy": [True, False], "chosen": 0}
    base = {"doc_id": 0, "prompt": "Which?", "target": "one", "metrics": {"acc_norm": 1.0}, "correct": True}
    write_run(tmp_path, "0" * 16, [{**base, **choices}], task="arc_e")
    (section,) = sections_of(tmp_path, decoder_of=lambda _: WordDecoder())
    assert len(cells(section.rows[0])) == len(COLUMNS["likelihood"])
    assert section.rows[0].examples[0].sample.text == "one"
    Page(html_page([section], [draw_plots(section)], "Choices"))


def test_the_command_writes_both_files(tmp_path):
    write_sweep(tmp_path / "results")
    words = ["report", str(tmp_path / "results"), "--output", str(tmp_path / "out"), "--no-plots", "--baseline", "toy"]
    result = typer.testing.CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Without colours: no tokenizer was given" in " ".join(page.split())
    assert "| verified W=16 H=2.5 | 40 | 50.0 ± 8.0 |" in (tmp_path / "out" / "report.md").read_text()
    assert not list((tmp_path / "results").glob("report*"))


@pytest.mark.long
def test_figures_are_written_as_files_too(tmp_path):
    write_sweep(tmp_path / "results")
    words = ["report", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]

    result = typer.testing.CliRunner().invoke(app, words)

    assert result.exit_code == 0, result.output
    names = ["accuracy-against-speed", "penalty-sweep", "streaming-against-block", "threshold-sweep"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [f"gsm8k-{name}.svg" for name in names]
    assert all("<svg" in path.read_text() for path in (tmp_path / "figures").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--figures", "x", "--no-plots"], "--figures is x; expected no such option with --no-plots"),
        (["--examples", "-1"], "--examples is -1; expected 0 or more"),
        (["--baseline", "x"], "the baseline 'x' fits no run"),
        (["--tokenizer", "no-such-directory"], "no-such-directory does not exist"),
    ],
)
def test_wrong_use_of_the_command_is_told(tmp_path, words, message):
    write_run(tmp_path, "0" * 16, samples_of([True]))
    result = typer.testing.CliRunner().invoke(app, ["report", str(tmp_path), *words])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "report.html").exists()


def test_an_empty_or_missing_folder_is_told(tmp_path):
    for folder, message in ((tmp_path, "has no point-"), (tmp_path / "none", "is not a directory")):
        with pytest.raises(ValueError, match=message):
            read_runs([folder])
