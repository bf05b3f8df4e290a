# SPDX-License-Identifier: Apache-2.0
"""The Responses API through OpenAI's client: texts of the engine, conversations that go on, events by their names."""

import json
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.asking import ADD_SCHEMA, check_error
from tests.server.running import MODEL, Running, serving
from wedlm import LLM, SamplingParams
from wedlm.server.config import ServerConfig
from wedlm.server.converters.responses import ResponsesRequest, ResponseStore, Stored
from wedlm.server.prompts import Prompts

PATH = "/v1/responses"
ADD = {"type": "function", "name": "add", "parameters": ADD_SCHEMA}


@pytest.fixture(scope="module")
def running(roomy: LLM) -> Iterator[Running]:
    with serving(roomy) as one:
        yield one
        one.settled()


def reply(reference: LLM, messages: list[tuple[str, str]], **options) -> str:
    return reference.chat([{"role": r, "content": c} for r, c in messages], SamplingParams(**options))[0].text


def test_an_answer_and_what_goes_on_from_it(client, reference):
    """Instructions are of one request; the conversation is kept, and what is forgotten is unknown."""
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 9}
    first = client.responses.create(**asked, input="Hello", instructions="Be kind.")
    assert first.output_text == reply(reference, [("system", "Be kind."), ("user", "Hello")], max_tokens=9)
    assert first.usage.output_tokens_details.reasoning_tokens == 0
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    short = client.responses.create(model=MODEL, input="x", max_output_tokens=2, extra_body={"ignore_eos": True})
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    second = client.responses.create(**asked, input="More", previous_response_id=first.id)
    talk = [("user", "Hello"), ("assistant", first.output_text), ("user", "More")]
    assert second.output_text == reply(reference, talk, max_tokens=9)
    again = [*first.output, {"role": "user", "content": [{"type": "input_text", "text": "More"}]}]
    items = [
        {"role": "user", "content": "Hello"},
        *(item if isinstance(item, dict) else item.to_dict() for item in again),
    ]
    assert client.responses.create(**asked, input=items).output_text == second.output_text
    named = [items[0], {"type": "item_reference", "id": first.output[0].id}, items[2]]
    assert client.responses.create(**asked, input=named).output_text == second.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    for call in (
        lambda: client.responses.retrieve(first.id),
        lambda: client.responses.delete(first.id),
        lambda: client.responses.create(**asked, input="x", previous_response_id=first.id),
        lambda: client.responses.create(**asked, input=named),
    ):
        with pytest.raises(openai.NotFoundError, match="is not stored"):
            call()
    loose = client.responses.create(**asked, input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(loose.id)


def test_events_by_their_names(client, reference):
    asked = {"model": MODEL, "input": "Hello", "temperature": 0, "max_output_tokens": 12}
    events = list(client.responses.create(**asked, stream=True))
    names = [event.type.removeprefix("response.") for event in events]
    assert names[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert names[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(names[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = reply(reference, [("user", "Hello")], max_tokens=12)
    assert "".join(event.delta for event in events if event.type.endswith(".delta")) == text
    assert events[-1].response.output_text == text
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert client.responses.retrieve(events[-1].response.id).output_text == text  # stored, too


@pytest.mark.parametrize("stream", [False, True])
def test_calls(client, stream):
    asked = {"model": MODEL, "input": "Hello", "tools": [ADD], "tool_choice": "required", "max_output_tokens": 80}
    if stream:
        events = list(client.responses.create(**asked, stream=True, extra_body={"seed": 3}))
        names = [event.type.removeprefix("response.") for event in events]
        assert names[2] == "output_item.added"
        assert names[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
        answer = events[-1].response
        pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert "".join(pieces) == answer.output[0].arguments
    else:
        answer = client.responses.create(**asked, extra_body={"seed": 3})
    (call,) = answer.output
    assert (call.type, call.name, answer.status) == ("function_call", "add", "completed")
    assert 0 <= json.loads(call.arguments)["a"] <= 9
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    after = client.responses.create(model=MODEL, input=[result], previous_response_id=answer.id, max_output_tokens=3)
    assert after.output_text


def test_the_clients_helpers(client):
    class Answer(BaseModel):
        digit: int = Field(ge=0, le=9)

    asked = {"model": MODEL, "input": "Hello", "max_output_tokens": 60}
    assert 0 <= client.responses.parse(**asked, text_format=Answer).output_parsed.digit <= 9
    with client.responses.stream(**asked, text_format=Answer) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.output_parsed.digit == json.loads("".join(deltas))["digit"]


def test_reasoning_is_an_item(running, monkeypatch):
    """The text is read as a model's would be that thinks: by a template that opens the reasoning."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}<think>"
    monkeypatch.setattr(running.model.llm.tokenizer, "chat_templates", {"default": source})
    monkeypatch.setattr(running.model, "prompts", Prompts(running.model.llm, ServerConfig()))
    body = {"input": "Hello", "temperature": 0, "max_output_tokens": 9}
    answer = running.post(PATH, body).json()
    assert [item["type"] for item in answer["output"]] == ["reasoning"]
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    stream = running.post(PATH, {**body, "stream": True}).text
    for name in ("output_item.added", "reasoning_text.delta", "reasoning_text.done", "output_item.done", "incomplete"):
        assert f"event: response.{name}\n" in stream


def messages_of(items: list, **fields) -> list[dict]:
    class Holder:
        responses = ResponseStore()

    body = ResponsesRequest.model_validate({"model": MODEL, "input": items, **fields}).chat(Holder()).body
    return [{**message.model_dump(exclude_none=True), **message.for_template()} for message in body.messages]


def test_items_become_messages():
    call = {
        "type": "function_call",
        "call_id": "c1",
        "name": "add",
        "arguments": "{}",
        "id": "fc",
        "status": "completed",
    }
    thought = {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}
    items = [
        {"role": "user", "content": "Hi"},
        thought,
        {"type": "message", "role": "assistant", "id": "m", "content": [{"type": "output_text", "text": "I add."}]},
        call,
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "function_call_output", "call_id": "c2", "output": "4"},
    ]
    user, assistant, *results = messages_of(items)
    assert user["content"] == "Hi"
    assert (assistant["content"], assistant["reasoning_content"]) == ("I add.", "Hm")
    assert [one["id"] for one in assistant["tool_calls"]] == ["c1", "c2"]
    assert [(one["role"], one["content"]) for one in results] == [("tool", "3"), ("tool", "4")]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("input", 5, "input"),
        ("input", [], "messages"),
        ("input", [{"role": "wizard", "content": "x"}], "input"),
        ("input", [{"type": "computer_call"}], "input"),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input"),
        ("tools", [{"type": "web_search"}], "tools[0].type"),
        ("tool_choice", "required", "tool_choice"),
        ("max_output_tokens", 0, "max_tokens"),
        ("background", True, "background"),
        ("include", ["message.output_text.logprobs"], "include"),
        ("conversation", "c", "conversation"),
        ("text", {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}, "response_format"),
        ("n", 2, "n"),
        ("unheard_of", 1, "unheard_of"),
    ],
)
def test_refusals(running, field, value, param):
    error = check_error(running.post(PATH, {"input": "Hello", "max_output_tokens": 2, field: value}))
    assert error["param"] == param


def test_the_store_is_bounded():
    def stored(name: str, size: int) -> Stored:
        return Stored([{"type": "message", "id": f"m-{name}", "of": name, "content": "x" * size}], b"{}")

    store = ResponseStore(max_bytes=10_000, max_count=5)
    for i in range(40):
        store.put(f"r{i}", stored(f"r{i}", 100))
    assert len(store._stored) == 5
    store.get("r36")  # used lately
    store.put("large", stored("large", 9_300))
    assert {"r36", "large"} <= set(store._stored)
    assert "r35" not in store._stored
    assert store._num_bytes <= 10_000
    assert store.item("m-r36")["content"] == "x" * 100
    store.put("too large", stored("too large", 20_000))
    assert not store._stored
    assert not store._owner
    assert store._num_bytes == 0
