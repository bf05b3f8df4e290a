# SPDX-License-Identifier: Apache-2.0
"""256 streams of the embedded model in one batch: each has the text that its prompt has alone."""

import itertools
import time

import pytest

from tests.server.running import serving
from tests.server.test_load import all_streams, text_of
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
TIE = 1e-4  # AR's two best log-probabilities closer than this: float error may order them either way


@pytest.fixture(scope="module")
def alone() -> list[GenerationOutput]:
    """One prompt after another, nothing beside it. AR decoding, because a step of one row is the cheapest on a CPU:
    verified and auto decoding must give its text."""
    reference = LLM("demo", **OPTIONS, kv_cache_bytes=2**26)
    params = SamplingParams(max_tokens=32, decoding="autoregressive", logprobs=2)
    return [reference.generate(prompt, params)[0] for prompt in PROMPTS]


def lead(output: GenerationOutput, token_ids: list[int]) -> float:
    """By how much the best token led where the two first differ."""
    assert output.top_logprobs is not None
    pairs = zip(output.token_ids, token_ids, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None:
        return float("inf")  # one is a beginning of the other: no tie explains that
    (_, best), (_, second) = output.top_logprobs[at]
    return best - second


@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.parametrize("decoding", ["auto", "verified", "autoregressive"])
def test_256_streams_of_the_demo_model(alone, decoding, record_property):
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
    ids = [[token for chunk in chunks for token in chunk["wedlm"]["token_ids"]] for chunks in answers]
    different = [
        i for i, output in enumerate(alone) if (text_of(answers[i]), ids[i]) != (output.text, output.token_ids)
    ]
    leads = {PROMPTS[i]: lead(alone[i], ids[i]) for i in different}
    record_property("equal", f"{len(PROMPTS) - len(different)} of {len(PROMPTS)}")
    record_property("excused", leads)
    record_property("different texts", len({output.text for output in alone}))
    record_property("tokens", sum(map(len, ids)))
    assert all(value < TIE for value in leads.values()), leads
