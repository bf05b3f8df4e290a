# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: its table of commands, help at once, the version, ways to start it."""

import subprocess
import sys

import pytest

from tests.cli.command import wedlm
from wedlm.algorithm.params import DECODINGS
from wedlm.cli import COMMANDS

# Seconds to import, or optional.
SLOW = {
    "torch",
    "transformers",
    "lm_eval",
    "fastapi",
    "uvicorn",
    "matplotlib",
    "gguf",
    "tokenizers",
    "jinja2",
}


@pytest.mark.parametrize(("command", "default"), [("bench", "[demo]"), ("bench", "[all;"), ("chat", "[the model's]")])
def test_help_shows_defaults_in_brackets(command, default):
    text = wedlm(command, "--help").stdout
    assert default in text
    assert "\\" not in text


def test_help_imports_nothing_slow():
    """One process asks for all of it, and says after each what is there."""
    asked = [[], *([name] for name in COMMANDS if name != "train")]
    program = (
        "import sys\n"
        "from wedlm.cli import main\n"
        f"for words in {asked}:\n"
        "    sys.argv = ['wedlm', *words, '--help']\n"
        "    try: main()\n"
        f"    except SystemExit: print('imported:', words, sorted({SLOW} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: ") == len(asked)
    told = [line for line in done.stdout.splitlines() if line.startswith("imported:")]
    assert told == [f"imported: {words} []" for words in asked]


def test_help_teaches():
    text = wedlm("--help").stdout
    assert all(mode in text for mode in DECODINGS)
    for name in COMMANDS:
        assert f" {name} " in text
        if name != "train":  # whose help is its own
            assert f"wedlm {name}" in wedlm(name, "--help").stdout


def test_version():
    assert wedlm("--version").stdout.startswith("wedlm 0.")


@pytest.mark.parametrize(
    "words",
    [
        ["wedlm", "--version"],
        ["wedlm", "train", "--nonsense", "1"],
        ["wedlm.train", "--nonsense", "1"],
    ],
    ids=" ".join,
)
def test_the_package_is_the_command(words):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if "--version" in words:
        assert (done.returncode, done.stdout) == (0, wedlm("--version").stdout)
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert "nonsense is not a setting" in done.stderr
        assert done.stderr.count("\n") == 1


def test_an_unknown_option_is_typers_error():
    assert "No such option" in wedlm("generate", "x", "--frobnicate").stderr


_WRITES = """
import subprocess, sys
from wedlm.cli import app, main
from wedlm.cli.options import command
from wedlm.cli.terminal import note, write
def short() -> None:
    note(f"read {sys.stdin.read()!r}")
    write("text")
    is_open = "import os, sys; [os.fstat(number) for number in range(3)]; sys.exit(0)"
    assert subprocess.run([sys.executable, "-c", is_open]).returncode == 0
app.registered_commands.clear()
app.command("short")(command(short))
app.command("other")(command(short))
sys.argv = ["wedlm", "short"]
main()
"""


@pytest.mark.parametrize("closed", ["<&-", "</dev/null >&-", "<&- >&- 2>&-"])
def test_standard_streams_that_the_caller_closed(closed):
    """They are empty: who reads finds the end, and who writes goes on."""
    run = ["sh", "-c", f'exec "{sys.executable}" -c "$0" {closed}', _WRITES]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "" if ">&- " in f"{closed} ".replace("2>&-", "") else "text")
    assert done.stderr == ("" if "2>&-" in closed else "read ''\n")


def test_a_full_disk_is_named():
    run = ["sh", "-c", f'exec "{sys.executable}" -c "$0" </dev/null >/dev/full', _WRITES]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["error: [Errno 28] No space left on device: 'standard output'"]
