# SPDX-License-Identifier: Apache-2.0
"""``wedlm compare``: compares two runs of ``wedlm eval`` question by question."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wedlm.cli.options import command
from wedlm.cli.terminal import note, write

if TYPE_CHECKING:
    from wedlm.evaluate.compare import Comparison
    from wedlm.evaluate.result_folder import Run

_SHOWN_CHARACTERS = 400


@command
def compare(
    a: Annotated[Path, typer.Argument(help="A point-<key>.json, or a folder with a single one.")],
    b: Annotated[Path, typer.Argument(help="The run to compare it with.")],
    texts: Annotated[int, typer.Option(help="Differing answers to print per task.")] = 5,
) -> None:
    """Compare two runs question by question, with McNemar's exact test.

    \b
    Examples:
    wedlm compare results/point-0123456789abcdef.json results/point-fedcba9876543210.json
    wedlm compare ./results-verified ./results-ar --texts 20
    """
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
    difference, half = 100 * comparison.difference, 100 * comparison.half_width
    write(f"  B less A    {difference:+.1f} points (95 %: {difference - half:+.1f} to {difference + half:+.1f}), ")
    write(f"p = {comparison.p_value:.3g} (McNemar, exact)\n")
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
