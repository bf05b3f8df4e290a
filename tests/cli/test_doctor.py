# SPDX-License-Identifier: Apache-2.0
"""``wedlm doctor``: a line a fact, whatever is missing or broken."""

import sys

import pytest
import torch

from tests.cli.command import wedlm
from wedlm.cli import doctor
from wedlm.native import is_available, library


def lines() -> dict[str, str]:
    result = wedlm("doctor")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return {line[:14].strip(): line[14:] for line in result.stdout.splitlines()}


def test_every_fact_has_a_line():
    found = lines()
    assert set(doctor.FACTS) | {"[train]", "[serve]", "[hf]", "[eval]", "[workers]"} <= set(found)
    assert not any(fact.startswith("cannot be told") for fact in found.values())
    assert found["torch"].startswith(torch.__version__)
    assert "cores" in found["CPU"]
    assert " GiB" in found["memory"]


def test_the_native_forward_says_what_it_runs_on_or_lacks(monkeypatch):
    if is_available():
        assert lines()["native"].startswith("The native forward runs on ")
    monkeypatch.setattr(library, "_library_file", lambda: None)
    library.load.cache_clear()
    said = lines()["native"]
    assert said.startswith("the native CPU forward was not built: no C++ compiler (g++ or clang++) was found")
    assert said.endswith("a step on a CPU takes several times as long.")
    assert lines()["LLM() runs on"].endswith("plain torch operations")
    library.load.cache_clear()


def test_what_is_chosen_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lines()["LLM() runs on"].startswith("cpu, because torch can use no CUDA device; weights in ")


@pytest.mark.parametrize("name", list(doctor.FACTS))
def test_a_broken_fact_costs_its_own_line_alone(monkeypatch, name):
    def broken() -> str:
        raise RuntimeError("the driver\nsays no")

    monkeypatch.setitem(doctor.FACTS, name, broken)
    found = lines()
    assert found.pop(name) == "cannot be told: RuntimeError: the driver says no"
    extras = [fact for fact in found if fact.startswith("[")]
    assert set(found) - set(extras) == set(doctor.FACTS) - {name}
    assert len(extras) >= 5
    assert not any(fact.startswith("cannot be told") for fact in found.values())


def test_missing_packages_are_named(monkeypatch):
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name in ("uvicorn", "triton") else installed(name))
    found = lines()
    assert found["[serve]"] == f"without uvicorn: {sys.executable} -m pip install 'wedlm[serve]'"
    assert found["[eval]"] == "installed"
    assert found["Triton"].startswith("not installed")


def test_the_cache_and_the_demo_model(monkeypatch, tmp_path):
    """Nothing is fetched, and nothing made."""
    monkeypatch.setenv("WEDLM_CACHE", str(tmp_path / "some" / "where"))
    found = lines()
    assert found["cache"].startswith(f"{tmp_path / 'some' / 'where'} ($WEDLM_CACHE), writable, ")
    assert found["demo model"].startswith("absent")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WEDLM_DEMO_GGUF", "./nowhere.gguf")
    assert lines()["demo model"] == "WEDLM_DEMO_GGUF names ./nowhere.gguf, where there is no file"
    (tmp_path / "model.gguf").write_bytes(b"x" * 10**6)
    monkeypatch.setenv("WEDLM_DEMO_GGUF", str(tmp_path / "model.gguf"))
    assert lines()["demo model"] == f"present, 1 MB at {tmp_path / 'model.gguf'}"
