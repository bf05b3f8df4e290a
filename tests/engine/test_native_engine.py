# SPDX-License-Identifier: Apache-2.0
"""Weights in eight bits on a CPU: the engine runs on the native forward, and verified text is AR's, bit for bit."""

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.histories import run_histories
from tests.engine.native_model import NativeModel, needs_native, torch_threads
from tests.engine.tiny_llm import LENGTH, MASK, SLOT_BYTES, VOCAB, check_empty, save_tiny
from tests.model.gguf_files import write_blocks
from tests.model.masked_adapters import write_adapter
from tests.native.shapes import parts_of
from wedlm import LLM, SamplingParams
from wedlm.algorithm.params import DECODINGS
from wedlm.attention.base import ExtendBatch
from wedlm.evaluate.likelihood import LikelihoodScorer
from wedlm.model import load_model
from wedlm.native import NativeAttend, NativeTransformer

pytestmark = needs_native
EXACT = ("autoregressive", "verified", "auto")
FAMILIES = {
    "qwen3": {},
    "llama, tied": {"qk_norm": False, "tie_word_embeddings": True, "num_kv_heads": 1},
    "qwen2": {"qk_norm": False, "qkv_bias": True, "num_heads": 2},
}


def native_llm(directory: str | Path, threads: int = 1, **options) -> LLM:
    with torch_threads(threads):
        llm = LLM(directory, device="cpu", quantization="int8", **options)
    assert isinstance(llm.model, NativeTransformer)
    assert llm.model.threads == min(threads, os.cpu_count() or 1)
    return llm


@pytest.fixture(scope="module")
def native(directory) -> LLM:
    return native_llm(directory)


def texts(llm: LLM, prompts: list, params: list[SamplingParams], decoding: str, size: int) -> list[list[int]]:
    """Tokens, in batches of ``size``."""
    asked = [replace(one, decoding=decoding) for one in params]
    found = []
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        found += [output.token_ids for output in llm.generate(prompts[part], asked[part], progress=False)]
        check_empty(llm)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_verified_and_auto_give_ars_text(tmp_path, family):
    """At temperatures 0 and 1, alone, in batches of 4 and 16, in chunks of any size, with preemption and reuse, on 1
    and 2 threads: not one token differs."""
    directory = save_tiny(tmp_path, **FAMILIES[family])
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB - 3) for _ in range(rng.choice([1, 3, 17, 40]))] for _ in range(16)]
    prompts[5:8] = [prompts[3][:30] + prompt for prompt in prompts[5:8]]
    params = [SamplingParams(max_tokens=24, temperature=i % 2, seed=i, wedlm_window_size=7) for i in range(16)]
    slot_bytes = (SLOT_BYTES // 2) * FAMILIES[family].get("num_kv_heads", 2)
    roomy = native_llm(directory)
    tight = native_llm(directory, max_num_seqs=16, kv_cache_bytes=slot_bytes * (LENGTH + 64), page_size=4)
    chunked = native_llm(directory, max_num_seqs=16, max_num_batched_tokens=24, page_size=1)
    expected = texts(roomy, prompts, params, "autoregressive", 1)
    assert max(map(len, expected)) == 24
    for decoding in EXACT:
        assert texts(tight, prompts, params, decoding, 16) == expected
        assert texts(chunked, prompts, params, decoding, 16) == expected
        assert texts(native_llm(directory, threads=2), prompts, params, decoding, 4) == expected
    assert texts(roomy, prompts, params, "verified", 1) == expected
    assert texts(roomy, prompts, params, "auto", 4) == expected
    stats = [output.stats for output in tight.generate(prompts, params, progress=False)]
    assert sum(one.num_preemptions for one in stats) > 0
    assert sum(one.num_reused_tokens for one in stats) > 0


@pytest.mark.parametrize(
    ("threads", "adapter", "cache_dtype"),
    [
        (1, False, torch.float32),
        (1, True, torch.int8),
        (2, True, torch.float32),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (1, False, torch.int8),
                (1, True, torch.float32),
                (2, False, torch.float32),
                (2, False, torch.int8),
                (2, True, torch.int8),
            )
        ),
    ],
)
def test_histories(threads, adapter, cache_dtype):
    """Random adding, aborting and preempting, in all modes: reference.py's tokens and steps, and at all times the
    cache's bits are those of one forward (without the adapter, if there is one: no key of a masked row stays)."""
    run_histories(range(12), NativeModel(min(threads, os.cpu_count() or 1), adapter, cache_dtype))


