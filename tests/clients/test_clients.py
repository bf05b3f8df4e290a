# SPDX-License-Identifier: Apache-2.0
"""Real clients against the server, each in a process of its own. Those that the dev extra has run in every test run;
the others, pinned in requirements.txt, are installed into a folder of their own first."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.clients.cases import CASES
from tests.engine.tiny_llm import save_tiny
from tests.server.running import Running, serving
from wedlm import LLM

HERE = Path(__file__).parent
QUICK = ["openai_client", "anthropic_messages", "ollama_client"]
PACKAGES = {"anthropic_messages": "anthropic", "ollama_client": "ollama", "openai_client": "openai"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With room for what agents tell a model, one character a token."""
    directory = save_tiny(tmp_path_factory.mktemp("roomy"), max_position_embeddings=8192)
    os.environ["WEDLM_CLIENTS_CHECKPOINT"] = str(directory)  # for lm_eval, which counts tokens itself
    with serving(LLM(directory, device="cpu", max_num_seqs=8)) as one:
        yield one
        one.settled()


@pytest.fixture(scope="session")
def site() -> Path:
    """A folder with the packages of requirements.txt, installed once: ``WEDLM_CLIENTS`` or ``build/clients``."""
    folder = Path(os.environ.get("WEDLM_CLIENTS", "build/clients")).resolve()
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]
        subprocess.run([*command, str(folder), "-r", str(HERE / "requirements.txt")], check=True, timeout=1800)
    return folder


def run(case: str, server: Running, *folders: Path, timeout: float = 120) -> None:
    path = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [sys.executable, str(HERE / "cases.py"), case, server.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("case", QUICK)
def test_quick(server, case):
    if find_spec(PACKAGES[case]) is None:
        pytest.skip(f"{PACKAGES[case]} is not installed; make test installs it")
    run(case, server)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_long(server, site, case, record_property):
    run(case, server, site, timeout=600)
    record_property(case, "works")
