# SPDX-License-Identifier: Apache-2.0
"""Real clients against the server, each in a process of its own. Six run in every test run, with a tiny model; all of
them, pinned in requirements.txt and package-lock.json, in the long one, with the embedded model."""

import json
import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.clients import run
from tests.clients.cases import Server
from tests.engine.tiny_llm import save_tiny
from tests.server.running import MODEL, serving
from wedlm import LLM

# In every test run, beside LangChain's (tests/server/test_api.py); each with the module that must be installed.
QUICK = {
    "openai": "openai",
    "anthropic": "anthropic",
    "ollama": "ollama",
    "open-webui": "httpx2",
    "curl": "httpx2",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With room for what clients tell a model, one character a token."""
    directory = save_tiny(tmp_path_factory.mktemp("roomy"), max_position_embeddings=8192)
    with serving(LLM(directory, device="cpu", max_num_seqs=8)) as one:
        yield Server(one.url, MODEL, str(directory))
        one.settled()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where clients are installed: ``WEDLM_CLIENTS``, or a folder that goes with the tests."""
    with run.folder() as folder:
        yield folder


@pytest.mark.parametrize("client", QUICK)
def test_quick(tiny, client, tmp_path):
    if find_spec(QUICK[client]) is None:
        pytest.skip(f"{QUICK[client]} is not installed; make test installs it")
    result = run.run_client(client, tiny, tmp_path, timeout=120)
    assert not result.failed, result.failed


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    with run.serving() as server:
        yield server


@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("client", run.ALL)
def test_long(demo, place, client, record_property):
    result = run.run_client(client, demo, place)
    assert not result.failed, result.failed
    record_property(f"{client} {result.version}", f"{len(result.cases)} cases")


def test_the_report_and_the_documentation_are_of_the_pinned_versions():
    found = run.results()
    assert [one["client"] for one in found] == list(run.ALL), "a client has not been run"
    for one in found:
        assert not one["failed"], one["client"]
        assert one["version"] == run.pinned_version(one["client"]), one["client"]
    assert run.REPORT.read_text(encoding="utf-8") == run.report(found)
    docs = run.DOCS.read_text(encoding="utf-8")
    assert run.documented(docs, found) == docs


def test_what_is_committed_names_no_machine_and_no_registry():
    for path in (run.REPORT, *run.RESULTS.iterdir(), run.HERE / "package-lock.json"):
        text = path.read_text(encoding="utf-8")
        found = re.search(r'127\.0\.0\.1:|/(tmp|work|home|root)/|"resolved"|registry\.|simple/', text)
        assert found is None, f"{found} in {path.name}"


def test_a_failure_is_told(tmp_path, tiny):
    """A client whose cases go wrong is reported so, with those that went well before."""
    result = run.run_client("curl", tiny._replace(model="other"), tmp_path, timeout=60)
    assert "CalledProcessError" in result.failed
    assert result.cases == []
    text = run.report([json.loads(json.dumps(vars(result)))])
    assert "cut short by a failure: curl" in text
    assert "**fails**" in text
    assert os.environ["HOME"] not in text
