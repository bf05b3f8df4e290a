# SPDX-License-Identifier: Apache-2.0
"""Real clients against a server, each by its defaults where it has some, a process each:

    python cases.py CLIENT URL MODEL TOKENIZER

For each case that went as it should, standard output gets a line of JSON: its name, and what came back.

What is checked is the way there and back, whatever the model is: forced calls and forms keep to their schemas, free
text is some text.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx2
import pytest
from pydantic import Field

MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
Digit = Annotated[int, Field(ge=0, le=9)]  # without bounds a model without sense writes digits for ever
SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["digit"],
    "additionalProperties": False,
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


class Server(NamedTuple):
    """``tokenizer`` is a directory with the model's, for clients that count tokens themselves."""

    url: str
    model: str
    tokenizer: str

    @property
    def v1(self) -> dict[str, Any]:
        """What most clients of OpenAI's call these."""
        return {"base_url": f"{self.url}/v1", "api_key": "none"}

    def without_calls(self) -> dict[str, Any]:
        """For agents, which would go on for ever with a model that calls for ever: "<" begins its calls."""
        answer = httpx2.post(f"{self.url}/tokenize", json={"model": self.model, "prompt": "<"})
        return {"logit_bias": {str(token): -50 for token in answer.json()["tokens"]}}


def done(case: str, shown: Any = "") -> None:
    text = shown if isinstance(shown, str) else json.dumps(shown)
    print(json.dumps({"case": case, "shown": text}), flush=True)


def answer_type() -> Any:
    from pydantic import BaseModel, ConfigDict

    class Answer(BaseModel):
        model_config = ConfigDict(extra="forbid")  # or a model without sense writes fields for ever
        digit: int = Field(ge=0, le=9)

    return Answer


def add(digit: Digit) -> int:
    """Add one to a digit."""
    return digit + 1


def openai_client(server: Server) -> None:
    import openai

    with openai.OpenAI(**server.v1, max_retries=0) as client:
        asked: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "max_tokens": 12}
        greedy: dict[str, Any] = {**asked, "temperature": 0}
        answer = client.chat.completions.create(**greedy).choices[0].message.content
        done("chat", answer)
        with client.chat.completions.stream(**greedy) as stream:
            final = "".join(event.delta for event in stream if event.type == "content.delta")
        assert final == answer
        done("chat, the stream helper", final)
        parsed = client.chat.completions.parse(**{**asked, "max_tokens": 60}, response_format=answer_type())
        assert 0 <= parsed.choices[0].message.parsed.digit <= 9
        done("chat, parsed into a type", parsed.choices[0].message.content)
        text = client.completions.create(model=server.model, prompt="Hello", echo=True, logprobs=1, max_tokens=0)
        assert text.choices[0].text == "Hello"
        assert text.choices[0].logprobs.token_logprobs[0] is None
        done("completions: echo, logprobs, no token", text.choices[0].logprobs.tokens)
        assert client.completions.create(model=server.model, prompt="Hello", best_of=2, max_tokens=5).choices
        done("completions: best_of")
        given = {"reasoning_effort": "low", "store": True, "metadata": {"a": "b"}, "service_tier": "flex"}
        assert client.chat.completions.create(**asked, **given).choices
        done("reasoning_effort, store, metadata, service_tier")
        ours = {"min_p": 0.05, "repetition_penalty": 1.1, "skip_special_tokens": True, "documents": None, "priority": 0}
        assert client.chat.completions.create(**asked, extra_body=ours).choices
        done("min_p, repetition_penalty, neutral fields")
        guided = {"structured_outputs": {"choice": ["left", "right"]}}
        choice = client.chat.completions.create(**asked, extra_body=guided).choices[0].message.content
        assert choice in ("left", "right")
        done("structured_outputs: choice", choice)
        few: dict[str, Any] = {"model": server.model, "max_output_tokens": 12}
        response = client.responses.create(**few, input="Hello")
        with client.responses.stream(**few, input="More", previous_response_id=response.id) as events_of:
            names = [event.type for event in events_of]
        assert names[-1] in ("response.completed", "response.incomplete")
        done("responses, then its stream helper with previous_response_id", list(dict.fromkeys(names)))
        for name, call, error in (
            ("unknown model", lambda: client.chat.completions.create(**{**asked, "model": "x"}), openai.NotFoundError),
            ("picture", lambda: _of_picture(client, asked), openai.BadRequestError),
            ("embeddings", lambda: client.embeddings.create(model=server.model, input="x"), openai.NotFoundError),
            ("files", lambda: client.files.list(), openai.NotFoundError),
        ):
            with pytest.raises(error) as caught:
                call()
            done(f"refused: {name}", caught.value.body["message"])
            assert name != "embeddings" or "a server with an embedding model" in caught.value.body["message"]


