# SPDX-License-Identifier: Apache-2.0
"""Prompts that answers repeat, and their log-probabilities: those of the whole model run on the prompt alone."""

import asyncio

import pytest
import torch

from tests.server.asking import check_error
from tests.server.running import events
from wedlm import LLM, SamplingParams
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.async_llm import AsyncEngine
from wedlm.engine.prompt_logprobs import PromptScorer

TEXT = "/v1/completions"
PROMPT = "é caf and a prompt that is longer than a page of the cache"


def expected(llm: LLM, prompt: list[int]) -> torch.Tensor:
    """[tokens - 1, vocabulary]"""
    with torch.inference_mode():
        tokens = torch.tensor(prompt)
        logits = llm.model(tokens, torch.arange(len(prompt)), CausalAttend()).float()
    return torch.log_softmax(logits, -1)[:-1]


def test_the_prompt_and_what_follows(running, reference):
    ids = reference.tokenizer.encode(PROMPT)
    rows = expected(reference, ids)
    own = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    output = reference.generate(PROMPT, SamplingParams(max_tokens=3, logprobs=2))[0]
    for prompt in (PROMPT, ids):
        body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0}
        choice = running.post(TEXT, body).json()["choices"][0]
        assert choice["text"] == PROMPT + output.text
        found = choice["logprobs"]
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-4)
        assert found["token_logprobs"][len(ids) :] == pytest.approx(output.logprobs, abs=1e-4)
        best = rows.topk(2).values
        for top, values in zip(found["top_logprobs"][1 : len(ids)], best.tolist(), strict=True):
            assert sorted(top.values(), reverse=True) == pytest.approx(values, abs=1e-4)
        assert found["text_offset"][len(ids)] == len(PROMPT)
        assert len({len(found[name]) for name in found}) == 1


def test_the_prompt_alone(running, reference):
    """As lm_eval asks for likelihoods, and as OpenAI lets one ask."""
    ids = reference.tokenizer.encode("Hello")
    body = {"prompt": [ids, [5, 6, 7]], "echo": True, "logprobs": 1, "temperature": 0}
    none, one = (running.post(TEXT, {**body, "max_tokens": n}).json() for n in (0, 1))
    assert [choice["text"] for choice in none["choices"]] == ["Hello", reference.tokenizer.decode([5, 6, 7])]
    assert none["usage"]["completion_tokens"] == 0
    for without, choice in zip(none["choices"], one["choices"], strict=True):
        values = choice["logprobs"]["token_logprobs"]
        assert without["logprobs"]["token_logprobs"] == values[:-1]
        greedy = [
            value == max(top.values())
            for value, top in zip(values[1:], choice["logprobs"]["top_logprobs"][1:], strict=True)
        ]
        assert greedy[-1]


def test_vllms_prompt_logprobs(running, reference):
    ids = reference.tokenizer.encode("Hello")
    rows = expected(reference, ids)
    found = running.post(TEXT, {"prompt": "Hello", "prompt_logprobs": 2, "max_tokens": 1}).json()["choices"][0]
    assert "Hello" not in found["text"]
    first, *rest = found["prompt_logprobs"]
    assert first is None
    for token, entry, row in zip(ids[1:], rest, rows, strict=True):
        assert entry[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert entry[str(token)]["rank"] == 1 + int((row > row[token]).sum())
        assert {1, 2} <= {one["rank"] for one in entry.values()}


def test_a_repeated_prompt_in_a_stream(running, reference):
    body = {"prompt": "Hello", "echo": True, "max_tokens": 4, "temperature": 0}
    chunks = events(running.post(TEXT, {**body, "stream": True}))
    text = "Hello" + reference.generate("Hello", SamplingParams(max_tokens=4))[0].text
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text == running.text(**body)
    for more in ({"logprobs": 1}, {"max_tokens": 0}, {"prompt_logprobs": 1}):
        assert check_error(running.post(TEXT, {**body, "stream": True, **more}))["param"] == "stream"
    running.settled()


def test_bounds(running):
    body = {"prompt": "x" * 200, "echo": True, "logprobs": 1, "max_tokens": 1}
    assert "200 tokens" in check_error(running.post(TEXT, body))["message"]
    check_error(running.post(TEXT, {"prompt": [[99_999]], "echo": True, "logprobs": 1}))


def test_in_chunks_beside_requests(directory, monkeypatch):
    """Small chunks, few pages, other requests at the same time: the same figures, and nothing left behind."""
    monkeypatch.setattr("wedlm.engine.prompt_logprobs._CHUNK", 7)
    llm = LLM(directory, device="cpu", max_num_seqs=4)
    prompts = [llm.tokenizer.encode(text * 3) for text in ("abc de", "Hello you", "x")]
    wanted = [expected(llm, prompt).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist() for prompt in prompts]

    async def everything() -> list:
        engine = AsyncEngine(llm.engine, lambda broken: broken)
        try:
            stream = engine.submit([(prompts[0], SamplingParams(max_tokens=30, ignore_eos=True))] * 3)
            left = asyncio.ensure_future(engine.score_prompt(prompts[1], 1))
            scores = [asyncio.ensure_future(engine.score_prompt(prompt, 1)) for prompt in prompts]
            await asyncio.sleep(0)
            left.cancel()
            async for _ in stream:
                pass
            return await asyncio.gather(*scores)
        finally:
            await engine.stop()

    for found, values in zip(asyncio.run(everything()), wanted, strict=True):
        assert found.logprobs == pytest.approx(values, abs=1e-4)
        assert len(found.top) == len(found.ranks) == len(values)
    llm.engine.pool.check_integrity()
    assert llm.engine.pool.num_available == llm.engine.pool.num_pages


def test_a_prompt_that_cannot_run(reference):
    for prompt in ([], [1] * 1000, [10**6], [-1]):
        with pytest.raises(ValueError, match="the prompt has"):
            PromptScorer(reference.engine, prompt, 0)
