# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client, LangChain and curl against the server: the engine's own texts, and the figures beside them."""

import asyncio
import json
import subprocess

import openai
import pytest

import wedlm
from tests.server.running import MODEL, events
from wedlm import LLM, SamplingParams
from wedlm.server.protocol import CompletionRequest

MESSAGES = [{"role": "user", "content": "Hello"}]


def chat_text(llm: LLM, **options) -> str:
    return llm.chat(MESSAGES, SamplingParams(**options))[0].text


def test_chat(client, reference):
    ours = {"decoding": "verified"}  # with auto the number of forwards depends on the load
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=20, extra_body=ours
    )
    expected = reference.chat(MESSAGES, SamplingParams(max_tokens=20, **ours))[0]
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason == "length"
    stats = expected.stats
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (stats.num_prompt_tokens, 20)
    assert answer.usage.total_tokens == stats.num_prompt_tokens + 20
    assert answer.usage.forwards == stats.num_forwards
    assert answer.usage.tokens_per_forward == pytest.approx(stats.tokens_per_forward)
    assert answer.usage.p_cache == pytest.approx(stats.p_cache)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1, "seed": 7, "top_p": 0.9}])
def test_stream_is_the_same_text(client, reference, options):
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 20},
            **options,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == chat_text(reference, max_tokens=30, top_k=20, **options)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_async_client_many_at_once(running, reference):
    prompts = [f"prompt {i}" for i in range(12)]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=10 + len(prompt), stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everything() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    texts = asyncio.run(everything())
    params = [SamplingParams(max_tokens=10 + len(prompt)) for prompt in prompts]
    assert texts == [output.text for output in reference.generate(prompts, params)]
    running.settled()


def test_several_prompts_and_choices(client, reference):
    """Choice i of a prompt has seed + i; choices of one prompt stand together."""
    answer = client.completions.create(model=MODEL, prompt=["ab", "xyz"], n=3, seed=5, temperature=1, max_tokens=8)
    wanted = [
        reference.generate(prompt, SamplingParams(seed=5 + i, temperature=1, max_tokens=8))[0].text
        for prompt in ("ab", "xyz")
        for i in range(3)
    ]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len(set(wanted[:3])) == 3
    assert answer.usage.prompt_tokens == 2 + 3
    assert answer.usage.completion_tokens == 48


def test_prompts_of_token_ids(client, reference):
    ids = reference.tokenizer.encode("Hello")
    for prompt in (ids, [ids]):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6)
        assert answer.choices[0].text == reference.generate("Hello", SamplingParams(max_tokens=6))[0].text
    default = client.completions.create(model=MODEL, prompt="x", temperature=0)
    assert default.usage.completion_tokens == 16


def test_stop_and_our_fields(running, reference):
    for decoding in ("streaming", "verified", "block", "autoregressive"):
        ours = {"decoding": decoding, "wedlm_window_size": 8, "wedlm_entropy_threshold": None, "min_tokens": 3}
        full = reference.generate("abc", SamplingParams(max_tokens=40, **ours))[0].text
        stop = full[20:22]
        expected = reference.generate("abc", SamplingParams(max_tokens=40, stop=stop, **ours))[0]
        body = {"prompt": "abc", "temperature": 0, "max_tokens": 40, "stop": [stop], **ours}
        answer = running.post("/v1/completions", body).json()
        assert answer["choices"][0]["text"] == expected.text
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["decoding"] == decoding
        assert answer["usage"]["forwards"] == expected.stats.num_forwards
        chunks = events(running.post("/v1/completions", {**body, "stream": True}))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text


def test_null_threshold_is_not_the_default():
    """None is a value of this field; of all others it is the default."""
    body = {"model": MODEL, "prompt": "abc"}
    assert CompletionRequest.model_validate(body).sampling_params(5).wedlm_entropy_threshold == "auto"
    for given in (None, 2, "auto"):
        request = CompletionRequest.model_validate({**body, "wedlm_entropy_threshold": given})
        assert request.sampling_params(5).wedlm_entropy_threshold == given
    nulls = {"temperature": None, "top_p": None, "seed": None, "stop": None, "max_tokens": None, "decoding": None}
    params = CompletionRequest.model_validate({**body, **nulls}).sampling_params(5)
    assert params == SamplingParams(temperature=1.0, max_tokens=5)