def _of_picture(client: Any, asked: dict[str, Any]) -> Any:
    return client.chat.completions.create(**{**asked, "messages": [{"role": "user", "content": [PICTURE]}]})


def anthropic_messages(server: Server) -> None:
    import anthropic

    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": server.model, "max_tokens": 12, "messages": MESSAGES}
        greedy = {"temperature": 0}
        answer = client.messages.create(**asked, system="Be kind.", extra_body=greedy)
        assert answer.content[0].type == "text"
        done("messages", answer.content[0].text)
        with client.messages.stream(**asked, system="Be kind.", extra_body=greedy) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == final.content[0].text == answer.content[0].text
        assert final.usage.output_tokens == answer.usage.output_tokens
        done("the stream helper", text)
        with client.messages.stream(**asked, extra_body=greedy) as stream:
            done("events of the stream helper", list(dict.fromkeys(event.type for event in stream)))
        counted = client.messages.count_tokens(model=server.model, messages=MESSAGES, system="Be kind.")
        assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
        done("count_tokens", str(counted.input_tokens))
        tool: Any = {"name": "add", "description": "Adds", "input_schema": SCHEMA}
        asked["max_tokens"] = 60
        with client.messages.stream(**asked, tools=[tool], tool_choice={"type": "any"}) as stream:
            final = stream.get_final_message()
        (block,) = final.content
        assert final.stop_reason == "tool_use"
        assert 0 <= block.input["digit"] <= 9
        done("a forced tool, streamed", block.input)
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "3"}
        asked["messages"] = [
            *MESSAGES,
            {"role": "assistant", "content": final.content},
            {"role": "user", "content": [result]},
        ]
        assert client.messages.create(**asked, tools=[tool]).content
        done("its result")
        with pytest.raises(anthropic.NotFoundError, match="other") as caught:
            client.messages.create(**{**asked, "model": "other"})
        done("refused: unknown model", caught.value.body["error"]["message"])


def ollama_client(server: Server) -> None:
    import ollama

    client = ollama.Client(host=server.url)
    assert [model.model for model in client.list().models] == [server.model]
    done("list")
    options = {"temperature": 0, "num_predict": 12}
    whole = client.chat(server.model, MESSAGES, options=options)
    done("chat", whole.message.content)
    text = "".join(part.message.content for part in client.chat(server.model, MESSAGES, options=options, stream=True))
    assert whole.message.content == text
    assert whole.eval_count == 12 or whole.done_reason == "stop"
    done("chat, streamed", text)
    assert client.generate(server.model, MESSAGES[0]["content"], options=options).response == text
    done("generate")
    formed = client.chat(server.model, MESSAGES, format=answer_type().model_json_schema(), options={"num_predict": 60})
    assert 0 <= json.loads(formed.message.content)["digit"] <= 9
    done("a format", formed.message.content)
    assert client.chat(server.model, MESSAGES, tools=[add], options=options).message.role == "assistant"
    done("a tool")


