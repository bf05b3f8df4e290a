# SPDX-License-Identifier: Apache-2.0
"""``wedlm report``: shows results of ``wedlm eval`` as a page."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wedlm.cli.options import command
from wedlm.cli.terminal import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wedlm.evaluate.report import Section, TokenDecoder
    from wedlm.evaluate.result_folder import Run
    from wedlm.plotting import Plot

# Names under which a model's own tokenizer is at hand without asking the user.
_EMBEDDED = ("demo", "demo-base")


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """Which figures to draw, and where."""

    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw figures (needs matplotlib).")] = True
    seconds: Annotated[
        bool,
        typer.Option(
            "--seconds/--no-seconds",
            help="Draw tokens a second, too; leave them out if the machine did other work at the same time.",
        ),
    ] = True
    figures: Annotated[Path | None, typer.Option(help="Also write each figure into this folder, as an SVG file.")] = (
        None
    )


@command
def report(
    *,
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
    drawing: _Drawing,
) -> None:
    """Write report.html, a self-contained page, and report.md with its tables.

    \b
    Examples:
    wedlm report ./results
    wedlm report ./results ./results-base --baseline demo-base --output ./report
    """
    from wedlm.evaluate.plots import draw_plots
    from wedlm.evaluate.report import build_sections, choose_baseline
    from wedlm.evaluate.report_page import html_page, markdown_page
    from wedlm.evaluate.result_folder import read_runs

    if examples < 0:
        raise ValueError(f"--examples is {examples}; expected 0 or more")
    if drawing.figures is not None and not drawing.plots:
        raise ValueError(f"--figures is {drawing.figures}; expected no such option with --no-plots")
    runs = read_runs(folders)
    chosen = None if baseline is None else choose_baseline(runs, baseline)
    sections = build_sections(runs, chosen, examples, _Decoders(tokenizer))
    drawn = [draw_plots(section, drawing.seconds) if drawing.plots else [] for section in sections]
    target = output or folders[0]
    target.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.html", html_page(sections, drawn, title, chosen)),
        ("report.md", markdown_page(sections, title, chosen)),
    ):
        # Half of a surrogate pair, which JSON can carry, is not text.
        (target / name).write_text(text, encoding="utf-8", errors="replace")
        note(f"wrote {target / name}")
    if drawing.figures is not None:
        _write_figures(drawing.figures, sections, drawn)


def _write_figures(folder: Path, sections: "Sequence[Section]", drawn: "Sequence[Sequence[Plot]]") -> None:
    """Write one file per section and figure, named after both."""
    folder.mkdir(parents=True, exist_ok=True)
    for section, plots in zip(sections, drawn, strict=True):
        for plot in plots:
            name = "".join(c if c.isalnum() else "-" for c in f"{section.title.split()[0]} {plot.title}".lower())
            (folder / f"{name}.svg").write_text(plot.svg, encoding="utf-8")
            note(f"wrote {folder / f'{name}.svg'}")


class _Decoders:
    """The tokenizer of a run's model, loaded once; None if it is unknown."""

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
