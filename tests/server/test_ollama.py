# SPDX-License-Identifier: Apache-2.0
"""Ollama's API and the addresses for tokens: the engine's texts, a line for each piece."""

import json
from types import SimpleNamespace

import pytest

from tests.server.running import MODEL, Running
from wedlm import SamplingParams
from wedlm.server.converters.ollama import OllamaChatRequest

MESSAGES = [{"role": "user", "content": "Hello"}]
OPTIONS = {"temperature": 0, "num_predict": 9, "num_ctx": 2048}


def lines(answer) -> list[dict]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}:latest"])
def test_chat(running, reference, name):
    text = reference.chat(MESSAGES, SamplingParams(max_tokens=9))[0].text
    body = {"model": name, "messages": MESSAGES, "options": OPTIONS, "keep_alive": "5m"}
    *parts, last = lines(running.http.post("/api/chat", json=body))
    assert "".join(part["message"]["content"] for part in parts) == text
    assert (last["done"], last["done_reason"], last["eval_count"], last["model"]) == (True, "length", 9, name)
    assert last["prompt_eval_duration"] + last["eval_duration"] <= last["total_duration"] + 1
    assert not any(part["done"] for part in parts)
    whole = running.http.post("/api/chat", json={**body, "stream": False}).json()
    assert (whole["message"], whole["done"]) == ({"role": "assistant", "content": text}, True)


def test_generate(running, reference):
    body = {"prompt": "Hello", "options": OPTIONS, "stream": False}
    text = reference.chat(MESSAGES, SamplingParams(max_tokens=9))[0].text
    assert running.post("/api/generate", body).json()["response"] == text
    raw = running.post("/api/generate", {**body, "raw": True}).json()["response"]
    assert raw == reference.generate("Hello", SamplingParams(max_tokens=9))[0].text
    *parts, last = lines(running.post("/api/generate", {**body, "stream": None, "system": "Be kind."}))
    talk = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    assert "".join(part["response"] for part in parts) == reference.chat(talk, SamplingParams(max_tokens=9))[0].text
    assert last["done"]


def test_formats(running):
    schema = {"type": "object", "properties": {"b": {"enum": ["x"]}}, "required": ["b"], "additionalProperties": False}
    body = {"messages": MESSAGES, "options": {**OPTIONS, "num_predict": 40}, "stream": False}
    answer = running.post("/api/chat", {**body, "format": schema}).json()
    assert json.loads(answer["message"]["content"]) == {"b": "x"}
    assert answer["done_reason"] == "stop"


def test_calls_are_sent_back():
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    talk = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call, call], "thinking": "Hm"},
        {"role": "tool", "content": "3", "tool_name": "add"},
        {"role": "tool", "content": "4"},
    ]

    asked = OllamaChatRequest.model_validate({"model": MODEL, "messages": talk, "think": True})
    body = asked.chat(SimpleNamespace(names=[MODEL])).body
    _, assistant, *results = [message.for_template() for message in body.messages]
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert [call["id"] for call in assistant["tool_calls"]] == [result["tool_call_id"] for result in results]
    assert assistant["reasoning_content"] == "Hm"
    assert body.reasoning_effort == "medium"
    assert (body.temperature, body.top_k, body.top_p) == (0.8, 40, 0.9)


def test_calls_come_as_objects(running):
    """By a text that is one: the model of the tests writes none."""
    from wedlm.server.converters.ollama import OllamaForm
    from wedlm.server.readers import Delta

    call = {"id": "c", "function": {"name": "add", "arguments": '{"a": 1}'}}
    part = OllamaForm("chat", MODEL).part(Delta("", [call]))
    assert part["message"]["tool_calls"] == [{"function": {"name": "add", "arguments": {"a": 1}}}]


def test_what_clients_ask_first(running):
    (model,) = running.http.get("/api/tags").json()["models"]
    assert model["model"] == MODEL
    assert running.http.get("/api/version").json()["version"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "word"),
    [
        ("/api/chat", {"messages": []}, 400, "messages"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, 400, "images"),
        ("/api/chat", {"messages": MESSAGES, "options": {"temperature": -1}}, 400, "temperature"),
        ("/api/chat", {"messages": MESSAGES, "options": {"mirostat": 1}}, 400, "mirostat"),
        ("/api/chat", {"messages": MESSAGES, "model": "llama3"}, 404, "llama3"),
        ("/api/generate", {"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ("/api/generate", {"prompt": "x", "raw": True, "system": "y"}, 400, "raw"),
    ],
)
def test_refusals(running, path, fields, status, word):
    answer = running.post(path, fields)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert word in answer.json()["error"]


def test_tokens(running: Running, reference):
    ids = reference.tokenizer.encode("Hello")
    answer = running.post("/tokenize", {"prompt": "Hello", "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"]) == (ids, len(ids))
    assert "".join(answer["token_strs"]) == "Hello"
    assert running.http.post("/tokenize", json={"content": "Hello"}).json()["tokens"] == ids
    chat = running.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert reference.tokenizer.decode(chat, False) == "<|user|>Hello<|assistant|>"
    bare = running.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()["tokens"]
    assert bare == chat[: len(bare)]
    assert running.post("/detokenize", {"tokens": chat}).json()["prompt"] == "<|user|>Hello<|assistant|>"
    for path, body in [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "x"}]}),
        ("/detokenize", {"tokens": [99_999]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["x"]}),
    ]:
        assert running.post(path, body).status_code == 400, (path, body)
