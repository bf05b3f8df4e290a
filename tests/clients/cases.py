# SPDX-License-Identifier: Apache-2.0
"""Real clients against a server, each by its defaults where it has some: ``python cases.py CASE URL``, a process each.

The model is a tiny one that was never trained, so that what is checked is the way there and back: forced calls and
forms keep to their schemas, free text is some text.
"""

import asyncio
import json
import os
import sys
from contextlib import suppress
from typing import Annotated, Any

import pytest
from pydantic import Field

MODEL = "tiny"
NO_CALL = {"logit_bias": {"27": -50}}  # of "<", with which its calls begin: it would call for ever
Digit = Annotated[int, Field(ge=0, le=9)]  # without bounds a model without sense writes digits for ever
SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["digit"],
    "additionalProperties": False,
}


def answer_type() -> Any:
    from pydantic import BaseModel, ConfigDict, Field

    class Answer(BaseModel):
        model_config = ConfigDict(extra="forbid")  # or a model without sense writes fields for ever
        digit: int = Field(ge=0, le=9)

    return Answer


def anthropic_messages(url: str) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "messages": [{"role": "user", "content": "Hello"}]}
        greedy = {"temperature": 0}
        answer = client.messages.create(**asked, system="Be kind.", extra_body=greedy)
        assert answer.content[0].type == "text"
        with client.messages.stream(**asked, system="Be kind.", extra_body=greedy) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == final.content[0].text == answer.content[0].text
        assert final.usage.output_tokens == answer.usage.output_tokens
        counted = client.messages.count_tokens(model=MODEL, messages=asked["messages"], system="Be kind.")
        assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
        tool: Any = {"name": "add", "description": "Adds", "input_schema": SCHEMA}
        asked["max_tokens"] = 60
        with client.messages.stream(**asked, tools=[tool], tool_choice={"type": "any"}) as stream:
            final = stream.get_final_message()
        (block,) = final.content
        assert final.stop_reason == "tool_use"
        assert 0 <= block.input["digit"] <= 9
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "3"}
        asked["messages"] = [
            *asked["messages"],
            {"role": "assistant", "content": final.content},
            {"role": "user", "content": [result]},
        ]
        assert client.messages.create(**asked, tools=[tool]).content
        with pytest.raises(anthropic.NotFoundError, match="other"):
            client.messages.create(**{**asked, "model": "other"})


def ollama_client(url: str) -> None:
    import ollama

    client = ollama.Client(host=url)
    assert [model.model for model in client.list().models] == [MODEL]
    messages = [{"role": "user", "content": "Hello"}]
    options = {"temperature": 0, "num_predict": 12}
    whole = client.chat(MODEL, messages, options=options)
    text = "".join(part.message.content for part in client.chat(MODEL, messages, options=options, stream=True))
    assert whole.message.content == text
    assert whole.eval_count == 12 or whole.done_reason == "stop"
    assert client.generate(MODEL, "Hello", options=options).response == text
    formed = client.chat(MODEL, messages, format=answer_type().model_json_schema(), options={"num_predict": 60})
    assert 0 <= json.loads(formed.message.content)["digit"] <= 9

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        return a + b

    assert client.chat(MODEL, messages, tools=[add], options=options).message.role == "assistant"


def instructor_modes(url: str) -> None:
    import instructor
    import openai

    raw = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 80}
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        client = instructor.from_openai(raw, mode=mode)
        assert 0 <= client.chat.completions.create(**asked, response_model=answer_type()).digit <= 9
    raw.close()


