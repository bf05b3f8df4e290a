# SPDX-License-Identifier: Apache-2.0
"""What is wrong, unknown or not supported gets a 4xx that names the field and its value."""

import json

import openai
import pytest

from tests.server.asking import CHAT, MESSAGES, TEXT, ask, check_error
from tests.server.running import MODEL

IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}


def schema_format(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
UNSUPPORTED = [
    (CHAT, "functions", [{"name": "f"}]),
    (CHAT, "function_call", {"name": "f"}),
    (CHAT, "echo", True),
    (CHAT, "suffix", "end"),
    (CHAT, "modalities", ["text", "audio"]),
    (CHAT, "audio", {"voice": "alloy", "format": "wav"}),
    (CHAT, "verbosity", "high"),
    (CHAT, "web_search_options", {}),
    (CHAT, "skip_special_tokens", False),
    (CHAT, "typical_p", True),  # which Python takes for 1
]
INVALID = [
    (CHAT, "repetition_penalty", 0),
    (CHAT, "repetition_penalty", "1.2"),
    (TEXT, "min_p", 1.5),
    (TEXT, "best_of", 0),
    (TEXT, "best_of", 65),
    (TEXT, "prompt_logprobs", 21),
    (TEXT, "prompt_logprobs", -1),
    (TEXT, "echo", "yes"),
    (TEXT, "guided_regex", "("),
    (TEXT, "guided_regex", "x" * 70_000),
    (CHAT, "guided_choice", []),
    (CHAT, "guided_choice", ["a", ""]),
    (CHAT, "guided_grammar", "start: ("),
    (CHAT, "guided_grammar", "root ::= ("),
    (CHAT, "guided_grammar", "root ::= " + "(" * 20_000),
    (CHAT, "guided_json", "no JSON"),
    (CHAT, "structured_outputs", {"regex": "["}),
    (CHAT, "structured_outputs", {"regex": "a", "choice": ["b"]}),
    (CHAT, "structured_outputs", {"structural_tag": "x"}),
    (CHAT, "cache_salt", 5),
    (CHAT, "include_stop_str_in_output", "yes"),
    (CHAT, "reasoning_effort", "a lot"),
    (CHAT, "chat_template_kwargs", {"allow_control_tokens": True}),
    (CHAT, "chat_template_kwargs", {"messages": []}),
    (CHAT, "chat_template_kwargs", {"self": 1}),
    (CHAT, "chat_template_kwargs", {"a": nested(100)}),
    (CHAT, "continue_final_message", True),  # after the user's
    (CHAT, "temperature", -1),
    (CHAT, "temperature", "0.5"),
    (CHAT, "temperature", True),
    (CHAT, "top_p", 0),
    (CHAT, "top_p", 1.5),
    (CHAT, "top_k", 1.5),
    (CHAT, "n", 0),
    (CHAT, "n", 65),
    (CHAT, "seed", 2**63),
    (CHAT, "stop", ""),
    (CHAT, "stop", ["x"] * 17),
    (CHAT, "stop", "x" * 257),
    (CHAT, "max_tokens", 0),
    (TEXT, "max_tokens", -5),
    (CHAT, "decoding", "magic"),
    (CHAT, "wedlm_window_size", 0),
    (CHAT, "wedlm_entropy_threshold", -0.1),
    (CHAT, "wedlm_trace", True),  # without stream
    (CHAT, "stream_options", {"include_usage": True}),
    (CHAT, "messages", []),
    (CHAT, "messages", "Hello"),
    (TEXT, "prompt", []),
    (TEXT, "prompt", {"a": 1}),
    (TEXT, "prompt", ["a", 1]),
    (CHAT, "max_tokens", 3),  # beside another max_completion_tokens
    (CHAT, "logprobs", 3),
    (CHAT, "top_logprobs", 3),  # without logprobs
    (CHAT, "top_logprobs", -1),
    (CHAT, "top_logprobs", 21),
    (TEXT, "stop_token_ids", [99_999]),
    (TEXT, "logprobs", 21),
    (TEXT, "logprobs", True),
    (CHAT, "logit_bias", {"5": 101}),
    (CHAT, "logit_bias", {"5": "x"}),
    (CHAT, "logit_bias", {"99999": 1}),
    (TEXT, "logit_bias", {"a": 10}),
    (TEXT, "logit_bias", {"05": 10}),  # a second name of 5
    (TEXT, "logit_bias", [5]),
    (CHAT, "presence_penalty", 2.5),
    (TEXT, "frequency_penalty", -2.5),
    (CHAT, "response_format", {"type": "xml"}),
    (CHAT, "response_format", "json"),
    (CHAT, "response_format", {"type": "json_schema"}),
    (CHAT, "response_format", {"type": "text", "json_schema": {"name": "x"}}),
    (CHAT, "response_format", schema_format({"type": "nothing"})),
    (CHAT, "response_format", schema_format({"$ref": "https://example.com/schema"})),
    (CHAT, "response_format", schema_format({"type": "integer", "minimum": 2, "maximum": 1})),
    (CHAT, "response_format", schema_format({"type": "array", "uniqueItems": True})),
    (CHAT, "response_format", schema_format({"oneOf": [{"type": "string"}, {"minLength": 1}]})),
    (CHAT, "response_format", schema_format(nested(150))),
    (CHAT, "response_format", schema_format({"enum": ["x" * 66_000]})),
    (CHAT, "tools", [{"type": "retrieval"}]),
    (CHAT, "tools", [{"type": "function", "function": {"name": "not a name"}}]),
    (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}] * 2),
    (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}] * 129),
    (CHAT, "tools", [{"type": "function", "function": {"name": "f", "parameters": nested(100)}}]),
    (CHAT, "tool_choice", "required"),  # without tools
    (CHAT, "tool_choice", "always"),
    (CHAT, "tool_choice", {"type": "function", "function": {"name": "g"}}),
    (CHAT, "unheard_of", 1),
    (CHAT, "wedlm_windowsize", 8),
]


