# SPDX-License-Identifier: Apache-2.0
"""Tools through OpenAI's client, and the parts: what the prompt says of them, and how calls are read from text."""

import json
from collections.abc import Iterator

import pytest

from tests.server.reading_calls import read
from tests.server.running import MODEL, Running, serving
from wedlm import LLM
from wedlm.model import Tokenizer
from wedlm.server.messages import Message
from wedlm.server.readers import ForcedReader
from wedlm.server.tool_schemas import Tool
from wedlm.server.tools import TemplateTraits, call_schema, for_template, in_plain_words, without_system

MESSAGES = [{"role": "user", "content": "Hello"}]
ADD = {
    "name": "add",
    "description": "Adds",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"$ref": "#/$defs/B"}},
        "required": ["a", "b"],
        "additionalProperties": False,
        "$defs": {"B": {"enum": [1, 2]}},
    },
}
STOP = {"name": "stop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [{"type": "function", "function": ADD}, {"type": "function", "function": STOP}]
MODELS = [Tool.model_validate(tool) for tool in TOOLS]


@pytest.fixture(scope="module")
def running(roomy: LLM) -> Iterator[Running]:
    with serving(roomy) as one:
        yield one
        one.settled()


def check_call(name: str, arguments: str) -> None:
    values = json.loads(arguments)
    assert (name == "add" and set(values) == {"a", "b"} and values["b"] in (1, 2)) or (name == "stop" and values == {})


NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("choice", "decoding"), [("required", "streaming"), ("required", "verified"), (NAMED, "verified")]
)
def test_a_forced_call(client, choice, decoding):
    asked = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": 3, "max_tokens": 70}
    answer = client.chat.completions.create(**asked, extra_body={"decoding": decoding, "wedlm_window_size": 4}).choices[
        0
    ]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert choice == "required" or call.function.name == "add"
    name, arguments, reasons = "", "", []
    for chunk in client.chat.completions.create(
        **asked, stream=True, extra_body={"decoding": decoding, "wedlm_window_size": 4}
    ):
        assert not chunk.choices[0].delta.content
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.index == 0
            name += part.function.name or ""
            arguments += part.function.arguments
        reasons.append(chunk.choices[0].finish_reason)
    assert (name, arguments) == (call.function.name, call.function.arguments)
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_a_call_cut_by_length(client):
    asked = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "temperature": 0}
    answer = client.chat.completions.create(**asked, max_tokens=3).choices[0]
    assert (answer.finish_reason, answer.message.content, answer.message.tool_calls) == ("length", "", None)


def test_offered_tools_and_none(running, client):
    """Offered tools are told of in the prompt; with "none" they are not, and the text is free either way."""
    plain = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=5)
    asked = {"model": MODEL, "messages": MESSAGES, "tools": TOOLS[1:], "temperature": 0, "max_tokens": 5}
    none = client.chat.completions.create(**asked, tool_choice="none")
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    auto = client.chat.completions.create(**asked, tool_choice="auto")
    assert auto.usage.prompt_tokens > none.usage.prompt_tokens + 100
    assert auto.choices[0].message.tool_calls is None


def test_the_openai_stream_helper(client):
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required", seed=1, max_tokens=70
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    check_call(call.function.name, call.function.arguments)


def test_calls_and_results_may_be_sent_back(running):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "c1", "content": "3"})
    answer = running.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert answer.status_code == 200, answer.text


def test_the_prompt_in_plain_words():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    given = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "3"}]},
    ]
    messages = [Message.model_validate(one).for_template() for one in given]
    told, user, assistant, result = in_plain_words(messages, MODELS)
    assert told["role"] == "system"
    assert '"name": "add", "description": "Adds"' in told["content"]
    assert '<tool_call>{"name": ..., "arguments": {...}}</tool_call>' in told["content"]
    assert user == {"role": "user", "content": "Hi"}
    assert assistant["content"] == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert result["role"] == "user"
    assert "3" in result["content"]
    system = {"role": "system", "content": "Be kind."}
    assert in_plain_words([system, *messages], MODELS)[0]["content"].startswith("Be kind.\n\n")
    assert len(in_plain_words(messages, [])) == 3


