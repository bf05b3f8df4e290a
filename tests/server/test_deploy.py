# SPDX-License-Identifier: Apache-2.0
"""docs/server.md's examples are run; it, the dashboard and the unit name only what exists."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from tests.server.running import MODEL, Running
from wedlm.cli.serve import serve
from wedlm.server.protocol import ChatRequest, CompletionRequest, Message

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/server.md").read_text()
IMAGE = (ROOT / "deploy/Dockerfile").read_text()
ADDRESS = "http://127.0.0.1:8000"


def block(beginning: str) -> str:
    """The fenced block of the page that begins so, asking for the tests' model."""
    (found,) = [text for text in re.findall(r"```\w+\n(.*?)```", PAGE, re.DOTALL) if text.startswith(beginning)]
    return found.replace('"demo"', f'"{MODEL}"')


def test_curl_example(running: Running):
    words = shlex.split(block("curl").replace(ADDRESS, running.url).replace("\\\n", " "))
    answer = json.loads(subprocess.run([*words, "-sS"], capture_output=True, check=True, timeout=60).stdout)
    ended = answer["choices"][0]["finish_reason"] == "stop"  # at temperature 1 an end token may come first
    assert answer["usage"]["completion_tokens"] == 64 or (ended and 0 < answer["usage"]["completion_tokens"] < 64)


def test_python_example(running: Running, capsys: pytest.CaptureFixture[str]):
    namespace: dict = {}
    exec(block("from openai").replace(ADDRESS, running.url), namespace)
    namespace["client"].close()
    assert "p_cache" in capsys.readouterr().out


@pytest.fixture(scope="module")
def metric_names(running: Running) -> set[str]:
    assert running.text("abc")
    return set(re.findall(r"^(wedlm_\w+)", running.http.get("/metrics").text, re.MULTILINE))


def test_dashboard(metric_names):
    board = json.loads((ROOT / "deploy/grafana.json").read_text())
    expressions = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    assert set(re.findall(r"wedlm_\w+", expressions)) <= metric_names
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) == 12


def test_metrics_of_the_page(metric_names):
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.split("| metric ")[1].split("\n\n")[0], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)", row) if not name.startswith("_")}
    exported = {name.removeprefix("wedlm_") for name in metric_names}
    missing = {name for name in named if name not in exported and f"{name}_count" not in exported}
    assert not missing
    assert len(named) > 15


def test_options_of_unit_and_image():
    app = typer.Typer()
    app.command()(serve)
    parameters = typer.main.get_command(app).params
    known = {option for parameter in parameters for option in parameter.opts}
    unit = (ROOT / "deploy/wedlm.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)", unit, re.MULTILINE)
    entry = " ".join(re.findall(r"^(?:ENTRYPOINT|CMD) (.*)", IMAGE, re.MULTILINE))
    assert set(re.findall(r"--[a-z-]+", start + entry)) <= known
    prose = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert prose <= known | {"--help"}


def test_the_image_copies_what_there_is():
    """Each file is in the context that .dockerignore leaves, each stage is one that stands above, and what the wheel is
    built of is what tests/test_install.py builds it of."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for words in re.findall(r"^COPY (.*) \S+$", IMAGE, re.MULTILINE) for word in words.split()}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", IMAGE, re.MULTILINE)
    assert [name for _, name in stages] == ["build", "base", "cuda", "cpu"], "the last one is built by default"
    names: set[str] = set()
    for source, name in stages:
        assert source in names or source.startswith("python:3.12")
        names.add(name)
    assert set(re.findall(r"from=(\w+)", IMAGE)) <= names


def test_the_compose_file():
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    assert set(services) == {"cpu", "cuda"}
    for name, service in services.items():
        assert service["build"]["target"] == name
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert (ROOT / "deploy" / service["build"]["context"]).resolve() == ROOT
        assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert "deploy" not in services["cpu"]
    assert services["cuda"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_every_field_is_in_the_page():
    for model in (ChatRequest, CompletionRequest, Message):
        for name in model.model_fields:
            assert f"`{name}" in PAGE or name in ("model", "messages", "prompt", "role", "content", "name"), name
