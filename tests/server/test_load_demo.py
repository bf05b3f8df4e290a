# SPDX-License-Identifier: Apache-2.0
"""256 streams of the embedded model in one batch: each has the text that its prompt has alone."""

import itertools
import time

import pytest
import torch

from tests.model.tiny import causal_attend
from tests.server.running import serving
from tests.server.streams import all_streams, text_of
from wedlm import LLM, SamplingParams
from wedlm.engine.outputs import GenerationOutput

VERBS = ["Describe", "Explain", "Draw", "Name a use of", "Praise", "Define", "Sell me", "Write a poem about"]
VERBS += [
    "List kinds of",
    "Who invented",
    "Why do people like",
    "Where do I find",
    "How do I clean",
    "Compare two kinds of",
]
VERBS += ["Tell a child about", "What is the price of"]
NOUNS = ["bread", "a bridge", "the moon", "coffee", "a violin", "snow", "money", "a train"]
NOUNS += ["cheese", "the sea", "a clock", "paper", "wine", "a garden", "glass", "salt"]
PROMPTS = [f"{verb} {noun}." for verb, noun in itertools.product(VERBS, NOUNS)]
OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "max_num_seqs": len(PROMPTS)}
FEW = 32  # prompts that are really run alone, which takes two seconds each
TIE = 1e-4  # logits closer than this may be ordered either way by forwards of other sizes


@pytest.fixture(scope="module")
def reference() -> LLM:
    return LLM("demo", **OPTIONS, kv_cache_bytes=2**26)


@pytest.fixture(scope="module")
def alone(reference) -> list[GenerationOutput]:
    """Nothing beside it. AR decoding, whose steps are the cheapest: verified and auto decoding must give its text."""
    params = SamplingParams(max_tokens=32, decoding="autoregressive")
    return [reference.generate(prompt, params)[0] for prompt in PROMPTS[:: len(PROMPTS) // FEW]]


def distances(llm: LLM, prompt: str, token_ids: list[int]) -> list[float]:
    """How far each token's logit is below the best one: 0 for all of the text that AR decoding gives the prompt alone,
    and of no other. One plain causal forward over all rows; no engine, no cache, no batch."""
    given = llm.tokenizer.encode(prompt)
    rows = torch.tensor(given + token_ids[:-1])
    choosing = torch.arange(len(given) - 1, len(rows))
    with torch.inference_mode():
        logits = llm.model(rows, torch.arange(len(rows)), causal_attend, choosing).float()
        logits[:, llm.engine.config.mask_token_id] = -torch.inf
        return (logits.max(1).values - logits[torch.arange(len(token_ids)), token_ids]).tolist()


@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("decoding", ["auto", "verified"])
def test_256_streams_of_the_demo_model(reference, alone, decoding, record_property):
    """Float32, temperature 0, 32 tokens each."""
    llm, most = LLM("demo", **OPTIONS, kv_cache_bytes=2**30), []
    with serving(llm, request_timeout_s=3600) as running:
        step = llm.engine.step
        llm.engine.step = lambda: (most.append(len(llm.engine.scheduler.running)), step())[1]
        start = time.perf_counter()
        sampling = {"max_tokens": 32, "decoding": decoding, "wedlm_window_size": 4}
        answers = all_streams(running, PROMPTS, **sampling)
        record_property("seconds", f"{time.perf_counter() - start:.0f}")
        running.settled()
    assert max(most) == len(PROMPTS), "they must have been in one batch"
    texts = [text_of(chunks) for chunks in answers]
    ids = [[token for chunk in chunks for token in chunk["wedlm"]["token_ids"]] for chunks in answers]
    ends = set(llm.engine.config.eos_token_ids)
    ties = greedy = 0
    for prompt, text, tokens in zip(PROMPTS, texts, ids, strict=True):
        assert len(tokens) == 32 or tokens[-1] in ends
        assert not ends & set(tokens[:-1])
        assert text == reference.tokenizer.decode(tokens)
        below = distances(reference, prompt, tokens)
        assert max(below) < TIE, (prompt, below)
        greedy += max(below) == 0
        ties += max(below) > 0
    same = sum(
        (text, tokens) == (output.text, output.token_ids)
        for text, tokens, output in zip(texts[:: len(PROMPTS) // FEW], ids[:: len(PROMPTS) // FEW], alone, strict=True)
    )
    record_property("AR's text of the prompt alone", f"{greedy} of {len(PROMPTS)}")
    record_property("at ties", ties)
    record_property("equal to a run alone", f"{same} of {len(alone)}")
    record_property("different texts", len(set(texts)))
    record_property("tokens", sum(map(len, ids)))
    assert same >= len(alone) - ties
