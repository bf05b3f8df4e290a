# SPDX-License-Identifier: Apache-2.0
"""``wedlm report`` and ``wedlm compare``: results of ``wedlm eval`` to a page, and one run beside another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wedlm.cli_terminal import note, plain_errors, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wedlm.engine.text import TokenDecoder
    from wedlm.evaluate.compare import Comparison
    from wedlm.evaluate.plots import Plot
    from wedlm.evaluate.report import Section
    from wedlm.evaluate.result_folder import Run

# Names under which a model's own tokenizer is at hand without asking the user.
_EMBEDDED = ("demo", "demo-base")
_SHOWN_CHARACTERS = 400


def report(
    folders: Annotated[list[Path], typer.Argument(help="Output folders of wedlm eval.", metavar="FOLDER...")],
    output: Annotated[Path | None, typer.Option(help="Where to write; default: the first folder.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Also compare with this run: a key, or the name of a model with one AR run.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Checkpoint whose tokenizer colours the answers by forward; the demo's own is known."),
    ] = None,
    examples: Annotated[int, typer.Option(help="Answers and failures to show per run and task.")] = 10,
    title: Annotated[str, typer.Option(help="Heading of the report.")] = "Evaluation",
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures (needs matplotlib).")] = True,
    seconds: Annotated[
        bool,
        typer.Option(
            "--seconds/--no-seconds",
            help="Figures with tokens a second beside tokens a forward; no: the machine did other work meanwhile.",
        ),
    ] = True,
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure into this folder, as an SVG file.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write report.html, one page that needs nothing else, and report.md, its tables.

    \b
    Examples:
    wedlm report ./results
    wedlm report ./results ./results-base --baseline demo-base --output ./report
    """
    with plain_errors(debug):
        from wedlm.evaluate.plots import draw_plots
        from wedlm.evaluate.report import build_sections, choose_baseline
        from wedlm.evaluate.report_page import html_page, markdown_page
        from wedlm.evaluate.result_folder import read_runs

        if examples < 0:
            raise ValueError(f"--examples is {examples}; expected 0 or more")
        if figures is not None and not plots:
            raise ValueError(f"--figures is {figures}; expected no such option beside --no-plots")
        runs = read_runs(folders)
        chosen = None if baseline is None else choose_baseline(runs, baseline)
        sections = build_sections(runs, chosen, examples, _Decoders(tokenizer))
        drawn = [draw_plots(section, seconds) if plots else [] for section in sections]
        target = output or folders[0]
        target.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("report.html", html_page(sections, drawn, title, chosen)),
            ("report.md", markdown_page(sections, title, chosen)),
        ):
            # Half of a surrogate pair, which JSON can carry, is no text.
            (target / name).write_text(text, encoding="utf-8", errors="replace")
            note(f"wrote {target / name}")
        if figures is not None:
            _write_figures(figures, sections, drawn)


def _write_figures(folder: Path, sections: "Sequence[Section]", drawn: "Sequence[Sequence[Plot]]") -> None:
    """One file per section and figure, named by both."""
    folder.mkdir(parents=True, exist_ok=True)
    for section, plots in zip(sections, drawn, strict=True):
        for plot in plots:
            name = "".join(c if c.isalnum() else "-" for c in f"{section.title.split()[0]} {plot.title}".lower())
            (folder / f"{name}.svg").write_text(plot.svg, encoding="utf-8")
            note(f"wrote {folder / f'{name}.svg'}")


class _Decoders:
    """The tokenizer of a run's model, loaded once; None where none is known."""

    def __init__(self, given: str | None) -> None:
        self._given, self._loaded = given, {}  # type: ignore[var-annotated]

    def __call__(self, run: "Run") -> "TokenDecoder | None":
        name = self._given or (run.model["name"] if run.model["name"] in _EMBEDDED else None)
        if name is None:
            return None
        if name not in self._loaded:
            from wedlm.model.formats.tokenizer import load_tokenizer

            self._loaded[name] = load_tokenizer(name)
        return self._loaded[name]


def compare(
    a: Annotated[Path, typer.Argument(help="A point-<key>.json, or a folder with a single one.")],
    b: Annotated[Path, typer.Argument(help="The run to compare it with.")],
    texts: Annotated[int, typer.Option(help="Differing answers to print per task.")] = 5,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare two runs question by question, with McNemar's exact test.

    \b
    Examples:
    wedlm compare results/point-0123456789abcdef.json results/point-fedcba9876543210.json
    wedlm compare ./results-verified ./results-ar --texts 20
    """
    with plain_errors(debug):
        from wedlm.evaluate.compare import compare_runs

        if texts < 0:
            raise ValueError(f"--texts is {texts}; expected 0 or more")
        first, second = _one_run(a), _one_run(b)
        write(f"A  {first.model_label}, {first.label}\nB  {second.model_label}, {second.label}\n")
        for name, comparison in compare_runs(first, second).items():
            _tell(name, comparison, texts)


def _one_run(path: Path) -> "Run":
    from wedlm.evaluate.result_folder import read_run, read_runs

    if not path.is_dir():
        return read_run(path)
    runs = read_runs([path])
    if len(runs) > 1:
        names = "; ".join(f"{run.path.name} ({run.label})" for run in runs)
        raise ValueError(f"{path} has {len(runs)} runs; expected one of its files: {names}")
    return runs[0]


def _tell(name: str, comparison: "Comparison", texts: int) -> None:
    write(f"\n{name}, {comparison.num_questions} questions\n")
    for label, count in (
        ("both right", comparison.both),
        ("only A", comparison.only_a),
        ("only B", comparison.only_b),
        ("neither", comparison.neither),
    ):
        write(f"  {label:<12}{count:>6}  {100 * count / comparison.num_questions:5.1f} %\n")
    write(f"  B less A    {100 * comparison.difference:+.1f} points, p = {comparison.p_value:.3g} (McNemar, exact)\n")
    write(f"  same text   {100 * comparison.same_text:.1f} %, {len(comparison.differing)} differ\n")
    if comparison.num_unpaired:
        note(f"{comparison.num_unpaired} samples are of questions that only one run answered; they are left out")
    if comparison.num_other_prompts:
        note(f"{comparison.num_other_prompts} questions were put in different words to A and B", "yellow")
    for x, y in comparison.differing[:texts]:
        write(f"\n  question {x.doc_id}\n")
        for run, sample in (("A", x), ("B", y)):
            write(f"    {run} {'right' if sample.correct else 'wrong'}: {_clip(sample.text)}\n")


def _clip(text: str) -> str:
    text = text.encode(errors="replace").decode().strip().replace("\n", "\n             ")
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