@pytest.mark.parametrize(("path", "field", "value"), UNSUPPORTED + INVALID, ids=lambda v: str(v)[:30])
def test_field_is_refused_by_name_and_value(running, path, field, value):
    error = check_error(ask(running, path, **{field: value}))
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(field)
    assert field in error["message"]
    if isinstance(value, int | float):
        assert str(value).lower() in error["message"].lower()
    if (path, field, value) in UNSUPPORTED:
        assert error["code"] == "unsupported"


def test_messages_say_what_was_wrong(running):
    """No more than that: not the model's own end token beside the one given, not the first line of a longer report."""
    assert "[99999]" in check_error(ask(running, TEXT, stop_token_ids=[99_999]))["message"]
    form = schema_format({"type": "string", "pattern": "("})
    assert "unclosed group" in check_error(ask(running, CHAT, response_format=form))["message"]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}
    assert "expected an object" in check_error(ask(running, CHAT, response_format=form))["message"]
    assert "expected true or false" in check_error(ask(running, CHAT, stream="yes"))["message"]
    assert "top_logprobs is 21" in check_error(ask(running, CHAT, logprobs=True, top_logprobs=21))["message"]


def test_contradictions(running):
    tools = [{"type": "function", "function": {"name": "f"}}]
    form = {"response_format": {"type": "json_object"}, "guided_regex": "a"}
    assert check_error(ask(running, CHAT, **form))["param"] == "response_format"
    assert check_error(ask(running, CHAT, tools=tools, guided_regex="a"))["param"] == "guided_regex"
    assert check_error(ask(running, TEXT, n=3, best_of=2))["param"] == "best_of"
    assert check_error(ask(running, TEXT, best_of=2, stream=True))["param"] == "best_of"
    choice = {"type": "function", "function": {"name": "g"}}
    assert check_error(ask(running, CHAT, tools=tools, tool_choice=choice))["param"] == "tool_choice"
    bad = [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}]
    assert check_error(ask(running, CHAT, tools=bad, tool_choice="required"))["param"] == "tools"


