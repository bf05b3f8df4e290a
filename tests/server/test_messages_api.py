# SPDX-License-Identifier: Apache-2.0
"""Anthropic's API, as its own documents have it: messages, events, errors, counts. Its client is in tests/clients."""

import json
from collections.abc import Iterator

import pytest

from tests.server.asking import ADD_SCHEMA
from tests.server.running import MODEL, Running, serving
from wedlm import LLM, SamplingParams
from wedlm.server.config import ServerConfig
from wedlm.server.converters.anthropic import MessagesRequest
from wedlm.server.prompts import Prompts

PATH = "/v1/messages"
MESSAGES = [{"role": "user", "content": "Hello"}]
ADD = {"name": "add", "input_schema": ADD_SCHEMA}


@pytest.fixture(scope="module")
def running(roomy: LLM) -> Iterator[Running]:
    with serving(roomy, api_keys=("secret",)) as one:
        one.http.headers["x-api-key"] = "secret"
        yield one
        one.settled()


def ask(running: Running, **fields):
    return running.post(PATH, {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, **fields})


def events(answer) -> list[tuple[str, dict]]:
    found = []
    for block in answer.text.strip().split("\n\n"):
        first, second = block.split("\n")
        name, body = first.removeprefix("event: "), json.loads(second.removeprefix("data: "))
        assert body["type"] == name
        found.append((name, body))
    return found


def test_an_answer(running, reference):
    answer = ask(running, system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]).json()
    talk = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    text = reference.chat(talk, SamplingParams(max_tokens=9))[0].text
    assert answer["content"] == [{"type": "text", "text": text}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", MODEL)
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    short = ask(running, max_tokens=2).json()
    assert (short["stop_reason"], short["usage"]["output_tokens"]) == ("max_tokens", 2)
    counted = running.post(f"{PATH}/count_tokens", {"messages": MESSAGES, "system": "Be kind."}).json()
    usage = answer["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_the_stop_sequence_is_told(running, reference):
    full = reference.chat(MESSAGES, SamplingParams(max_tokens=30))[0].text
    stop = full[10:12]
    expected = reference.chat(MESSAGES, SamplingParams(max_tokens=30, stop=[stop, "zzz"]))[0].text
    asked = {"stop_sequences": [stop, "zzz"], "max_tokens": 30}
    answer = ask(running, **asked).json()
    assert (answer["content"][0]["text"], answer["stop_reason"]) == (expected, "stop_sequence")
    assert answer["stop_sequence"] == stop
    found = events(ask(running, **asked, stream=True))
    assert "".join(body["delta"]["text"] for name, body in found if name == "content_block_delta") == expected
    assert found[-2][1]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}


def test_events_in_their_order(running, reference):
    found = events(ask(running, stream=True))
    names = [name for name, _ in found]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    text = "".join(body["delta"]["text"] for name, body in found if name == "content_block_delta")
    assert text == reference.chat(MESSAGES, SamplingParams(max_tokens=9))[0].text
    assert found[0][1]["message"]["usage"]["input_tokens"] > 0
    assert found[-2][1]["usage"]["output_tokens"] == 9


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add"}])
def test_calls(running, choice):
    asked = {"tools": [ADD], "tool_choice": choice, "max_tokens": 80}
    answer = ask(running, **asked).json()
    (block,) = answer["content"]
    assert (block["type"], block["name"], answer["stop_reason"]) == ("tool_use", "add", "tool_use")
    assert 0 <= block["input"]["a"] <= 9
    found = events(ask(running, **asked, stream=True))
    assert found[1][1]["content_block"] | {"id": 0} == {"type": "tool_use", "id": 0, "name": "add", "input": {}}
    pieces = [body["delta"]["partial_json"] for name, body in found if name == "content_block_delta"]
    assert json.loads("".join(pieces)) == block["input"]
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "3"}]}
    talk = [*MESSAGES, {"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
    assert ask(running, messages=talk, tools=[ADD]).status_code == 200


def test_blocks_become_messages():
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm", "signature": ""},
                {"type": "text", "text": "I add."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                {"type": "tool_use", "id": "t2", "name": "add", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "3"},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                {"type": "text", "text": "So?"},
            ],
        },
        {"role": "assistant", "content": "It is"},
    ]
    given = {"model": MODEL, "messages": talk, "max_tokens": 3, "thinking": {"type": "enabled", "budget_tokens": 9}}
    body = MessagesRequest.model_validate(given).chat(None).body
    user, assistant, *rest = [message.for_template() for message in body.messages]
    assert user == {"role": "user", "content": "Hi"}
    assert (assistant["content"], assistant["reasoning_content"]) == ("I add.", "Hm")
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"a": 1}, {}]
    assert [one["content"] for one in rest] == ["3", "Error: no", "So?", "It is"]
    assert body.continue_final_message
    assert body.template_variables == {"enable_thinking": True}


def test_the_last_message_of_the_assistant_is_continued(running, reference):
    answer = ask(running, messages=[*MESSAGES, {"role": "assistant", "content": "I say"}]).json()
    prompt = reference.tokenizer.encode("<|user|>Hello<|assistant|>I say")
    expected = reference.generate(prompt, SamplingParams(max_tokens=9))[0].text
    assert answer["content"][0]["text"] == expected


def test_a_schema(running):
    schema = {"type": "object", "properties": {"b": {"enum": ["x", "y"]}}, "required": ["b"]}
    schema["additionalProperties"] = False
    config = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    answer = ask(running, output_config=config, max_tokens=30).json()
    assert json.loads(answer["content"][0]["text"])["b"] in ("x", "y")


def test_thinking_is_a_block(running, monkeypatch):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}<think>"
    monkeypatch.setattr(running.model.llm.tokenizer, "chat_templates", {"default": source})
    monkeypatch.setattr(running.model, "prompts", Prompts(running.model.llm, ServerConfig()))
    (block,) = ask(running).json()["content"]
    assert block["type"] == "thinking"
    deltas = [body["delta"] for name, body in events(ask(running, stream=True)) if name == "content_block_delta"]
    assert "".join(delta["thinking"] for delta in deltas) == block["thinking"]


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("max_tokens", None, "max_tokens is missing"),
        ("max_tokens", 0, "max_tokens is 0"),
        ("messages", [{"role": "user", "content": [{"type": "image", "source": {}}]}], "messages[0].content"),
        ("tools", [{"name": "a b", "input_schema": {}}], "tools[0].name"),
        ("tool_choice", {"type": "any"}, "tool_choice"),
        ("tool_choice", {"type": "tool", "name": "x"}, "tool_choice"),
        ("unheard_of", 1, "unheard_of"),
    ],
)
def test_refusals(running, field, value, word):
    fields = {"messages": MESSAGES, "max_tokens": 9, field: value}
    answer = running.post(PATH, {name: value for name, value in fields.items() if value is not None})
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert word in error["error"]["message"]


def test_errors_of_other_kinds(running):
    assert ask(running, model="other").json()["error"]["type"] == "not_found_error"
    for path, more in ((PATH, {"max_tokens": 1}), (f"{PATH}/count_tokens", {})):
        answer = running.http.post(path, json={"model": "other", "messages": MESSAGES, **more})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")
    for key in ({"x-api-key": "wrong"}, {"x-api-key": ""}):
        answer = running.http.post(PATH, json={}, headers=key)
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    bearer = {"Authorization": "Bearer secret", "x-api-key": ""}
    assert running.http.post(PATH, json={}, headers=bearer).status_code == 400