def test_results_that_follow_each_other_are_one_turn():
    result = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    messages = [
        {"role": "user", "content": "Hi"},
        result,
        {**result, "content": "4"},
        {"role": "user", "content": "So?"},
    ]
    turns = in_plain_words(messages, [])
    assert [turn["role"] for turn in turns] == ["user", "user"]
    assert turns[1]["content"] == ("<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>\nSo?")


def template(source: str, reference: LLM) -> Tokenizer:
    return Tokenizer(reference.tokenizer.backend, {"default": source})


def test_what_templates_take(reference):
    assert TemplateTraits.of(reference.tokenizer) == TemplateTraits(takes_tools=False, takes_system=True)
    source = "{% if tools %}{% for t in tools %}{{ t.function.name }},{% endfor %}{% endif %}{{ messages[0].content }}"
    tokenizer = template(source, reference)
    assert TemplateTraits.of(tokenizer) == TemplateTraits(takes_tools=True, takes_system=True)
    assert tokenizer.apply_chat_template(MESSAGES, tools=for_template(MODELS)) == "add,stop,Hello"
    loop = "{% for m in messages %}BODY{{ m.content }};{% endfor %}"
    for body in (
        "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% if m.role != 'system' %}",
    ):
        refusing = (
            loop.replace("BODY", body) if "raise" in body else loop.replace("BODY", body).replace(";", ";{% endif %}")
        )
        assert not TemplateTraits.of(template(refusing, reference)).takes_system


def test_templates_without_a_system_role(reference):
    system, user, assistant = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    merged = {"role": "user", "content": "system\n\nuser"}
    assert without_system([system, user, assistant]) == [merged, assistant]
    assert without_system([system, assistant]) == [{"role": "user", "content": "system"}, assistant]
    assert without_system([user]) == [user]


@pytest.mark.parametrize(
    "text", ['{"name": "f", "arguments": {"a": "}"}}', '{ "name" : "f","arguments" :{"a": "}" } }']
)
def test_forced_calls_stream_their_arguments(text):
    for pieces in ([text], list(text)):
        deltas, whole = read(ForcedReader(), pieces)
        (call,) = whole["tool_calls"]
        assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("f", {"a": "}"})
        assert sum(bool(delta.calls) for delta in deltas) > 5 or len(pieces) == 1
    cut = text[: text.index("}") + 1]
    (call,) = read(ForcedReader(), list(cut), "length")[1]["tool_calls"]
    assert call["function"]["arguments"].endswith("}")


def test_the_schema_of_a_call_keeps_references():
    schema = call_schema(MODELS)
    assert schema["$defs"]["tool0"]["properties"]["b"] == {"$ref": "#/$defs/tool0/$defs/B"}
    assert len(schema["anyOf"]) == 2
    assert "anyOf" not in call_schema(MODELS[:1])


@pytest.mark.long
@pytest.mark.demo_model
def test_langchain_tools_and_structured_output():
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel, Field

    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    class City(BaseModel):
        name: str = Field(max_length=20)
        inhabitants: int = Field(ge=0, le=10**8)

    with serving(LLM("demo", device="cpu", max_model_len=1024), name="demo") as one:
        chat = ChatOpenAI(model="demo", base_url=f"{one.url}/v1", api_key="none", temperature=0, max_tokens=200)
        (call,) = chat.bind_tools([add], tool_choice="any").invoke("Add 3 and 5").tool_calls
        assert call["name"] == "add"
        assert set(call["args"]) == {"a", "b"}
        assert isinstance(chat.bind_tools([add]).invoke("Say hello").content, str)
        for method in ("json_schema", "function_calling"):
            city = chat.with_structured_output(City, method=method).invoke("Tell me about Paris.")
            assert isinstance(city, City), method