@pytest.mark.parametrize("form", ["int8", "Q8_0"])
def test_an_adapter_of_masked_rows_changes_no_ar_text(tmp_path, form):
    """By the path of a directory or a file, and the adapter's: alone and in batches, verified and auto decoding give
    AR's text without the adapter. What masked rows fill in by streaming is another text."""
    directory = save_tiny(tmp_path / "base", hidden_size=64, intermediate_size=64, head_dim=32, num_kv_heads=1)
    adapter = write_adapter(tmp_path / "adapter", load_model(directory)[0])
    path, quantization = directory, "int8"
    if form != "int8":
        path, quantization = write_blocks(tmp_path / "m.gguf", directory, form), "auto"
    options = {"device": "cpu", "quantization": quantization, "max_num_seqs": 8, "mask_token_id": MASK}
    base, adapted = LLM(path, **options), LLM(path, adapter=adapter, **options)
    assert "native C++ forward" in adapted.describe()
    rng = random.Random(1)
    prompts = [[rng.randrange(90) for _ in range(rng.choice([1, 3, 17, 40]))] for _ in range(8)]
    params = [SamplingParams(max_tokens=24, temperature=i % 2, seed=i, wedlm_window_size=7) for i in range(8)]
    expected = texts(base, prompts, params, "autoregressive", 1)
    for decoding in EXACT:
        assert texts(adapted, prompts, params, decoding, 1) == expected
        assert texts(adapted, prompts, params, decoding, 8) == expected
    streamed = [texts(llm, prompts, params, "streaming", 1) for llm in (base, adapted)]
    assert streamed[0] != streamed[1]


def test_an_adapter_of_another_model_is_refused(directory, tmp_path):
    other = save_tiny(tmp_path / "other", hidden_size=64, intermediate_size=64)
    adapter = write_adapter(tmp_path / "adapter", load_model(other)[0])
    with pytest.raises(ValueError, match=r"the change of .* has shape .*; expected .*, the model's"):
        native_llm(directory, adapter=adapter)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_everything_that_requests_may_ask_for(native, decoding):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = SamplingParams(max_tokens=30, decoding=decoding, wedlm_window_size=6)
    several = [
        replace(asked, json_schema=schema),
        replace(asked, presence_penalty=0.5, frequency_penalty=0.5),
        replace(asked, logprobs=3),
        replace(asked, temperature=1.0, top_k=5, top_p=0.9, seed=4),
        replace(asked, temperature=1.0, min_p=0.1, repetition_penalty=1.2, seed=4),
    ]
    outputs = native.generate(["abc"] * len(several), several, progress=False)
    if outputs[0].finish_reason == "stop":
        assert isinstance(json.loads(outputs[0].text)["a"], int)
    assert len(set(outputs[1].token_ids)) > 1
    assert len(outputs[2].top_logprobs) == len(outputs[2].token_ids) > 0
    pieces = list(native.generate_stream("abc", several[2]))
    assert "".join(piece.text for piece in pieces) == outputs[2].text
    if decoding in EXACT:
        ar = native.generate(
            ["abc"] * len(several), [replace(one, decoding="autoregressive") for one in several], progress=False
        )
        assert [one.token_ids for one in outputs] == [one.token_ids for one in ar]
    check_empty(native)


