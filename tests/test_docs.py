# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows is run: Python blocks, the notebook, and `wedlm` lines' options."""

import re
import runpy
import shlex
from pathlib import Path

import nbformat
import pytest
import typer
from nbclient import NotebookClient

import wedlm
from wedlm.bench.laptop_report import headline, report
from wedlm.bench.record import read_record
from wedlm.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(file:line, text) of every fenced block of a language."""
    return [
        (f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 2}", match.group(1))
        for page in PAGES
        for match in re.finditer(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    ]


@pytest.mark.demo_model
def test_python_blocks_run(capsys):
    """In order, in one namespace per page, as a reader would type them."""
    python = blocks("python")
    assert python
    spaces: dict[str, dict] = {}
    for where, code in python:
        exec(compile(code, where, "exec"), spaces.setdefault(where.split(":")[0], {"__name__": "docs"}))
    assert capsys.readouterr().out


def test_the_laptop_table_is_that_of_the_report():
    """Made by one command, which docs/benchmarks.md names; the report beside it is of the same run."""
    folder = ROOT / "benchmarks/results/laptop"
    values = read_record(folder)
    shown = (ROOT / "README.md").read_text().split("<!-- laptop: ")[1].split("-->\n")[1].split("<!-- end")[0]
    assert shown.strip() == headline(values)
    assert (folder / "report.md").read_text() == report(values)


def test_the_models_page_has_what_the_script_computes():
    path = ROOT / "benchmarks/model_memory.py"
    values = runpy.run_path(str(path))
    page = (ROOT / "docs/models.md").read_text()
    for mark, table in (("memory", values["memory_table"]()), ("cards", values["card_table"]())):
        assert page.split(f"<!-- {mark} -->\n")[1].split("\n<!-- end")[0] == table
    eight = values["SHAPES"]["WeDLM-8B (Qwen3-8B)"]
    assert eight.linear + eight.others == 8_190_735_360  # as Qwen3-8B's files count


def test_the_reference_has_all_that_is_public():
    page = (ROOT / "docs/api.md").read_text()
    assert all(f"::: wedlm.{name}\n" in page for name in wedlm.__all__)


def test_shell_lines_name_options_that_exist():
    command = typer.main.get_command(app)
    shell = [block.replace("\\\n", " ") for _, block in blocks("(?:bash|sh|console)")]
    lines = [line for block in shell for line in block.splitlines()]
    wedlm_lines = [shlex.split(line.removeprefix("$ ")) for line in lines if re.match(r"(\$ )?wedlm ", line)]
    assert wedlm_lines
    for words in wedlm_lines:
        sub = command.commands[words[1]]  # type: ignore[attr-defined]
        known = {option for parameter in sub.params for option in [*parameter.opts, *parameter.secondary_opts]}
        assert {word for word in words[2:] if word.startswith("--")} <= known, words


def test_relative_links_exist():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_quickstart_notebook():
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "Paris" in printed
    assert "p_cache" in printed
