# SPDX-License-Identifier: Apache-2.0
"""Parameters that other servers have, too: sampling, forms of the answer, the chat template's variables, reasoning."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tiny_llm import save_tiny
from tests.server.reading_calls import calls_in
from tests.server.running import MODEL, events, serving
from tests.tiers import EACH_DECODING
from wedlm import LLM, SamplingParams
from wedlm.server.config import ServerConfig
from wedlm.server.prompts import Prompts
from wedlm.server.protocol import ChatRequest
from wedlm.server.readers import CallReader, Delta, PlainReader, ThinkReader
from wedlm.server.tool_forms import HERMES

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
DECODINGS = ["streaming", "verified", "block", "autoregressive"]
SCHEMA = {"type": "object", "properties": {"b": {"enum": ["x", "y"]}}, "required": ["b"], "additionalProperties": False}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": ADD}}]


def content(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_min_p_and_repetition_penalty(running, reference, decoding):
    options = {"min_p": 0.3, "repetition_penalty": 1.3, "temperature": 1, "seed": 5, "max_tokens": 30}
    body = {"messages": MESSAGES, "decoding": decoding, **options}
    text = content(running.post(CHAT, body))
    assert text == reference.chat(MESSAGES, SamplingParams(decoding=decoding, **options))[0].text
    for name, neutral in (("min_p", 0), ("repetition_penalty", 1)):
        assert content(running.post(CHAT, {**body, name: neutral})) != text


def test_a_stop_string_that_stays(running, reference):
    full = reference.generate("abc", SamplingParams(max_tokens=40))[0].text
    body = {"prompt": "abc", "temperature": 0, "max_tokens": 40, "stop": full[20:22]}
    cut, kept = (running.post(TEXT, {**body, "include_stop_str_in_output": keep}).json() for keep in (False, True))
    assert kept["choices"][0]["text"] == cut["choices"][0]["text"] + full[20:22]
    chunks = events(running.post(TEXT, {**body, "include_stop_str_in_output": True, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == kept["choices"][0]["text"]


def test_best_of(running, reference):
    """The choices with the highest mean log-probability, of which the client is told only if he asks."""
    body = {"prompt": ["abc", "x"], "temperature": 1, "seed": 3, "max_tokens": 8}
    answer = running.post(TEXT, {**body, "n": 2, "best_of": 5}).json()
    wanted = []
    for prompt in body["prompt"]:
        made = [
            reference.generate(prompt, SamplingParams(temperature=1, seed=3 + i, max_tokens=8, logprobs=0))[0]
            for i in range(5)
        ]
        made.sort(key=lambda one: -sum(one.logprobs) / len(one.logprobs))
        wanted += [one.text for one in made[:2]]
    assert [choice["text"] for choice in answer["choices"]] == wanted
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 80
    assert running.post(TEXT, {**body, "n": 2, "best_of": 2, "stream": True}).status_code == 200


def test_keys_are_shared_within_a_salt_alone(running):
    body = {"prompt": "a prompt that fills several pages of the cache", "max_tokens": 1}
    reused = []
    for salt in ("one", "one", "two", None, None):
        answer = running.post(TEXT, {**body, "cache_salt": salt}).json()
        reused.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0)
    assert reused == [False, True, False, False, True]


@pytest.mark.parametrize("address", [CHAT, TEXT, "/v1/responses"])
def test_priority_reaches_the_engine(running, monkeypatch, address):
    """Which minds it where its options say so."""
    engine, seen = running.model.llm.engine, []
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda *words, **more: (seen.append(words[2].priority), add(*words, **more))[1])
    asked = {CHAT: {"messages": MESSAGES, "max_tokens": 2}, TEXT: {"prompt": "abc", "max_tokens": 2}}
    for more in ({"priority": -3}, {"priority": None}, {}):
        answer = running.post(address, {**asked.get(address, {"input": "abc", "max_output_tokens": 2}), **more})
        assert answer.status_code == 200, answer.text
    assert seen == [-3, 0, 0]
    assert running.post(TEXT, {"prompt": "abc", "priority": 1.5}).status_code == 400


GRAMMAR = 'root ::= "say " word\nword ::= [a-c]+ "!"'
FORMS = [
    ({"guided_regex": r"^\d{2}/\d{2}$"}, r"\d{2}/\d{2}"),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ({"guided_choice": ["yes", 'n"o']}, 'yes|n"o'),
    ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
    ({"guided_grammar": GRAMMAR}, "say [abc]+!?"),
    ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/'}}, "x[0-9]"),
    ({"guided_json": SCHEMA}, r'\{ ?"b" ?: ?"[xy]" ?\}'),
    ({"guided_json": json.dumps(SCHEMA)}, r'\{ ?"b" ?: ?"[xy]" ?\}'),
    ({"structured_outputs": {"json": SCHEMA}}, r'\{ ?"b" ?: ?"[xy]" ?\}'),
]


# Each form in one mode, and one form of each kind of grammar in every mode; the rest in the long tier.
IN_EVERY_MODE = (0, 4, 6)


@pytest.mark.parametrize(
    ("fields", "pattern", "decoding"),
    [
        pytest.param(
            *form,
            decoding,
            id=f"{form[0]!s:.40}-{decoding}",
            marks=[] if number in IN_EVERY_MODE or decoding == "verified" else pytest.mark.long,
        )
        for number, form in enumerate(FORMS)
        for decoding in DECODINGS
    ],
)
def test_forms_of_the_answer(running, decoding, fields, pattern):
    options = {"decoding": decoding, "temperature": 1, "seed": 4, "max_tokens": 16, **fields}
    texts = [content(running.post(CHAT, {"messages": MESSAGES, **options}))]
    texts.append(running.post(TEXT, {"prompt": "abc", **options}).json()["choices"][0]["text"])
    for text in texts:
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("decoding", ["streaming", "verified"])
def test_a_schema_beside_tools_that_may_be_called(tmp_path, decoding):
    """The answer is one or the other, whatever the model would rather say."""
    found = set()
    llm = LLM(save_tiny(tmp_path, max_position_embeddings=1024), device="cpu", max_num_seqs=4)
    with serving(llm) as one:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        asked = {"messages": MESSAGES, "tools": TOOLS, "response_format": form, "parallel_tool_calls": False}
        for bias in (10, -10):  # towards "<" and away from it
            bias = {str(llm.tokenizer.encode("<")[0]): bias}
            body = {**asked, "decoding": decoding, "seed": 1, "max_tokens": 120, "logit_bias": bias}
            choice = one.post(CHAT, body).json()["choices"][0]
            calls = choice["message"].get("tool_calls")
            found.add(choice["finish_reason"])
            if calls:
                assert 0 <= json.loads(calls[0]["function"]["arguments"])["a"] <= 9
            else:
                assert json.loads(choice["message"]["content"])["b"] in ("x", "y")
    assert found == {"tool_calls", "stop"}


def prompt_of(llm: LLM, **fields) -> str:
    body = ChatRequest.model_validate({"model": MODEL, "messages": MESSAGES, **fields})
    return llm.tokenizer.decode(Prompts(llm, ServerConfig()).of(body, []).token_ids, False)


def test_the_last_message_is_continued(running, reference):
    messages = [*MESSAGES, {"role": "assistant", "content": "I say "}]
    expected = "<|user|>Hello<|assistant|>I say "
    assert prompt_of(reference, messages=messages, continue_final_message=True) == expected
    assert prompt_of(reference, messages=messages, add_generation_prompt=False) == expected
    assert prompt_of(reference, messages=messages) == expected + "<|assistant|>"
    body = {"messages": messages, "continue_final_message": True, "temperature": 0, "max_tokens": 7}
    text = reference.generate(reference.tokenizer.encode(expected), SamplingParams(max_tokens=7))[0].text
    assert content(running.post(CHAT, body)) == text
    refused = running.post(CHAT, {**body, "add_generation_prompt": True})
    assert refused.json()["error"]["param"] == "continue_final_message"


def test_continuing_behind_a_control_token_of_the_template(reference, monkeypatch):
    """What the template writes behind the message is left out; the message's own spelling of a token stays text."""
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    monkeypatch.setattr(reference.tokenizer, "chat_templates", {"default": source})
    messages = [*MESSAGES, {"role": "assistant", "content": "a<|end|>b"}]
    body = ChatRequest.model_validate({"model": MODEL, "messages": messages, "continue_final_message": True})
    ids = Prompts(reference, ServerConfig()).of(body, []).token_ids
    assert reference.tokenizer.decode(ids, False) == "<|user|>Hello<|end|><|assistant|>a<|end|>b"
    assert ids.count(reference.tokenizer.token_id("<|end|>")) == 1


