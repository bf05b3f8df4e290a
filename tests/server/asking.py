# SPDX-License-Identifier: Apache-2.0
"""What the server's tests ask, and what they expect of refusals."""

from tests.server.running import Running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
LONG = {"prompt": "abc", "max_tokens": 120, "ignore_eos": True, "temperature": 0, "decoding": "autoregressive"}
ADD_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}


def ask(running: Running, path: str, **fields):
    base = {"messages": MESSAGES, "max_completion_tokens": 2} if path == CHAT else {"prompt": "Hello", "max_tokens": 2}
    return running.post(path, {**base, **fields})


def check_error(answer, status: int = 400) -> dict:
    """The OpenAI form, and no path and no trace."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in ("Traceback", "site-packages", ".py", "pydantic"):
        assert word not in answer.text
    return error
