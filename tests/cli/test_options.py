# SPDX-License-Identifier: Apache-2.0
"""Groups of options: dataclasses that a command takes whole, and typer sees as one option for each field."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner, Result

from wedlm.cli.options import Only, changed, command, option, values_of


@dataclass(frozen=True, kw_only=True)
class Colour:
    name: Annotated[str, typer.Argument()]
    bright: Annotated[bool, option("So bright [1].", "Looks", "--bright/--dull")] = False


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Declared where no command line is known, as the engine's options are."""

    kind: Literal["big", "small"] | None = field(default=None, metadata={"help": "big or small."})
    wedlm_size: int = field(default=4, metadata={"help": "Its size."})
    hidden: int = field(default=7, metadata={"help": "Not a user's."})

    def __post_init__(self) -> None:
        if self.kind not in (None, "big", "small"):
            raise ValueError(f"kind is {self.kind!r}; expected big or small")


def run(*words: str) -> tuple[Result, list]:
    calls = []
    app = typer.Typer()

    @app.command()
    @command
    def show(*, colour: Colour, times: int = 1, machine: Annotated[Machine, Only("kind", "wedlm_size")]) -> None:
        """Show it."""
        calls.append((colour, times, machine))

    return CliRunner().invoke(app, words), calls


def test_groups_are_filled():
    result, calls = run("red")
    assert result.exit_code == 0, result.output
    assert calls == [(Colour(name="red"), 1, Machine())]
    _, calls = run("red", "--bright", "--times", "3", "--size", "5", "--kind", "small")
    assert calls == [(Colour(name="red", bright=True), 3, Machine(kind="small", wedlm_size=5))]


def test_help_is_the_fields():
    text = " ".join(run("--help")[0].stdout.split())
    for words in ("Show it.", "So bright [1].", "--bright", "--dull", "big or small.", "--size", "Looks", "--debug"):
        assert words in text
    assert "hidden" not in text


@pytest.mark.parametrize("words", [["red", "--hidden", "1"], ["red", "--wedlm-size", "1"], []])
def test_what_is_not_there_is_typers_error(words):
    result, calls = run(*words)
    assert (result.exit_code, calls) == (2, [])


def test_a_groups_own_check_is_one_sentence():
    result, calls = run("red", "--kind", "huge")
    assert (result.exit_code, result.stderr, calls) == (2, "error: kind is 'huge'; expected big or small\n", [])
    assert isinstance(run("red", "--kind", "huge", "--debug")[0].exception, ValueError)


def test_values():
    colour, machine = Colour(name="red"), Machine(wedlm_size=5)
    assert values_of(colour, machine) == {"name": "red", "bright": False, "kind": None, "wedlm_size": 5, "hidden": 7}
    assert changed(machine) == {"wedlm_size": 5}