def test_variables_of_the_template(reference, monkeypatch):
    source = "{{ messages[0].content }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    source += "{{ reasoning_effort or '' }}{{ mood or '' }}"
    monkeypatch.setattr(reference.tokenizer, "chat_templates", {"default": source})
    assert prompt_of(reference) == "Hello"
    assert prompt_of(reference, chat_template_kwargs={"mood": "glad", "enable_thinking": False}) == "HelloFalseglad"
    assert prompt_of(reference, reasoning_effort="low") == "HelloTruelow"
    assert prompt_of(reference, reasoning_effort="none") == "HelloFalsenone"


def test_reasoning_stands_apart(running, reference, monkeypatch):
    """Through the server: the prompt opens the reasoning, and nothing closes it."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{# </think> #}<think>\n"
    monkeypatch.setattr(running.model.llm.tokenizer, "chat_templates", {"default": source})
    monkeypatch.setattr(running.model, "prompts", Prompts(running.model.llm, ServerConfig()))
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 9}
    text = reference.generate("Hello<think>", SamplingParams(max_tokens=9))[0].text
    message = running.post(CHAT, body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (text.strip(), "")
    deltas = [chunk["choices"][0]["delta"] for chunk in events(running.post(CHAT, {**body, "stream": True}))]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == text.strip()


def think(pieces: list[str], inside: bool = False, names: tuple[str, ...] = ()) -> tuple[str, str, int]:
    inner = CallReader(HERMES, names, True) if names else PlainReader()
    reader, whole = ThinkReader(inner, inside), Delta()
    for piece in pieces:
        whole.add(reader.push(piece))
    whole.add(reader.finish("stop"))
    return whole.reasoning, whole.content, len(whole.calls)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "rest"),
    [
        ("<think>\na b\n</think>\n\nSo", False, "a b", "So"),
        ("a b</think>So", True, "a b", "So"),
        ("no tag </think> x", False, "", "no tag </think> x"),
        (" <think>never closed </thi", False, "never closed </thi", ""),
        ("<think></think>So <think>x</think>", False, "", "So <think>x</think>"),
        (" <thin", False, "", " <thin"),
        (" \n", False, "", " \n"),
    ],
)
def test_reasoning_is_read(text, inside, reasoning, rest):
    for pieces in ([text], list(text)):
        assert think(pieces, inside)[:2] == (reasoning, rest)


def test_a_call_behind_reasoning():
    text = '<think>I "<tool_call>"</think>\n<tool_call>{"name": "add"}</tool_call>'
    for pieces in ([text], list(text)):
        assert think(pieces, names=("add",)) == ('I "<tool_call>"', "", 1)
    assert calls_in("hermes", [text])[1]  # without the parser it is one, too


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/", " ", "\n", "x", "think>"]), max_size=12), st.booleans()
)
def test_reasoning_is_the_same_however_it_is_cut(pieces, inside):
    whole = think(["".join(pieces)], inside)
    assert think(pieces, inside) == think(list("".join(pieces)), inside) == whole


def test_the_servers_options():
    for name in ("tool_parser", "reasoning_parser"):
        with pytest.raises(ValueError, match=f"{name} is 'x'; expected one of auto"):
            ServerConfig(**{name: "x"})
