# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, biases, penalties and JSON answers through OpenAI's client: the engine's own figures and texts."""

import asyncio
import json

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.running import MODEL, events
from tests.tiers import EACH_DECODING
from wedlm import LLM, SamplingParams

MESSAGES = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def expected(reference: LLM, **options):
    return reference.chat(MESSAGES, SamplingParams(**options))[0]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(client, reference, stream):
    output = expected(reference, max_tokens=12, logprobs=3)
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, "logprobs": True}
    answer = client.chat.completions.create(**asked, top_logprobs=3, stream=stream)
    parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert [entry.logprob for entry in entries] == pytest.approx(output.logprobs, abs=1e-4)
    assert "".join(entry.token for entry in entries) == output.text
    for entry, top in zip(entries, output.top_logprobs, strict=True):
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx([value for _, value in top], abs=1e-4)
        assert entry.bytes == (None if "\ufffd" in entry.token else list(entry.token.encode()))
    bare = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [entry.logprob for entry in bare] == pytest.approx([entry.logprob for entry in entries], abs=1e-4)
    assert not any(entry.top_logprobs for entry in bare)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(client, reference, stream):
    output = reference.generate("é caf", SamplingParams(max_tokens=12, logprobs=2))[0]
    answer = client.completions.create(
        model=MODEL, prompt="é caf", temperature=0, max_tokens=12, logprobs=2, stream=stream
    )
    found = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    assert [value for one in found for value in one.token_logprobs] == pytest.approx(output.logprobs, abs=1e-4)
    assert [len(top) for one in found for top in one.top_logprobs] == [2] * 12
    assert [offset for one in found for offset in one.text_offset] == output.text_offsets
    tokens = [token for one in found for token in one.tokens]
    assert [output.text[at : at + 1] for at in output.text_offsets] == [token[:1] for token in tokens]


def test_logprobs_are_the_models_own(client, reference):
    """Biases and schemas change the choice, not the distribution that is reported."""
    chat = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 4, "logprobs": True}
    chat |= {"top_logprobs": 5, "extra_body": {"decoding": "verified"}}  # auto's rows, and so last bits, may vary
    free = client.chat.completions.create(**chat).choices[0].logprobs.content[0]
    biased = client.chat.completions.create(**chat, logit_bias={"7": 100}).choices[0].logprobs.content
    assert biased[0].top_logprobs == free.top_logprobs
    assert [entry.token for entry in biased] == [reference.tokenizer.decode([7])] * 4


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_biases_and_penalties(running, reference, decoding):
    options = {"logit_bias": {"7": 3, "9": -100}, "presence_penalty": 1.5, "frequency_penalty": 0.5}
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 30, "decoding": decoding}
    answer = running.post("/v1/chat/completions", {**body, **options}).json()
    ours = {**options, "logit_bias": {7: 3, 9: -100}, "decoding": decoding, "max_tokens": 30}
    text = expected(reference, **ours).text
    assert answer["choices"][0]["message"]["content"] == text
    assert text != expected(reference, decoding=decoding, max_tokens=30).text


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_json_answers(running, reference, decoding):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 60, "decoding": decoding, "response_format": form}
    answer = running.post("/v1/chat/completions", body).json()
    text = answer["choices"][0]["message"]["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)
    assert text == expected(reference, decoding=decoding, max_tokens=60, json_schema=SCHEMA).text
    chunks = events(running.post("/v1/chat/completions", {**body, "stream": True}))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


def test_json_object_begins_one(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=10, response_format={"type": "json_object"}
    )
    (choice,) = answer.choices
    assert choice.message.content.startswith("{")
    assert choice.finish_reason in ("stop", "length")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


class Point(BaseModel):
    x: int = Field(ge=0, le=9)
    far: bool


def test_parse_of_the_client(running):
    """``parse`` sends a model's schema and reads the answer into it; many at once, streamed and whole."""

    async def one(client: openai.AsyncOpenAI, seed: int) -> Point:
        answer = await client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, seed=seed, max_tokens=50, response_format=Point
        )
        return answer.choices[0].message.parsed

    async def everything() -> list[Point]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(6)))

    points = asyncio.run(everything())
    assert all(isinstance(point, Point) for point in points)
    assert len({(point.x, point.far) for point in points}) > 1
    running.settled()
