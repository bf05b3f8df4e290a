# SPDX-License-Identifier: Apache-2.0
"""A tiny model behind a server, for the tests of a module; and a browser, for those of the demo page."""

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.engine.tiny_llm import save_tiny
from tests.server.browsing import CHROMIUM, SlowRunner, chromium_options, fresh
from tests.server.running import Running, serving
from wedlm import LLM


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    """For a server of the test's own."""
    return LLM(directory, device="cpu", max_num_seqs=16)


@pytest.fixture(scope="module")
def reference(directory: Path) -> LLM:
    """For what the texts must be."""
    return LLM(directory, device="cpu")


@pytest.fixture(scope="module")
def running(directory: Path) -> Iterator[Running]:
    with serving(LLM(directory, device="cpu", max_num_seqs=16)) as one:
        yield one
        one.settled()


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """With room for prompts that tell of tools, one character a token; for a server of the module's own."""
    return LLM(save_tiny(tmp_path_factory.mktemp("roomy"), max_position_embeddings=1024), device="cpu", max_num_seqs=4)


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    """OpenAI's, of the module's server."""
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("WEDLM_REQUIRE_BROWSER") == "1":
            pytest.fail("no chromium was found, and WEDLM_REQUIRE_BROWSER=1 asks for one")
        pytest.skip("no chromium was found (apt-get install chromium); WEDLM_REQUIRE_BROWSER=1 makes this a failure")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=chromium_options())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Running]:
    """Like ``running``, but its steps can be slowed down."""
    llm = LLM(directory, device="cpu", max_num_seqs=16)
    llm.engine.runner = SlowRunner(llm.engine.runner)
    with serving(llm) as one:
        yield one
        one.settled()


@pytest.fixture
def slow(server: Running) -> Iterator[None]:
    server.model.llm.engine.runner.seconds = 0.05
    yield
    server.model.llm.engine.runner.seconds = 0.0


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """The demo page, in a browser that has not seen it before."""
    yield from fresh(browser, server.url)