def open_webui(server: Server) -> None:
    """The requests that Open WebUI sends, as it writes them."""
    with httpx2.Client(base_url=server.url, timeout=120) as http:

        def ask(**fields: Any) -> str:
            body = {"model": server.model, "messages": MESSAGES, "stream": True, "max_tokens": 12, **fields}
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            chunks = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]
            return "".join(one["choices"][0]["delta"].get("content") or "" for one in chunks if one["choices"])

        assert http.get("/v1/models").json()["data"][0]["id"] == server.model
        done("models")
        done("chat", ask(stream_options={"include_usage": True}, metadata={"chat_id": "x"}))
        done("sliders: min_p, top_k, repetition_penalty", ask(min_p=0.05, top_k=40, repetition_penalty=1.1, seed=1))
        done("reasoning_effort", ask(reasoning_effort="low"))
        begun = [*MESSAGES, {"role": "assistant", "content": "The capital is"}]
        more = {"continue_final_message": True, "add_generation_prompt": False}
        done("Continue", ask(messages=begun, temperature=0, **more))
        body = {"model": server.model, "messages": [{"role": "user", "content": [PICTURE]}]}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        done("refused: picture", answer.json()["error"]["message"])


def curl_commands(server: Server) -> None:
    """As people type them, without a Content-Type."""

    def curl(path: str, **body: Any) -> str:
        text = json.dumps({"model": server.model, "messages": MESSAGES, **body})
        command = ["curl", "-sSN", "--fail-with-body", f"{server.url}{path}", "-d", text]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout

    few: dict[str, Any] = {"max_tokens": 12}
    ollama = {"stream": False, "options": {"num_predict": 12}}
    for path, body in (("/v1/chat/completions", few), ("/v1/messages", few), ("/api/chat", ollama)):
        done(path, json.loads(curl(path, **body)))
    assert curl("/v1/chat/completions", **few, stream=True).strip().endswith("data: [DONE]")
    done("/v1/chat/completions, streamed")


def instructor_modes(server: Server) -> None:
    import instructor
    import openai

    asked: dict[str, Any] = {"model": server.model, "messages": MESSAGES, "max_tokens": 80}
    with openai.OpenAI(**server.v1, max_retries=0) as raw:
        for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
            client = instructor.from_openai(raw, mode=mode)
            answer = client.chat.completions.create(**asked, response_model=answer_type())
            assert 0 <= answer.digit <= 9
            done(f"mode {mode.name}", answer.model_dump())
        client = instructor.from_openai(raw, mode=instructor.Mode.JSON_SCHEMA)
        *_, last = client.chat.completions.create_partial(**asked, response_model=answer_type())
        assert 0 <= last.digit <= 9
        done("a partial type, streamed", last.model_dump())


def openai_agents(server: Server) -> None:
    from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
    from agents import set_default_openai_client as use
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    client = AsyncOpenAI(**server.v1, max_retries=0)
    use(client, use_for_tracing=False)
    settings = ModelSettings(max_tokens=80, temperature=0, extra_body=server.without_calls())

    async def run() -> None:
        plain = Agent(name="a", instructions="Be kind.", model=server.model, model_settings=settings)
        result = await Runner.run(plain, MESSAGES[0]["content"])
        assert isinstance(result.final_output, str)
        done("by default (Responses)", result.final_output)
        stream = Runner.run_streamed(plain, MESSAGES[0]["content"])
        names = [event.data.type async for event in stream.stream_events() if event.type == "raw_response_event"]
        assert names[0] == "response.created"
        done("by default, streamed", list(dict.fromkeys(names)))
        for name, model in (("Responses", server.model), ("chat", OpenAIChatCompletionsModel(server.model, client))):
            tools = [function_tool(add)]
            both: Any = Agent(name="b", model=model, model_settings=settings, tools=tools, output_type=answer_type())
            result = await Runner.run(both, "Hello", max_turns=8)
            assert 0 <= result.final_output.digit <= 9
            done(f"output_type beside tools ({name})", result.final_output.model_dump())

    asyncio.run(run())