@pytest.mark.parametrize(
    ("message", "path"),
    [
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "assistant", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [IMAGE]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}, "messages[0].content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": "x", "weight": 1}, "messages[0].weight"),
        ("Hello", "messages[0]"),
    ],
)
def test_messages(running, message, path):
    error = check_error(ask(running, CHAT, messages=[message]))
    assert path in error["message"]
    assert error["param"] == path


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe{}",
        b'{"model": "\xff"}',
        b'{"model": "tiny", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"model": "tiny", "prompt": "x", "top_k": ' + b"9" * 10_000 + b"}",
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "\\ud800": 1}',
        b'{"model": "tiny", "prompt": "x", "top_k": "\\udfff"}',
        b'{"model": "tiny", "prompt": [99999999]}',
        b'{"model": "tiny", "prompt": [-1]}',
        b'{"model": "tiny", "prompt": ""}',
        b'{"prompt": "x"}',
    ],
    ids=lambda body: str(body[:40]),
)
def test_bodies_that_are_no_request(running, body):
    for path in (TEXT, CHAT):
        answer = running.http.post(path, content=body, headers={"Content-Type": "application/json"})
        check_error(answer)
    assert running.http.get("/health").status_code == 200


def test_a_form_of_another_site_is_no_request(running):
    """Browsers send text/plain across origins without asking; such a body is not read as JSON. Other programs send what
    they like: curl a form's type, LiteLLM to Ollama's addresses none."""
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1})
    for kind in ("text/plain", "application/x-www-form-urlencoded", None, "application/json"):
        headers = {} if kind is None else {"Content-Type": kind}
        assert running.http.post(TEXT, content=body, headers=headers).status_code == 200, kind
        for page in ({"Origin": running.url}, {"Sec-Fetch-Site": "cross-site"}):
            answer = running.http.post(TEXT, content=body, headers={**headers, **page})
            if kind == "application/json":
                assert answer.status_code == 200
            else:
                assert "Content-Type: application/json" in check_error(answer)["message"]


def test_embeddings_are_elsewhere(running):
    """Clients try them by themselves, and the sentence that they show says what to use instead."""
    said = "there are no embeddings at this server: its models are trained to write text"
    error = check_error(running.http.post("/v1/embeddings", json={"model": MODEL, "input": "x"}), 404)
    assert error["code"] == "not_found"
    assert error["message"].startswith(said)
    assert "a server with an embedding model" in error["message"]
    for address in ("/api/embed", "/api/embeddings"):
        answer = running.http.post(address, json={"model": MODEL, "input": "x"})
        assert (answer.status_code, answer.json()["error"][: len(said)]) == (404, said)


def test_addresses_and_models(running):
    check_error(running.http.get("/nothing"), 404)
    check_error(running.http.get("/../../etc/passwd"), 404)
    check_error(running.http.get(TEXT), 405)
    error = check_error(running.http.post(TEXT, json={"model": "gpt-4o", "prompt": "x"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    body = b'{"model": "\\ud800", "prompt": "x"}'
    assert (
        check_error(running.http.post(TEXT, content=body, headers={"Content-Type": "application/json"}))["code"]
        == "invalid_json"
    )


def test_prompts_longer_than_the_model(running):
    error = check_error(ask(running, TEXT, prompt="x" * 200))
    assert "200 tokens" in error["message"]
    check_error(ask(running, CHAT, messages=[{"role": "user", "content": "x" * 200}]))
    answer = ask(running, TEXT, prompt=["x", "x" * 200], stream=True)
    check_error(answer)  # before the stream begins
    running.settled()


def test_the_client_sees_the_sentence(running):
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    with client, pytest.raises(openai.BadRequestError, match=r"presence_penalty is 2\.5") as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, presence_penalty=2.5)
    assert caught.value.param == "presence_penalty"
    assert caught.value.code == "invalid_value"
