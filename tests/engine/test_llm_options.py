# SPDX-License-Identifier: Apache-2.0
"""LLM's own options, chat, warnings, and what a small or a warm cache does."""

import re

import pytest
import torch

from tests.engine.tiny_llm import (
    ASSISTANT,
    LENGTH,
    MASK,
    PROMPTS,
    SLOT_BYTES,
    USER,
    VOCAB,
    alone,
    check_empty,
    save_tiny,
)
from wedlm.algorithm.params import DECODINGS
from wedlm.engine import factory
from wedlm.engine.llm import LLM
from wedlm.engine.sampling_params import SamplingParams

SHORT = SamplingParams(max_tokens=12)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("page_size", 0, "an integer >= 1"),
        ("page_size", 1.5, "an integer >= 1"),
        ("max_num_seqs", 0, "an integer >= 1"),
        ("max_num_seqs", True, "an integer >= 1"),
        ("max_num_batched_tokens", -1, "an integer >= 1"),
        ("wedlm_window_size", 0, "an integer >= 1"),
        ("kv_cache_bytes", 0, "an integer >= 1"),
        ("kv_cache_bytes", "1GB", "an integer >= 1"),
        ("kv_cache_bytes", 16 * SLOT_BYTES - 1, f"at least {16 * SLOT_BYTES}, one page"),
        ("gpu_memory_utilization", 2, "a number > 0 and <= 1"),
        ("gpu_memory_utilization", 0, "a number > 0 and <= 1"),
        ("gpu_memory_utilization", float("nan"), "a number > 0 and <= 1"),
        ("gpu_memory_utilization", "0.9", "a number > 0 and <= 1"),
        ("quantization", "int4", "one of auto, none, int8, fp8"),
        ("quantization", True, "one of auto, none, int8, fp8"),
        ("kv_cache_bytes", 10**15, "at most"),
        ("chunk_step_ratio", 1, "a number > 1, or inf"),
        ("chunk_step_ratio", -2.0, "a number > 1, or inf"),
        ("chunk_step_ratio", float("nan"), "a number > 1, or inf"),
        ("chunk_step_ratio", "inf", "a number > 1, or inf"),
        ("chunk_step_ratio", True, "a number > 1, or inf"),
        ("capture_chunks", 1, "True or False"),
        ("capture_chunks", None, "True or False"),
        ("allow_control_tokens", 1, "True or False"),
        ("max_model_len", 1, f"2 to {LENGTH}"),
        ("max_model_len", 64.0, f"2 to {LENGTH}"),
        ("dtype", "int8", "auto, float32, bfloat16 or float16"),
        ("dtype", "nonsense", "auto, float32, bfloat16 or float16"),
        ("dtype", torch.float32, "auto, float32, bfloat16 or float16"),
        ("decoding", "x", "one of auto, streaming, verified, block, autoregressive"),
        ("mask_token_id", VOCAB, f"an id from 0 to {VOCAB - 1}"),
        ("mask_token_id", -1, f"an id from 0 to {VOCAB - 1}"),
        ("mask_token_id", True, f"an id from 0 to {VOCAB - 1}"),
    ],
)
def test_invalid_option(directory, option, value, expected):
    with pytest.raises(ValueError, match=f"^{option} is ") as caught:
        LLM(directory, device="cpu", **{option: value})
    assert str(caught.value).startswith(f"{option} is {value!r}; expected {expected}")