def test_likelihoods_are_those_of_one_forward(native):
    pairs = [([1, 2, 3, 4], [5, 6]), ([1, 2, 3, 4], [7]), ([9], [1, 2, 3])]
    scores = dict(LikelihoodScorer(native).score(pairs))
    for index, (context, continuation) in enumerate(pairs):
        tokens = torch.tensor([*context, *continuation])
        logprobs = native.engine.runner.eager.model(
            tokens, torch.arange(len(tokens)), NativeAttend(native.engine.runner.cache, _one(len(tokens)))
        ).log_softmax(-1)
        rows = torch.arange(len(context) - 1, len(tokens) - 1)
        expected = logprobs[rows, tokens[rows + 1]].sum()
        assert scores[index].logprob == pytest.approx(float(expected), abs=1e-5)


def _one(count: int) -> ExtendBatch:
    return ExtendBatch([0], [count], [list(range(-(-count // 16)))])


def test_a_cache_in_eight_bits(directory):
    """A quarter of float32's memory and the scales; verified and auto decoding give AR's text in it, which may be
    another than with a cache in float32."""
    options = {"max_num_seqs": 16, "page_size": 4}
    llm = native_llm(directory, kv_cache_dtype="int8", **options)
    wide = native_llm(directory, **options)
    assert "; cache: int8, " in llm.describe()
    assert llm.engine.pool.num_pages == wide.engine.pool.num_pages
    sizes = [sum(part.nbytes for part in parts_of(one.engine.runner.cache)) for one in (llm, wide)]
    assert sizes[0] / sizes[1] == (16 + 4) / 64
    assert llm.blueprint.rebuild(llm.engine).runner.cache.keys.dtype == torch.int8
    rng = random.Random(1)
    prompts = [[rng.randrange(VOCAB - 3) for _ in range(rng.choice([1, 3, 17, 40]))] for _ in range(16)]
    params = [SamplingParams(max_tokens=24, temperature=i % 2, seed=i, wedlm_window_size=7) for i in range(16)]
    expected = texts(llm, prompts, params, "autoregressive", 1)
    tight_bytes = 2 * 2 * 2 * (16 + 4) * (LENGTH + 64)
    tight = native_llm(
        directory, kv_cache_dtype="int8", kv_cache_bytes=tight_bytes, max_num_batched_tokens=24, **options
    )
    for decoding in EXACT:
        assert texts(llm, prompts, params, decoding, 16) == expected
        assert texts(tight, prompts, params, decoding, 16) == expected
    assert sum(one.stats.num_preemptions for one in tight.generate(prompts, params, progress=False)) > 0


def test_torchs_forward_has_no_cache_in_eight_bits(directory):
    said = "kv_cache_dtype is 'int8' and the model is in float32 on cpu; expected the native forward of CPUs"
    with pytest.raises(ValueError, match=said):
        LLM(directory, device="cpu", dtype="float32", kv_cache_dtype="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_said_and_kept(directory, dtype):
    llm = native_llm(directory, dtype=dtype)
    about = re.escape(
        "cpu; weights: int8; activations: float32, rounded to int8 for matrix products; cache: float32, TOKENS; "
        f"steps: native C++ forward ({llm.model.path}), threads: 1"
    ).replace("TOKENS", r"[\d,]+ tokens \(\d+ MB\)")
    assert re.fullmatch(about, llm.describe())
    assert llm.engine.runner.cache.keys.dtype == torch.float32
    assert llm.blueprint.rebuild(llm.engine).runner.eager.model is llm.model
    assert llm.generate("a", SamplingParams(max_tokens=5))[0].stats.num_tokens == 5
    for other in (LLM(directory, device="cpu"), LLM(directory, device="cpu", dtype="float32")):
        assert "native" not in other.describe()  # it is chosen only where it is asked for


def test_graphs_cannot_be_asked_for(directory):
    with pytest.raises(ValueError, match="cuda_graphs is True, but the device is cpu"):
        LLM(directory, device="cpu", quantization="int8", cuda_graphs=True)


def test_a_wrong_instruction_set_is_refused(directory, monkeypatch):
    monkeypatch.setenv("WEDLM_NATIVE_PATH", "mmx")
    with pytest.raises(ValueError, match="instruction set is 'mmx'; expected one of"):
        LLM(directory, device="cpu", quantization="int8")
