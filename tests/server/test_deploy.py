# SPDX-License-Identifier: Apache-2.0
"""docs/server.md's examples are run; it, the dashboard and the unit name only what exists."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from tests.server.running import MODEL, Running
from wedlm.cli.serve import serve
from wedlm.server.config import KEY_VARIABLE, ServerConfig
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


def stages() -> dict[str, list[str]]:
    """The Dockerfile's instructions by stage, each in one line."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"^#.*\n", "", IMAGE, flags=re.MULTILINE).replace("\\\n", " ").splitlines():
        if line.startswith("FROM "):
            instructions = found.setdefault(line.rpartition(" ")[2], [])
        if line.strip():
            instructions.append(line)
    return found


def is_ignored(path: str) -> bool:
    """As Docker reads .dockerignore: the last pattern that matches the path, or a folder that it is in, decides."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if line and line[0] != "#" and re.fullmatch(f"{pattern}(/.*)?", path):
            ignored = line[0] != "!"
    return ignored


def test_the_image_copies_what_there_is():
    """Each file is in the context that .dockerignore leaves, nothing else is, and each stage stands above its use."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listed.stdout.splitlines()
    copied = [word for words in re.findall(r"^COPY (.*) \S+$", IMAGE, re.MULTILINE) for word in words.split()]
    assert len(copied) > 4
    for source in copied:
        assert any(f"{path}/".startswith(f"{source}/") for path in tracked), source
    needed = {path for path in tracked if any(f"{path}/".startswith(f"{source}/") for source in copied)}
    assert {path for path in tracked if not is_ignored(path)} == needed
    for made in ("src/wedlm/native/_library.cpython-312.so", "src/wedlm/__pycache__/a.pyc", "src/wedlm.egg-info/x"):
        assert is_ignored(made)
    names = list(stages())
    assert names == ["build", "base", "cuda", "cpu"], "the last one is built by default"
    for index, (name, instructions) in enumerate(stages().items()):
        source = instructions[0].split()[1]
        assert source in names[:index] or source == "python:3.12-slim", name
        assert set(re.findall(r"from=(\w+)", " ".join(instructions))) <= set(names[:index])


def test_the_image_installs_what_the_makefile_does():
    """The same torch, from the same place, and extras that there are; nothing runs as root."""
    values = dict(re.findall(r"^(\w+) [?:]= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, index in (("cpu", values["TORCH_CPU"]), ("cuda", r"https://download\.pytorch\.org/whl/cu\d+")):
        lines = stages()[name]
        assert f"ARG TORCH={values['TORCH']}" in lines
        assert re.fullmatch(index, next(line for line in lines if "TORCH_INDEX=" in line).partition("=")[2])
        assert 'RUN pip install --index-url "$TORCH_INDEX" "$TORCH"' in lines
        (asked,) = re.findall(r"/wheels/wedlm-\*\.whl\)\[(.*)\]", " ".join(lines))
        assert {"serve", "traces"} <= set(asked.split(",")) <= set(extras)
        assert lines[-1] == "USER 10001"  # a number, so that a host can see that it is not root


def test_the_image_has_what_triton_needs():
    """A C compiler, and a place to write that is the user's; and so has what fetches checkpoints."""
    base, cuda = (" ".join(stages()[name]) for name in ("base", "cuda"))
    assert re.search(r"apt-get install .* gcc libc6-dev ", cuda)
    (folder,) = re.findall(r"VOLUME (\S+)", base)
    assert f"useradd --create-home --uid 10001 wedlm && mkdir {folder} && chown wedlm {folder}" in base
    places = dict(re.findall(r"(\w+)=(/\S+)", base + cuda))
    for name in ("XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR"):
        assert f"{places[name]}/".startswith(f"{folder}/"), name


def test_the_health_check(running: Running):
    (line,) = (line for line in stages()["base"] if line.startswith("HEALTHCHECK"))
    python, *words = json.loads(line.partition("CMD ")[2])
    assert (python, words[0]) == ("python", "-c")
    for url, code in ((running.url, 0), ("http://127.0.0.1:1", 1)):
        asked = [words[0], words[1].replace(ADDRESS, url)]
        assert subprocess.run([sys.executable, *asked], capture_output=True, timeout=60).returncode == code


def test_the_compose_file():
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    assert set(services) == {"cpu", "cuda"}
    for name, service in services.items():
        assert service["build"]["target"] == name
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert (ROOT / "deploy" / service["build"]["context"]).resolve() == ROOT
        assert service["ports"] == ["127.0.0.1:8000:8000"]
        assert service["volumes"] == ["cache:/cache"]
        assert list(service["environment"]) == [KEY_VARIABLE]
        assert int(service["stop_grace_period"].removesuffix("s")) > ServerConfig().shutdown_timeout_s
    assert "deploy" not in services["cpu"]
    assert services["cuda"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_every_field_is_in_the_page():
    for model in (ChatRequest, CompletionRequest, Message):
        for name in model.model_fields:
            assert f"`{name}" in PAGE or name in ("model", "messages", "prompt", "role", "content", "name"), name
