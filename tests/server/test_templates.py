# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's hostile chat template, asked for over HTTP: refused in a sentence, and others are served."""

import sys

import pytest

from tests.attack.files import HOSTILE_TEMPLATES
from tests.server.asking import check_error
from tests.server.running import serving
from wedlm import LLM

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def running(directory):
    with serving(LLM(directory, device="cpu")) as one:
        yield one


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_hostile_templates(running, name):
    """In the thread that renders it; the process has no more memory than before, and goes on."""
    running.model.llm.tokenizer.chat_templates = {"default": HOSTILE_TEMPLATES[name]}
    answer = running.post(CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2})
    if name == "the source":  # long, and harmless
        message = check_error(answer, 400)["message"]
        assert "the prompt has 0 tokens" in message
    else:
        message = check_error(answer, 400)["message"]
        assert message.startswith("the chat template ")
    assert "\n" not in message
    assert running.http.get("/health").json() == {"status": "ok"}
    assert running.text("abc", max_tokens=2)


@pytest.fixture
def high_recursion_limit():
    """As torch's compiler leaves it, and more."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("high_recursion_limit")
def test_levels_have_a_limit_of_their_own(running):
    """Jinja took minutes for 2,000 levels where Python did not end it by its limit of recursion."""
    running.model.llm.tokenizer.chat_templates = {"default": HOSTILE_TEMPLATES["blocks"]}
    answer = running.post(CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2})
    assert "levels deep" in check_error(answer, 400)["message"]