def openai_agents(url: str) -> None:
    """By its default, which is the Responses API; tools together with a type of the output, streamed and whole."""
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from agents import set_default_openai_client as use
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    use(client, use_for_tracing=False)

    @function_tool
    def add(digit: Digit) -> int:
        """Add one to a digit."""
        return digit + 1

    settings = ModelSettings(max_tokens=80, temperature=0, extra_body=NO_CALL)

    async def run() -> None:
        plain = Agent(name="a", instructions="Be kind.", model=MODEL, model_settings=settings)
        assert isinstance((await Runner.run(plain, "Hello")).final_output, str)
        stream = Runner.run_streamed(plain, "Hello")
        names = [event.data.type async for event in stream.stream_events() if event.type == "raw_response_event"]
        assert names[0] == "response.created"
        for model in (MODEL, OpenAIChatCompletionsModel(MODEL, client)):
            both: Any = Agent(name="b", model=model, model_settings=settings, tools=[add], output_type=answer_type())
            result = await Runner.run(both, "Hello", max_turns=8)
            assert 0 <= result.final_output.digit <= 9

    asyncio.run(run())


def pydantic_ai(url: str) -> None:
    """By its default for OpenAI, which is the Responses API; a native form beside a tool; Anthropic's model."""
    from pydantic_ai import Agent, NativeOutput, UsageLimitExceeded, UsageLimits
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    models: list[Any] = [OpenAIResponsesModel(MODEL, provider=provider), OpenAIChatModel(MODEL, provider=provider)]
    for model in models:
        assert isinstance(Agent(model).run_sync("Hello", model_settings={"max_tokens": 12}).output, str)
        agent = Agent(
            model, output_type=NativeOutput(answer_type()), model_settings={"max_tokens": 80, "temperature": 0}
        )

        @agent.tool_plain
        def add(digit: Digit) -> int:
            """Add one to a digit."""
            return digit + 1

        with suppress(UsageLimitExceeded):  # a model without sense may call for ever; each request was answered
            assert 0 <= agent.run_sync("Hello", usage_limits=UsageLimits(request_limit=3)).output.digit <= 9
    claude = AnthropicModel(MODEL, provider=AnthropicProvider(base_url=url, api_key="none"))
    assert isinstance(Agent(claude).run_sync("Hello", model_settings={"max_tokens": 12}).output, str)


def litellm_apis(url: str) -> None:
    import litellm

    asked: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"}
    messages = [{"role": "user", "content": "Hello"}]
    answer = litellm.completion(**asked, messages=messages, max_tokens=12, reasoning_effort="low", drop_params=True)
    assert isinstance(answer.choices[0].message.content, str)
    response = litellm.responses(**asked, input="Hello", max_output_tokens=12)
    assert response.output[0].type == "message"
    chunks = list(litellm.completion(**asked, messages=messages, max_tokens=12, stream=True))
    assert chunks
    hosted = {**asked, "model": f"hosted_vllm/{MODEL}"}
    assert litellm.completion(**hosted, messages=messages, max_tokens=12, min_p=0.1).choices
    local = {"model": f"ollama_chat/{MODEL}", "api_base": url}
    assert litellm.completion(**local, messages=messages, max_tokens=12).choices[0].message.content is not None
    claude = {"model": f"anthropic/{MODEL}", "api_base": url, "api_key": "none"}
    assert litellm.completion(**claude, messages=messages, max_tokens=12).choices[0].message.content is not None


def llama_index(url: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=MODEL, api_base=f"{url}/v1", api_key="none", is_chat_model=True, max_tokens=12)
    assert llm.chat([ChatMessage(role="user", content="Hello")]).message.content is not None
    assert "".join(part.delta or "" for part in llm.stream_chat([ChatMessage(role="user", content="Hello")]))
    assert llm.as_structured_llm(answer_type()) is not None


def haystack(url: str) -> None:
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    options = {"max_tokens": 12}
    key = Secret.from_token("none")
    generator = OpenAIChatGenerator(api_key=key, model=MODEL, api_base_url=f"{url}/v1", generation_kwargs=options)
    assert generator.run([ChatMessage.from_user("Hello")])["replies"][0].text is not None