def test_chunks_tell_steps_and_tokens(running, reference):
    """What a page needs: every token, its text and the forward that made it final; the texts make up the answer."""
    prompt = "é caf"
    expected = reference.generate(prompt, SamplingParams(max_tokens=30, decoding="verified"))[0]
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 30, "stream": True, "decoding": "verified"}
    chunks = events(running.post("/v1/completions", body))
    news = [chunk["wedlm"] for chunk in chunks]
    assert [token for one in news for token in one["token_ids"]] == expected.token_ids
    assert [one["step"] for one in news for _ in one["token_ids"]] == expected.token_steps
    assert all(len(one["tokens"]) == len(one["token_ids"]) for one in news)
    assert "".join(text for one in news for text in one["tokens"]) == expected.text
    assert not any("window" in one for one in news)


@pytest.mark.parametrize("decoding", ["streaming", "verified", "block", "autoregressive"])
def test_trace_shows_each_window(running, reference, decoding):
    body = {"prompt": "abc", "temperature": 0, "max_tokens": 20, "decoding": decoding, "wedlm_window_size": 6}
    chunks = events(running.post("/v1/completions", {**body, "stream": True, "wedlm_trace": True}))
    params = SamplingParams(max_tokens=20, decoding=decoding, wedlm_window_size=6)
    expected = reference.generate("abc", params)[0]
    news = [chunk["wedlm"] for chunk in chunks]
    assert [one["step"] for one in news] == list(range(expected.stats.num_forwards))  # one chunk per forward
    emitted = 0
    for one in news[:-1]:
        emitted += len(one["token_ids"])
        window = one["window"]
        drafts = sum(token is not None for token in window["token_ids"]) - 1
        width = {"autoregressive": 1, "verified": 1 + drafts + 2 * (drafts + 1)}.get(decoding, 6)
        assert len(window["tokens"]) == len(window["token_ids"]) == width
        # What is final in the window is what was emitted.
        known = expected.token_ids[window["start"] : emitted]
        assert window["token_ids"][: len(known)] == known
    assert "window" not in news[-1]


def test_models_version_health(running, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "wedlm"
    with pytest.raises(openai.NotFoundError, match="no-model"):
        client.models.retrieve("no-model")
    assert running.http.get("/version").json() == {"version": wedlm.__version__}
    assert running.http.get("/health").json() == {"status": "ok"}
    for path in ("/health", "/", "/v1/models", f"/v1/models/{MODEL}", "/metrics", "/version", "/api/tags"):
        answer = running.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_conversations_reach_the_template(running, reference):
    """Parts are joined, "developer" is "system", and what an answer carries may be sent back."""
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "More", "name": "Ann"},
    ]
    plain = [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "More")]
    expected = reference.chat([{"role": r, "content": c} for r, c in plain], SamplingParams(max_tokens=9))[0].text
    answer = running.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 9})
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_without_a_limit_the_answer_ends_at_the_models_length(running, reference):
    answer = running.post("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == reference.engine.config.max_model_len


def test_langchain(running, reference):
    from langchain_openai import ChatOpenAI  # which takes a second

    chat = ChatOpenAI(model=MODEL, base_url=f"{running.url}/v1", api_key="none", temperature=0, max_tokens=12)
    expected = chat_text(reference, max_tokens=12)
    assert chat.invoke("Hello").content == expected
    assert "".join(chunk.text for chunk in chat.stream("Hello")) == expected


def test_curl(running, reference):
    body = json.dumps({"model": MODEL, "prompt": "Hello", "temperature": 0, "max_tokens": 5})
    url = f"{running.url}/v1/completions"
    command = ["curl", "-sS", url, "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert answer["choices"][0]["text"] == reference.generate("Hello", SamplingParams(max_tokens=5))[0].text