def pydantic_ai(server: Server) -> None:
    from pydantic_ai import Agent, NativeOutput, UsageLimitExceeded, UsageLimits
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(**server.v1)
    models: list[tuple[str, Any]] = [
        ("Responses, the default", OpenAIResponsesModel(server.model, provider=provider)),
        ("chat", OpenAIChatModel(server.model, provider=provider)),
    ]
    for name, model in models:
        text = Agent(model).run_sync(MESSAGES[0]["content"], model_settings={"max_tokens": 12}).output
        assert isinstance(text, str)
        done(f"plain ({name})", text)
        settings: Any = {"max_tokens": 80, "temperature": 0, "extra_body": server.without_calls()}
        agent = Agent(model, output_type=NativeOutput(answer_type()), model_settings=settings)
        agent.tool_plain(add)
        with suppress(UsageLimitExceeded):  # a model without sense may call for ever; each request was answered
            assert 0 <= agent.run_sync("Hello", usage_limits=UsageLimits(request_limit=3)).output.digit <= 9
        done(f"NativeOutput beside a tool ({name})")
    claude = AnthropicModel(server.model, provider=AnthropicProvider(base_url=server.url, api_key="none"))
    assert isinstance(Agent(claude).run_sync("Hello", model_settings={"max_tokens": 12}).output, str)
    done("Anthropic's model")