def lm_eval(url: str) -> None:
    """``local-completions`` with likelihoods, and both local models' generation."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    options: Any = {"model": MODEL, "max_retries": 1, "tokenizer_backend": "huggingface"}
    options["tokenizer"] = os.environ["WEDLM_CLIENTS_CHECKPOINT"]
    completions = LocalCompletionsAPI(base_url=f"{url}/v1/completions", **options)
    tokens = [list(range(3, 9)), list(range(5, 30))]  # a context of each, and what continues it
    requests = [(("", ""), tokens[0][:3], tokens[0][3:]), (("", ""), tokens[1][:20], tokens[1][20:])]
    scores = completions._loglikelihood_tokens(requests, disable_tqdm=True)
    assert all(score < 0 and greedy in (True, False) for score, greedy in scores)
    asked = [Instance("generate_until", {}, ("Hello", {"until": ["zzz"], "max_gen_toks": 5}), 0)]
    assert isinstance(completions.generate_until(asked, disable_tqdm=True)[0], str)
    chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", **options)
    template = chat.apply_chat_template([{"role": "user", "content": "Hello"}])
    asked = [Instance("generate_until", {}, (template, {"until": ["zzz"], "max_gen_toks": 5}), 0)]
    assert isinstance(chat.generate_until(asked, disable_tqdm=True)[0], str)


def smolagents_model(url: str) -> None:
    from smolagents import OpenAIServerModel

    model = OpenAIServerModel(MODEL, api_base=f"{url}/v1", api_key="none", max_tokens=12)
    message = model([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], stop_sequences=["zzz"])
    assert isinstance(message.content, str)


def langchain(url: str) -> None:
    """Both of OpenAI's APIs, a form beside tools, and the parameters that were refused."""
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def add(digit: Digit) -> int:
        """Add one to a digit."""
        return digit + 1

    options: Any = {"model": MODEL, "base_url": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 12}
    chat = ChatOpenAI(**options)
    responses = ChatOpenAI(**options, use_responses_api=True)
    assert responses.invoke("Hello").text == chat.invoke("Hello").text
    assert "".join(chunk.text for chunk in responses.stream("Hello")) == chat.invoke("Hello").text
    assert isinstance(ChatOpenAI(**options, reasoning_effort="low").invoke("Hello").text, str)
    longer = ChatOpenAI(**{**options, "max_tokens": 90})
    (call,) = longer.bind_tools([add], tool_choice="any", strict=True).invoke("Hello").tool_calls
    assert call["name"] == "add"
    message = longer.bind_tools([add], response_format=answer_type(), strict=True, parallel_tool_calls=False).invoke(
        "Hello"
    )
    assert message.tool_calls or 0 <= json.loads(message.text)["digit"] <= 9


def openai_client(url: str) -> None:
    """What the client was refused: by name, all in one."""
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        text = client.completions.create(model=MODEL, prompt="Hello", echo=True, logprobs=1, max_tokens=0)
        assert text.choices[0].text == "Hello"
        assert len(text.choices[0].logprobs.token_logprobs) == 5
        assert client.completions.create(model=MODEL, prompt="Hello", best_of=2, max_tokens=5).choices
        asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}
        given = {"reasoning_effort": "low", "store": True, "metadata": {"a": "b"}, "service_tier": "flex"}
        assert client.chat.completions.create(**asked, **given).choices
        ours = {"min_p": 0.05, "repetition_penalty": 1.1, "skip_special_tokens": True, "documents": None, "priority": 0}
        assert client.chat.completions.create(**asked, extra_body=ours).choices
        guided = {"structured_outputs": {"choice": ["left", "right"]}}
        answer = client.chat.completions.create(**asked, extra_body=guided).choices[0].message.content
        assert answer in ("left", "right")
        answer = client.responses.create(model=MODEL, input="Hello", max_output_tokens=12)
        with client.responses.stream(model=MODEL, input="More", previous_response_id=answer.id) as stream:
            assert [event.type for event in stream][-1] in ("response.completed", "response.incomplete")


CASES = {
    case.__name__: case
    for case in (
        openai_client,
        anthropic_messages,
        ollama_client,
        instructor_modes,
        langchain,
        lm_eval,
        openai_agents,
        pydantic_ai,
        litellm_apis,
        llama_index,
        haystack,
        smolagents_model,
    )
}

if __name__ == "__main__":
    CASES[sys.argv[1]](sys.argv[2])
