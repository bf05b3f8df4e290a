# SPDX-License-Identifier: Apache-2.0
"""What asks for nothing is accepted: each entry of the table, and what is empty; documented from the same table."""

from pathlib import Path

import pytest

from tests.server.asking import CHAT, MESSAGES, TEXT, ask, check_error
from tests.server.running import Running, events
from wedlm.server.neutral import ANYTHING, TABLE, UNSUPPORTED, Neutral, written

MANY = ["x", 5, {"a": [None]}, False]  # what a field may have whose value has no effect
TEXT_PART = {"type": "text", "text": "Hi"}
ANSWER = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def placed(place: str, fields: dict) -> tuple[str, dict]:
    """A request with ``fields`` at ``place``: its address, and what it has beside a prompt."""
    tool = {"type": "function", "function": {"name": "f"}}
    others = {
        "request": (TEXT, fields),
        "completion": (TEXT, fields),
        "chat": (CHAT, fields),
        "stream_options": (CHAT, {"stream": True, "stream_options": fields}),
        "message": (CHAT, {"messages": [{**MESSAGES[0], **fields}]}),
        "part": (CHAT, {"messages": [{"role": "user", "content": [{**TEXT_PART, **fields}]}]}),
        "tool": (CHAT, {"tools": [{**tool, **fields}], "tool_choice": "none"}),
        "responses": ("/v1/responses", {"input": "Hi", "max_output_tokens": 2, **fields}),
        "item": ("/v1/responses", {"input": [{**MESSAGES[0], **fields}], "max_output_tokens": 2}),
        "reasoning": ("/v1/responses", {"input": "Hi", "max_output_tokens": 2, "reasoning": fields}),
        "anthropic": ("/v1/messages", {"messages": MESSAGES, "max_tokens": 2, **fields}),
        "block": (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{**TEXT_PART, **fields}]}], "max_tokens": 2},
        ),
        "thinking": (
            "/v1/messages",
            {"messages": MESSAGES, "max_tokens": 2, "thinking": {"type": "disabled", **fields}},
        ),
        "ollama": ("/api/generate", {"prompt": "Hi", "options": {"num_predict": 2}, **fields}),
        "ollama_options": ("/api/generate", {"prompt": "Hi", "options": {"num_predict": 2, **fields}}),
        "call": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{**ANSWER, **fields}]}]}),
    }
    return others[place]


def send(running: Running, path: str, fields: dict):
    return ask(running, path, **fields) if path in (CHAT, TEXT) else running.post(path, fields)


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: f"{entry.place} {entry.names[:20]}")
def test_the_table(running: Running, entry: Neutral):
    names = entry.names.split()
    for value in (None, *(MANY if entry.values is ANYTHING else entry.values)):
        path, fields = placed(entry.place, dict.fromkeys(names, value))
        answer = send(running, path, fields)
        assert answer.status_code == 200, (value, answer.text)
    if entry.values is not ANYTHING:
        for name in names:
            path, fields = placed(entry.place, {name: 12345})
            answer = send(running, path, fields)
            assert answer.status_code == 400
            assert f"{name} is 12345; {entry.otherwise}" in answer.json().get("error", answer.text).__str__()


@pytest.mark.parametrize("place", ["request", "chat", "message", "part", "tool", "call", "stream_options"])
def test_empty_fields_of_any_name(running: Running, place: str):
    for value in (None, "", [], {}):
        path, fields = placed(place, {"unheard_of": value})
        answer = ask(running, path, **fields)
        assert answer.status_code == 200, answer.text
    for value in (0, False, "x"):  # of an unknown field nothing is known
        path, fields = placed(place, {"unheard_of": value})
        code = check_error(ask(running, path, **fields))["code"]
        assert code == ("invalid_value" if place == "part" else "unknown_field")  # what a part is, its type says


def test_neutral_values_of_known_fields(running: Running):
    common = {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "n": 1, "stop": None}
    chat = {"parallel_tool_calls": True, "logprobs": False, "top_logprobs": None, "response_format": {"type": "text"}}
    chat |= {"tools": [], "tool_choice": "none", "stream": False, "stream_options": None, "max_tokens": 2}
    assert ask(running, CHAT, **common, **chat).status_code == 200
    assert ask(running, TEXT, **common, logprobs=None).status_code == 200


def test_fields_are_in_the_document(running: Running):
    schemas = running.http.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["metadata"] == {"description": "Has no effect"}
    assert "modalities" in schemas["ChatRequest"]["properties"]
    assert "modalities" not in schemas["CompletionRequest"]["properties"]


def test_earlier_reasoning_goes_to_the_template(running: Running):
    from wedlm.server.messages import Message

    for name in ("reasoning", "reasoning_content"):
        message = Message.model_validate({"role": "assistant", "content": "4", name: "2 and 2"})
        assert message.for_template() == {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}


def test_usage_in_every_chunk(running: Running):
    """What guidellm asks for."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "stream": True, "stream_options": options}
    *chunks, last = events(running.post(CHAT, body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[1:]]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 9
    assert chunks[-1]["usage"]["total_tokens"] == last["usage"]["total_tokens"]


def test_a_name_has_one_sentence():
    for entry in TABLE:
        assert all(UNSUPPORTED.get(name, "") == entry.otherwise for name in entry.names.split() if entry.otherwise)


def test_the_documentation_has_the_table():
    page = Path("docs/server.md").read_text(encoding="utf-8")
    assert page == written(page)