def litellm_apis(server: Server) -> None:
    import litellm

    asked: dict[str, Any] = {"model": f"openai/{server.model}", "api_base": f"{server.url}/v1", "api_key": "none"}
    answer = litellm.completion(**asked, messages=MESSAGES, max_tokens=12, reasoning_effort="low", drop_params=True)
    done("openai/", answer.choices[0].message.content)
    chunks = list(litellm.completion(**asked, messages=MESSAGES, max_tokens=12, stream=True))
    assert chunks
    done("openai/, streamed", "".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    response = litellm.responses(**asked, input="Hello", max_output_tokens=12)
    assert response.output[0].type == "message"
    done("responses()")
    hosted = {**asked, "model": f"hosted_vllm/{server.model}"}
    assert litellm.completion(**hosted, messages=MESSAGES, max_tokens=12, min_p=0.1).choices
    done("hosted_vllm/, min_p")
    assert litellm.responses(**hosted, input="Hello", max_output_tokens=12).output
    done("hosted_vllm/, responses()")
    local = {"model": f"ollama_chat/{server.model}", "api_base": server.url}
    assert litellm.completion(**local, messages=MESSAGES, max_tokens=12).choices[0].message.content is not None
    done("ollama_chat/")
    claude = {"model": f"anthropic/{server.model}", "api_base": server.url, "api_key": "none"}
    assert litellm.completion(**claude, messages=MESSAGES, max_tokens=12).choices[0].message.content is not None
    done("anthropic/")


def llama_index(server: Server) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    options: Any = {"model": server.model, "api_base": f"{server.url}/v1", "api_key": "none", "is_chat_model": True}
    llm = OpenAILike(**options, max_tokens=12)
    messages = [ChatMessage(role="user", content=MESSAGES[0]["content"])]
    done("chat", llm.chat(messages).message.content)
    done("chat, streamed", "".join(part.delta or "" for part in llm.stream_chat(messages)))
    done("complete", OpenAILike(**{**options, "is_chat_model": False}, max_tokens=12).complete("Hello").text)
    longer = OpenAILike(**options, max_tokens=80, is_function_calling_model=True, should_use_structured_outputs=True)
    answer = longer.as_structured_llm(answer_type()).chat(messages).raw
    assert 0 <= answer.digit <= 9
    done("a structured LLM", answer.model_dump())
    tool = FunctionTool.from_defaults(fn=add, fn_schema=answer_type())
    response = longer.chat_with_tools([tool], user_msg="Hello", tool_required=True)
    (call,) = longer.get_tool_calls_from_response(response)
    assert call.tool_name == "add"
    done("a required tool", call.tool_kwargs)


def haystack(server: Server) -> None:
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.tools import Tool
    from haystack.utils import Secret

    options: Any = {"api_key": Secret.from_token("none"), "model": server.model, "api_base_url": f"{server.url}/v1"}
    messages = [ChatMessage.from_user(MESSAGES[0]["content"])]
    generator = OpenAIChatGenerator(**options, generation_kwargs={"max_tokens": 12})
    done("chat", generator.run(messages)["replies"][0].text)
    chunks: list[Any] = []
    OpenAIChatGenerator(**options, generation_kwargs={"max_tokens": 12}, streaming_callback=chunks.append).run(messages)
    assert chunks
    done("chat, streamed", "".join(chunk.content for chunk in chunks))
    tool = Tool(name="add", description="Adds", parameters=SCHEMA, function=add)
    forced = {"max_tokens": 60, "tool_choice": "required"}
    reply = OpenAIChatGenerator(**options, tools=[tool], generation_kwargs=forced).run(messages)["replies"][0]
    assert 0 <= reply.tool_calls[0].arguments["digit"] <= 9
    done("a required tool", reply.tool_calls[0].arguments)
    formed = {"max_tokens": 60, "response_format": answer_type()}
    reply = OpenAIChatGenerator(**options, generation_kwargs=formed).run(messages)["replies"][0]
    assert 0 <= json.loads(reply.text)["digit"] <= 9
    done("response_format", reply.text)


def dspy_programs(server: Server) -> None:
    import dspy

    for kind in ("chat", "responses"):
        lm = dspy.LM(
            f"openai/{server.model}",
            api_base=f"{server.url}/v1",
            api_key="none",
            model_type=kind,
            max_tokens=40,
            cache=False,
        )
        (text,) = lm(MESSAGES[0]["content"])
        done(f"LM, {kind}", text["text"] if isinstance(text, dict) else text)
    # It knows of no schemas where it does not know the model, so the server is asked for one.
    lm = dspy.LM(lm.model, **{**lm.kwargs, "max_tokens": 80, "extra_body": {"guided_json": SCHEMA}}, cache=False)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        answer = dspy.Predict(answer_type_signature(dspy))(question="Which digit?")
    assert 0 <= answer.digit <= 9
    done("Predict by JSONAdapter", str(answer.digit))


def answer_type_signature(dspy: Any) -> Any:
    class Signature(dspy.Signature):
        question: str = dspy.InputField()
        digit: Digit = dspy.OutputField()

    return Signature


def smolagents_model(server: Server) -> None:
    from smolagents import OpenAIServerModel, tool

    model = OpenAIServerModel(server.model, api_base=f"{server.url}/v1", api_key="none", max_tokens=12)
    messages = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    message = model(messages, stop_sequences=["zzz"])
    assert isinstance(message.content, str)
    done("a model's call with stop_sequences", message.content)
    done("generate_stream", "".join(part.content or "" for part in model.generate_stream(messages)))

    @tool
    def plus_one(digit: int) -> int:
        """Adds one.

        Args:
            digit: A digit.
        """
        return digit + 1

    assert model(messages, tools_to_call_from=[plus_one], tool_choice="auto").role == "assistant"
    done("tools_to_call_from")


def semantic_kernel(server: Server) -> None:
    from openai import AsyncOpenAI
    from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
    from semantic_kernel.contents import ChatHistory

    service = OpenAIChatCompletion(ai_model_id=server.model, async_client=AsyncOpenAI(**server.v1, max_retries=0))
    history = ChatHistory()
    history.add_user_message(MESSAGES[0]["content"])

    async def run() -> None:
        settings = OpenAIChatPromptExecutionSettings(max_tokens=12)
        done("chat", str(await service.get_chat_message_content(history, settings)))
        parts = [str(part) async for part in service.get_streaming_chat_message_content(history, settings)]
        done("chat, streamed", "".join(parts))
        settings = OpenAIChatPromptExecutionSettings(max_tokens=60, response_format=answer_type())
        text = str(await service.get_chat_message_content(history, settings))
        assert 0 <= json.loads(text)["digit"] <= 9
        done("response_format", text)

    asyncio.run(run())


def crewai_crew(server: Server) -> None:
    from crewai import LLM, Agent, Crew, Task

    llm = LLM(f"openai/{server.model}", base_url=f"{server.url}/v1", api_key="none", max_tokens=60)
    done("LLM.call", llm.call(MESSAGES))
    agent = Agent(role="Guide", goal="Answer", backstory="Kind.", llm=llm, max_iter=2)
    task = Task(description=MESSAGES[0]["content"], expected_output="One sentence", agent=agent)
    done("a crew of one agent", str(Crew(agents=[agent], tasks=[task]).kickoff()))


def llm_command(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entry = {
            "model_id": "here",
            "model_name": server.model,
            "api_base": f"{server.url}/v1",
            "supports_schema": True,
        }
        (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps([entry]))

        def run(*arguments: str) -> str:
            command = [sys.executable, "-m", "llm", "-m", "here", "-o", "max_tokens", "40", *arguments, "Hello"]
            environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
            return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

        done("streamed, the default", run())
        done("--no-stream", run("--no-stream"))
        text = run("--schema", json.dumps(SCHEMA))
        assert 0 <= json.loads(text)["digit"] <= 9
        done("--schema", text)


def aider_command(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", f"openai/{server.model}", "--openai-api-base", f"{server.url}/v1", "--no-git", "--yes"]
        options += ["--openai-api-key", "none", "--no-show-model-warnings", "--no-check-update", "--no-pretty"]
        options += ["--analytics-disable", "--no-detect-urls", "--map-tokens", "0", "--edit-format", "ask"]
        for case, more in (("--message, streamed", []), ("--message, --no-stream", ["--no-stream"])):
            command = [sys.executable, "-m", "aider", *options, *more, "--message", "Hello"]
            ran = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            assert "litellm." not in ran.stdout, ran.stdout  # its errors
            assert " received." in ran.stdout, ran.stdout
            done(case, ran.stdout.strip().split("\n\n")[-1])


def lm_eval(server: Server) -> None:
    """The functions that its tasks call, and its command over two small tasks."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    options: Any = {"model": server.model, "max_retries": 1, "tokenizer_backend": "huggingface"}
    options["tokenizer"] = server.tokenizer
    completions = LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", **options)
    tokens = [list(range(3, 9)), list(range(5, 30))]  # a context of each, and what continues it
    requests = [(("", ""), tokens[0][:3], tokens[0][3:]), (("", ""), tokens[1][:20], tokens[1][20:])]
    scores = completions._loglikelihood_tokens(requests, disable_tqdm=True)
    assert all(score < 0 and greedy in (True, False) for score, greedy in scores)
    done("local-completions: likelihoods", [round(score, 3) for score, _ in scores])
    asked = [Instance("generate_until", {}, ("Hello", {"until": ["zzz"], "max_gen_toks": 5}), 0)]
    done("local-completions: text", completions.generate_until(asked, disable_tqdm=True)[0])
    chat = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", **options)
    template = chat.apply_chat_template(MESSAGES)
    asked = [Instance("generate_until", {}, (template, {"until": ["zzz"], "max_gen_toks": 5}), 0)]
    done("local-chat-completions: text", chat.generate_until(asked, disable_tqdm=True)[0])
    capitals = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"}
    rows = [{"country": one, "choices": [*capitals.values()], "answer": i} for i, one in enumerate(capitals)]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "capitals.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        ask = {"doc_to_text": "The capital of {{country}} is"}
        choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
        text: dict[str, Any] = {"output_type": "generate_until", "doc_to_target": "{{choices[answer]}}"}
        text["generation_kwargs"] = {"until": ["."], "max_gen_toks": 12}
        for name, kind in (("capitals_choice", choice), ("capitals_text", text)):
            (Path(folder) / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **ask, **kind}))
        for model, path, tasks, more in (
            ("local-completions", "completions", "capitals_choice,capitals_text", []),
            ("local-chat-completions", "chat/completions", "capitals_text", ["--apply_chat_template"]),
        ):
            arguments = f"model={server.model},base_url={server.url}/v1/{path},tokenizer={server.tokenizer}"
            command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments, *more]
            command += ["--tasks", tasks, "--include_path", folder]
            ran = subprocess.run(command, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            done(f"lm_eval --model {model} --tasks {tasks}", ran.stdout.strip())


def guidellm_command(server: Server) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console-interactive"]
            backend = f"kind=openai_http,target={server.url},model={server.model},request_format={path}"
            command += ["--backend", backend, "--profile", "kind=concurrent,streams=2"]
            command += ["--constraint", "kind=max_requests,count=6"]
            command += ["--tokenizer", f"kind=huggingface_auto,model={server.tokenizer}"]
            command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
            command += ["--output", "kind=console", "--output", f"kind=json,path={report}"]
            ran = subprocess.run(command, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stdout + ran.stderr
            (benchmark,) = json.loads(report.read_text())["benchmarks"]
            totals = benchmark["metrics"]["request_totals"]
            assert (totals["successful"], totals["errored"]) == (6, 0), totals
            tables = ran.stdout.split("Run Summary Info")[1]  # which come twice
            done(f"guidellm run, {path}", f"Run Summary Info{tables}".partition("✔ Benchmarking")[0].strip("ℹ \n"))


def langchain(server: Server) -> None:
    from langchain.agents import create_agent
    from langchain.agents.structured_output import ProviderStrategy
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=server.model, **server.v1, temperature=0, max_tokens=80, extra_body=server.without_calls())
    agent = create_agent(model, tools=[add], response_format=ProviderStrategy(answer_type()))
    answer = agent.invoke({"messages": MESSAGES})["structured_response"]
    assert 0 <= answer.digit <= 9
    done("create_agent: tools beside ProviderStrategy", answer.model_dump())


def langchain_openai(server: Server) -> None:
    """Both of OpenAI's APIs, a form beside tools, and the parameters that were refused."""
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    one_more = tool(add)
    options: Any = {"model": server.model, **server.v1, "temperature": 0, "max_tokens": 12}
    chat = ChatOpenAI(**options)
    question = MESSAGES[0]["content"]
    text = chat.invoke(question).text
    done("invoke", text)
    assert "".join(chunk.text for chunk in chat.stream(question)) == text
    done("stream")
    responses = ChatOpenAI(**options, use_responses_api=True)
    assert responses.invoke(question).text == text
    assert "".join(chunk.text for chunk in responses.stream(question)) == text
    done("use_responses_api, whole and streamed")
    assert isinstance(ChatOpenAI(**options, reasoning_effort="low").invoke(question).text, str)
    done("reasoning_effort")
    longer = ChatOpenAI(**{**options, "max_tokens": 90})
    (call,) = longer.bind_tools([one_more], tool_choice="any", strict=True).invoke(question).tool_calls
    assert call["name"] == "add"
    done("a forced tool", call["args"])
    bound = longer.bind_tools([one_more], response_format=answer_type(), strict=True, parallel_tool_calls=False)
    message = bound.invoke(question)
    assert message.tool_calls or 0 <= json.loads(message.text)["digit"] <= 9
    done("a form beside tools")


# By the name of what is installed, whose version is reported.
CLIENTS = {
    "openai": openai_client,
    "anthropic": anthropic_messages,
    "ollama": ollama_client,
    "open-webui": open_webui,
    "curl": curl_commands,
    "langchain-openai": langchain_openai,
    "lm_eval": lm_eval,
    "langchain": langchain,
    "llama-index-llms-openai-like": llama_index,
    "litellm": litellm_apis,
    "instructor": instructor_modes,
    "pydantic-ai-slim": pydantic_ai,
    "dspy": dspy_programs,
    "haystack-ai": haystack,
    "openai-agents": openai_agents,
    "smolagents": smolagents_model,
    "semantic-kernel": semantic_kernel,
    "crewai": crewai_crew,
    "llm": llm_command,
    "aider-chat": aider_command,
    "guidellm": guidellm_command,
}

if __name__ == "__main__":
    CLIENTS[sys.argv[1]](Server(*sys.argv[2:]))
