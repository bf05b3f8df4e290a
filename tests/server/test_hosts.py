# SPDX-License-Identifier: Apache-2.0
"""By which names, and from which pages, a server without keys lets itself be called."""

import pytest

from tests.server.asking import TEXT, check_error
from tests.server.running import serving

REBOUND = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("10.1.2.3:80", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("localhost", True),
        ("LocalHost:1", True),
        ("wedlm.localhost", True),
        ("box.example:8000", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:80", False),
        ("notlocalhost", False),
        ("[evil.example]", False),
        ("box.example.", False),
    ],
)
def test_names(running_named, host, known):
    answer = running_named.http.get("/v1/models", headers={"Host": host})
    if known:
        assert answer.status_code == 200
    else:
        error = check_error(answer, 403)
        assert (error["code"], error["param"]) == ("unknown_host", "Host")
        assert "--allowed-host" in error["message"]
    assert running_named.http.get("/health", headers={"Host": host}).status_code == 200


@pytest.fixture(scope="module")
def running_named(directory):
    from wedlm import LLM

    llm = LLM(directory, device="cpu")
    with serving(llm, allowed_hosts=("Box.example",), cors_origins=("https://page.example",)) as running:
        yield running


def test_pages(running_named):
    own = running_named.url
    for origin in (own, own.replace("http", "https"), "https://page.example"):
        answer = running_named.post(TEXT, {"prompt": "x", "max_tokens": 1}, Origin=origin)
        assert answer.status_code == 200, answer.text
    for origin in ("null", "http://evil.example", own + "1", "https://page.example.evil.example", ""):
        assert check_error(running_named.post(TEXT, {"prompt": "x"}, Origin=origin), 403)["code"] == "unknown_origin"
    check_error(running_named.post(TEXT, {"prompt": "x"}, **REBOUND), 403)


def test_a_key_and_a_star(directory):
    """Whoever has the key may call the server what he likes."""
    from wedlm import LLM

    llm = LLM(directory, device="cpu")
    with serving(llm, api_keys=("key",)) as running:
        answer = running.post(TEXT, {"prompt": "x", "max_tokens": 1}, Authorization="Bearer key", **REBOUND)
        assert answer.status_code == 200
    with serving(llm, allowed_hosts=("*",)) as running:
        assert running.post(TEXT, {"prompt": "x", "max_tokens": 1}, Host="any.example").status_code == 200