def test_unknown_option_is_an_error(directory):
    """The original implementation drops unknown options without a word."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_model_length'"):
        LLM(directory, max_model_length=20)


def test_defaults(directory, tmp_path):
    llm = LLM(directory, device="cpu")
    assert llm.engine.config.decoding == "auto"
    assert llm.engine.config.mask_token_id == MASK
    assert llm.engine.config.max_model_len == LENGTH
    assert LLM(directory, device="cpu", decoding="block").generate("a", SHORT)[0].stats.decoding == "block"
    ar = LLM(save_tiny(tmp_path, model_type="qwen3", mask_token_id=None, decoding=None), device="cpu")
    assert ar.engine.config.decoding == "auto"
    assert ar.engine.config.mask_token_id == ar.tokenizer.vocab_size  # the first embedding that no text needs
    assert alone(ar, "a", SHORT).text == alone(ar, "a", SamplingParams(max_tokens=12, decoding="autoregressive")).text
    assert LLM(directory, device="cpu", dtype="bfloat16").generate("a", SHORT)[0].stats.num_tokens == 12


def test_int8_without_the_library_is_refused(directory, monkeypatch):
    monkeypatch.setattr(factory, "is_available", lambda: False)
    with pytest.raises(ValueError, match="quantization is 'int8', but the native library was not built: no C"):
        LLM(directory, device="cpu", quantization="int8")


def test_fp8_is_another_model_whose_verified_text_is_its_ars(directory, fp8_anywhere):
    rounded = LLM(directory, device="cpu", quantization="fp8")
    about = "cpu; weights: fp8; activations: float32, rounded to fp8 for matrix products; cache: float32, "
    assert rounded.describe().startswith(about)
    layer = rounded.model.model.layers[0].self_attn
    assert layer.qkv_proj.weight.dtype == layer.o_proj.weight.dtype == torch.float8_e4m3fn
    texts = {
        name: [output.token_ids for output in rounded.generate(PROMPTS, SamplingParams(max_tokens=20, decoding=name))]
        for name in ("autoregressive", "verified", "auto")
    }
    assert texts["verified"] == texts["auto"] == texts["autoregressive"]


def test_the_head_in_fp8_is_another_model(tmp_path, directory, fp8_anywhere):
    with pytest.raises(ValueError, match="the vocabulary is 104; expected a multiple of 16"):
        LLM(directory, device="cpu", quantization="fp8", quantize_head=True)
    both = LLM(save_tiny(tmp_path, vocab_size=112), device="cpu", quantization="fp8", quantize_head=True)
    assert both.model.lm_head.weight.dtype == torch.float8_e4m3fn
    assert LLM(tmp_path, device="cpu", quantization="fp8").model.lm_head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="quantize_head is True and quantization is None; expected 'fp8'"):
        LLM(tmp_path, device="cpu", quantize_head=True)


def test_fp8_on_a_cpu_is_refused(directory):
    with pytest.raises(ValueError, match="quantization is 'fp8' and the device is cpu; expected an NVIDIA GPU"):
        LLM(directory, device="cpu", quantization="fp8")


def test_options_of_prompt_chunks(directory, llm):
    config = LLM(directory, device="cpu").engine.config
    assert (config.options.chunk_step_ratio, config.options.capture_chunks) == (
        float("inf"),
        True,
    )  # a CPU captures nothing
    paced = LLM(directory, device="cpu", chunk_step_ratio=2, capture_chunks=False)
    assert (paced.engine.config.options.chunk_step_ratio, paced.engine.config.options.capture_chunks) == (2, False)
    params = [SamplingParams(max_tokens=12, decoding="autoregressive")] * 2
    expected = [output.token_ids for output in llm.generate(["a", "Hello" * 15], params)]
    early = paced.generate_stream("a", params[0])
    pieces = [next(early)]  # so that the other prompt comes beside a window
    (late,) = paced.generate(["Hello" * 15], params[1:])
    assert [[token for piece in [*pieces, *early] for token in piece.token_ids], late.token_ids] == expected
    assert paced.engine.controller.prefill_budget.ratio == 2
    check_empty(paced)


def test_control_tokens_in_messages(llm, directory):
    user = [{"role": "user", "content": "hi<|assistant|>"}]
    assert llm.chat_prompt(user) == [USER, *map(llm.tokenizer.token_id, "hi<|assistant|>"), ASSISTANT]
    allowed = [USER, *llm.tokenizer.encode("hi"), ASSISTANT, ASSISTANT]
    assert llm.chat_prompt(user, allow_control_tokens=True) == allowed
    lax = LLM(directory, device="cpu", allow_control_tokens=True)
    assert lax.chat_prompt(user) == allowed
    assert lax.chat_prompt(user, allow_control_tokens=False) == llm.chat_prompt(user)
    for prompt, options in ((allowed, {"allow_control_tokens": True}), (llm.chat_prompt(user), {})):
        assert [o.text for o in llm.chat(user, SHORT, **options)] == [alone(llm, prompt, SHORT).text]


def test_no_room_for_a_mask_token(tmp_path):
    """Text needs every id, and the model loads all the same."""
    save_tiny(tmp_path, model_type="qwen3", mask_token_id=None, vocab_size=MASK)
    said = "uses all 101 ids: 100 ('<|assistant|>') stands for masked positions and is never generated"
    with pytest.warns(UserWarning, match=re.escape(said)):
        llm = LLM(tmp_path, device="cpu")
    assert llm.engine.config.mask_token_id == 100
    assert "drafts come from the text alone" in llm.describe()
    llm = LLM(tmp_path, device="cpu", mask_token_id=7)
    assert 7 not in alone(llm, "Hello", SamplingParams(max_tokens=50)).token_ids


def test_a_checkpoint_without_a_mask_token_drafts_from_the_text_alone(tmp_path):
    """Its masked rows predict nothing and do not run, which is said; streaming warns once."""
    llm = LLM(save_tiny(tmp_path, model_type="qwen3", mask_token_id=None), device="cpu")
    assert "drafts come from the text alone: the checkpoint names no mask token" in llm.describe()
    expected = alone(llm, "Hello", SamplingParams(max_tokens=40, decoding="autoregressive", ignore_eos=True))
    for decoding in ("auto", "verified"):
        output = alone(llm, "Hello", SamplingParams(max_tokens=40, decoding=decoding, ignore_eos=True))
        assert output.token_ids == expected.token_ids
        stats = output.stats
        assert stats.decoding == decoding
        assert stats.num_drafted == stats.num_lookup_drafted
        assert stats.num_rows == stats.num_forwards + stats.num_drafted, "an anchor and drafts alone"
    assert 0 < stats.num_lookup_accepted < stats.num_lookup_drafted
    none = alone(llm, "Hello", SamplingParams(max_tokens=40, ignore_eos=True, wedlm_lookup_drafts=0))
    assert (none.token_ids, none.token_steps) == (expected.token_ids, expected.token_steps)
    streaming = SamplingParams(max_tokens=12, decoding="streaming")
    with pytest.warns(UserWarning, match="was never adapted to predict masked positions, so streaming decoding"):
        alone(llm, "Hello", streaming)
    alone(llm, "Hello", streaming)  # once is enough: another warning would be an error
    named = LLM(tmp_path, device="cpu", mask_token_id=MASK)  # whoever names one knows what for
    assert "drafts come from" not in named.describe()
    assert alone(named, "Hello", SamplingParams(max_tokens=12, decoding="verified")).stats.decoding == "verified"


def test_chat(llm):
    user = [{"role": "user", "content": "hi"}]
    assert llm.chat_prompt(user) == [USER, *llm.tokenizer.encode("hi"), ASSISTANT]
    expected = alone(llm, llm.chat_prompt(user), SHORT).text
    assert [o.text for o in llm.chat(user, SHORT)] == [expected]
    more = [*user, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    outputs = llm.chat([user, more], [SHORT, SamplingParams(max_tokens=3)])
    assert [len(o.token_ids) for o in outputs] == [12, 3]
    assert outputs[0].text == expected
    assert outputs[1].stats.num_prompt_tokens == len("hi" + "yes" + "why") + 4
    for empty in ([], [user, []]):
        with pytest.raises(ValueError, match="messages is empty; expected at least one message"):
            llm.chat(empty)
    check_empty(llm)


def test_chat_without_a_template(tmp_path):
    llm = LLM(save_tiny(tmp_path, chat=False), device="cpu")
    with pytest.raises(ValueError, match="this model's tokenizer has no chat template; expected a plain prompt"):
        llm.chat([{"role": "user", "content": "hi"}])
    check_empty(llm)
    assert alone(llm, "hi", SHORT).text


def test_a_window_wider_than_the_noise_block_warns(tmp_path, recwarn):
    llm = LLM(save_tiny(tmp_path, block_size=8), device="cpu", wedlm_window_size=8, decoding="streaming")
    narrow, wide = SamplingParams(max_tokens=3, wedlm_window_size=8), SamplingParams(max_tokens=3, wedlm_window_size=9)
    llm.generate("a", narrow)
    for decoding in ("autoregressive", "verified"):  # their masked rows, if any, are never so far from known tokens
        llm.generate("a", SamplingParams(max_tokens=3, wedlm_window_size=16, decoding=decoding))
    assert not recwarn.list
    for ask in (lambda: llm.generate("a", wide), lambda: list(llm.generate_stream("a", wide))):
        with pytest.warns(UserWarning, match="the window of 9 is wider than the noise block of 8") as caught:
            ask()
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the window of 16 is wider"):
        LLM(tmp_path, device="cpu", decoding="block").generate("a", SHORT)


def test_a_window_that_no_step_can_hold_is_refused(directory):
    llm = LLM(directory, device="cpu", max_num_batched_tokens=20, decoding="streaming")
    alone(llm, "Hello" * 10, SamplingParams(max_tokens=5, wedlm_window_size=10))
    with pytest.raises(
        ValueError, match=r"wedlm_window_size is 11, which can take 22 rows a step; expected at most max"
    ):
        llm.generate("Hello", SamplingParams(max_tokens=5, wedlm_window_size=11))
    alone(llm, "Hello", SamplingParams(max_tokens=5, wedlm_window_size=20, decoding="verified"))


def test_progress(llm, capsys):
    expected = [o.text for o in llm.generate(PROMPTS, SHORT)]
    assert capsys.readouterr() == ("", "")  # no terminal, no bar
    assert [o.text for o in llm.generate(PROMPTS, SHORT, progress=True)] == expected
    assert [o.text for o in llm.generate(PROMPTS, SHORT, progress=False)] == expected


@pytest.mark.parametrize("page_size", [16, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 4))])
def test_preemption_changes_no_text(directory, llm, page_size):
    tight = LLM(directory, device="cpu", page_size=page_size, kv_cache_bytes=112 * SLOT_BYTES, max_num_seqs=6)
    params = [
        SamplingParams(
            max_tokens=40, decoding=DECODINGS[i % 5], wedlm_window_size=8, temperature=i % 2, seed=i, logprobs=1
        )
        for i in range(len(PROMPTS))
    ]
    outputs = tight.generate(PROMPTS, params)
    check_empty(tight)
    assert sum(output.stats.num_preemptions for output in outputs) > 0
    for expected, output in zip(llm.generate(PROMPTS, params), outputs, strict=True):
        assert expected.stats.num_preemptions == 0
        assert (output.text, output.token_ids) == (expected.text, expected.token_ids)
        if output.stats.decoding != "auto":  # whose steps depend on the load
            assert output.token_steps == expected.token_steps
        torch.testing.assert_close(torch.tensor(output.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)


def test_prefix_reuse(directory):
    llm = LLM(directory, device="cpu", page_size=4, decoding="streaming")
    stem = "The quick brown fox jumps over the lazy dog. "
    first = alone(llm, stem + "One", SHORT)
    again = alone(llm, stem + "One", SHORT)
    other = alone(llm, stem + "Two", SHORT)
    ar = alone(llm, stem + "One", SamplingParams(max_tokens=12, decoding="autoregressive"))
    assert first.stats.num_reused_tokens == 0
    assert again.stats.num_reused_tokens == 48  # all 48 tokens of the prompt
    assert other.stats.num_reused_tokens == 44  # up to the first page that differs
    assert ar.stats.num_reused_tokens == 44  # all but the anchor's page
    assert again.text == first.text
    fresh = LLM(directory, device="cpu", page_size=4, decoding="streaming")
    assert alone(fresh, stem + "Two", SHORT).text == other.text
