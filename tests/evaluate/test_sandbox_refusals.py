# SPDX-License-Identifier: Apache-2.0
"""What the sandbox refuses without the kernel's help, and its page."""

import re
from pathlib import Path

import pytest

from wedlm.evaluate import sandbox
from wedlm.evaluate.sandbox import Limits, SandboxUnavailable, run_program, run_programs


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seconds", 0),
        ("seconds", float("inf")),
        ("cpu_seconds", float("nan")),
        ("max_processes", 1.5),
        ("memory_bytes", True),
        ("max_output_bytes", -1),
    ],
)
def test_bad_limits_are_told(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
        Limits(**{name: value})


def test_no_workers_are_told():
    with pytest.raises(ValueError, match="workers is 0; expected"):
        run_programs(["pass"], workers=0)


def test_a_jail_that_says_nothing_is_none(tmp_path, monkeypatch):
    jail = tmp_path / "jail.py"
    jail.write_text("import sys; sys.exit(0)")
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    with pytest.raises(SandboxUnavailable, match="its process ended without a word"):
        run_program("pass")


def test_a_jail_that_never_starts_is_given_up(tmp_path, monkeypatch):
    jail = tmp_path / "jail.py"
    jail.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    monkeypatch.setattr(sandbox, "_START_SECONDS", 0.3)
    with pytest.raises(SandboxUnavailable, match="was not ready after"):
        run_program("pass")


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "win32")
    with pytest.raises(SandboxUnavailable, match="does not know win32"):
        run_program("pass")


def test_the_documentation_is_right(capsys):
    """Here, not with the other pages' blocks, because it needs a machine that has the sandbox."""
    try:
        run_program("")
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    expected = re.findall(r"  # (.*)", block)
    exec(compile(block, "sandbox.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == expected
