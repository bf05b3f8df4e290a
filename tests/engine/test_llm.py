# SPDX-License-Identifier: Apache-2.0
"""LLM from a checkpoint on disk: what goes in, what comes out, and that neighbours never show in a text."""

import copy
import random

import pytest

from tests.engine.tiny_llm import END, LENGTH, MASK, PROMPTS, SLOT_BYTES, VOCAB, alone, check_empty
from tests.tiers import EACH_DECODING
from wedlm.algorithm.params import DECODINGS
from wedlm.engine.llm import LLM
from wedlm.engine.sampling_params import SamplingParams

SHORT = SamplingParams(max_tokens=12)


def mixed_params(seed: int = 0) -> list[SamplingParams]:
    """One per prompt: every mode, greedy and sampled, cut at different lengths."""
    rng = random.Random(seed)
    return [
        SamplingParams(
            decoding=DECODINGS[i % 5],
            max_tokens=rng.randint(1, 30),
            temperature=rng.choice([0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=i,
            wedlm_window_size=rng.choice([1, 4, 16]),
            wedlm_entropy_threshold=rng.choice([None, 1.0, 2.5]),
        )
        for i in range(len(PROMPTS))
    ]


def test_prompts_as_text_ids_and_lists(llm):
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = [alone(llm, prompt, SHORT).text for prompt in PROMPTS]
    assert len(set(texts)) == len(texts)
    assert [o.text for o in llm.generate(PROMPTS, SHORT)] == texts
    assert [o.text for o in llm.generate(ids, SHORT)] == texts
    assert [o.text for o in llm.generate([PROMPTS[0], ids[1], PROMPTS[2]], SHORT)] == texts[:3]
    assert [o.text for o in llm.generate(tuple(PROMPTS), SHORT)] == texts
    assert [o.text for o in llm.generate(PROMPTS[1], SHORT)] == [texts[1]]
    assert [o.text for o in llm.generate(ids[1], SHORT)] == [texts[1]]
    assert llm.generate([]) == []
    with pytest.raises(ValueError, match=r"the prompt is 1.5; expected a string or a list of token ids"):
        llm.generate([1.5])
    check_empty(llm)


def test_output_fields(llm):
    (output,) = llm.generate("Hello", SHORT)
    assert output["text"] == output.text == llm.tokenizer.decode(output.token_ids)
    assert output["token_ids"] == output.token_ids
    assert output["stats"] is output.stats
    assert output.finish_reason == "length"
    assert output.error is output.logprobs is output.top_logprobs is None
    assert len(output.token_ids) == len(output.token_steps) == 12
    assert output.token_steps == sorted(output.token_steps)
    for name in ("nothing", "__getitem__"):
        with pytest.raises(KeyError):
            output[name]
    stats = output.stats
    assert (stats.num_prompt_tokens, stats.num_tokens, stats.decoding) == (5, 12, "streaming")
    assert stats.num_forwards == output.token_steps[-1] + 1
    assert stats.tokens_per_forward == 12 / stats.num_forwards
    assert 0 < stats.p_cache == 12 / stats.num_rows <= 1
    assert stats.time_to_first_token_s > 0
    assert stats.tokens_per_second > 0


def test_one_params_or_one_per_prompt(llm):
    params = mixed_params()
    expected = [alone(llm, prompt, one).token_ids for prompt, one in zip(PROMPTS, params, strict=True)]
    assert [o.token_ids for o in llm.generate(PROMPTS, params)] == expected
    assert [o.token_ids for o in llm.generate(PROMPTS, tuple(params))] == expected
    assert [len(ids) for ids in expected] != [len(expected[0])] * len(expected)
    assert len(llm.generate("a")[0].token_ids) <= 256
    for wrong in (params[:-1], [], [*params, SHORT]):
        with pytest.raises(
            ValueError, match=f"params has {len(wrong)} entries; expected one, or one for each of the 6"
        ):
            llm.generate(PROMPTS, wrong)
    check_empty(llm)


@pytest.mark.parametrize("params", [[SHORT, None], [SHORT, "x"], {"max_tokens": 3}, 3, "x"], ids=str)
def test_params_of_a_wrong_type_leave_nothing_behind(llm, params):
    for ask in (llm.generate, lambda prompts, params: llm.generate_stream(prompts[0], params)):
        with pytest.raises(ValueError, match=r"params is .*; expected SamplingParams or a list of them"):
            ask(["a", "b"], params)
        check_empty(llm)


def test_impossible_prompts_fail_alone(directory):
    """The others finish with exactly the text that they have alone."""
    llm = LLM(directory, device="cpu", kv_cache_bytes=100 * SLOT_BYTES, page_size=4)
    prompts: list = list(PROMPTS[:4])
    impossible = {
        0: ("", "the prompt has 0 tokens; expected at least 1"),
        2: ([1] * LENGTH, f"the prompt has {LENGTH} tokens; expected at most {LENGTH - 1}"),
        3: ([1, VOCAB], f"the prompt contains {VOCAB}; expected ids from 0 to {VOCAB - 1}"),
        5: ([1, -1], "the prompt contains -1; expected ids from 0"),
        6: ([1, 2.0], "the prompt contains 2.0; expected ids from 0"),
        7: ([1] * 110, "cache slots; expected at most"),
        9: ("\ud800", "the prompt is not valid Unicode (surrogates not allowed); expected valid characters"),
        10: (None, "the prompt is None; expected a string or a list of token ids"),
    }
    for index, (prompt, _) in impossible.items():
        prompts.insert(index, prompt)
    good = [i for i in range(len(prompts)) if i not in impossible]
    params = [SamplingParams(max_tokens=20, decoding=DECODINGS[i % 5]) for i in range(len(prompts))]
    expected = {i: alone(llm, prompts[i], params[i]).token_ids for i in good}
    with pytest.warns(UserWarning, match="was refused") as caught:
        outputs = llm.generate(prompts, params)
    assert [str(w.message).split(" was refused: ")[0] for w in caught] == [f"prompt {i}" for i in impossible]
    assert all(w.filename == __file__ for w in caught)
    for i, output in enumerate(outputs):
        if i in expected:
            assert (output.token_ids, output.error) == (expected[i], None)
        else:
            assert impossible[i][1] in output.error
            assert (output.text, output.token_ids, output.finish_reason, output.stats) == ("", [], "error", None)
    check_empty(llm)
    with pytest.raises(ValueError, match="the prompt has 0 tokens; expected at least 1"):
        llm.generate(["", [1] * LENGTH])
    check_empty(llm)


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_leaves_nothing_behind(llm):
    with pytest.raises(UserWarning, match="prompt 1 was refused"):
        llm.generate(["a", ""], SHORT)
    check_empty(llm)


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_the_mask_id_is_an_ordinary_token_of_a_prompt(llm, decoding):
    params = SamplingParams(decoding=decoding, max_tokens=20, temperature=1.0, seed=1)
    prompt = [1, MASK, 2, MASK]
    output = alone(llm, prompt, params)
    assert MASK not in output.token_ids
    assert alone(llm, [1, 2], params).token_ids != output.token_ids
    assert llm.generate([prompt, *PROMPTS], params)[0].token_ids == output.token_ids


def test_same_seed_same_text_whatever_else_runs(llm):
    params = [SamplingParams(temperature=1.0, seed=5, max_tokens=25, decoding=d) for d in DECODINGS]
    expected = [alone(llm, "Hello", p).token_ids for p in params]
    texts = dict(zip(DECODINGS, expected, strict=True))
    assert texts["verified"] == texts["auto"] == texts["autoregressive"] != texts["streaming"]
    for others in (["x"], PROMPTS, PROMPTS * 3):
        beside = [SamplingParams(temperature=1.0, max_tokens=9, decoding=DECODINGS[i % 5]) for i in range(len(others))]
        outputs = llm.generate([*others, *["Hello"] * 5], [*beside, *params])
        assert [o.token_ids for o in outputs[-5:]] == expected
    other_seed = SamplingParams(temperature=1.0, seed=6, max_tokens=25, decoding="autoregressive")
    assert alone(llm, "Hello", other_seed).token_ids != expected[3]


def test_seed_none_draws_a_new_one(llm):
    """For each request, also where one object serves all."""
    outputs = llm.generate(["Hello"] * 5, SamplingParams(temperature=1.5, max_tokens=15))
    assert len({tuple(output.token_ids) for output in outputs}) == 5


def test_params_are_not_edited(llm):
    """The original implementation edits the object that its caller gave it."""
    params = SamplingParams(stop=["q", "zz"], stop_token_ids=[3], temperature=0.7, max_tokens=9, top_k=-1)
    before = copy.copy(params)
    llm.generate(PROMPTS, params)
    list(llm.generate_stream("a", params))
    assert params == before


def test_a_stop_string_that_names_a_special_token_stops_at_its_id(llm):
    """Text does not show special tokens, so it could never be found there."""
    options = {"max_tokens": 100, "ignore_eos": True, "temperature": 5.0}
    drawn = (llm.generate("Hello", SamplingParams(seed=seed, **options))[0] for seed in range(20))
    special = llm.tokenizer.special_ids
    seed, free = next((i, one) for i, one in enumerate(drawn) if not special.isdisjoint(one.token_ids))
    token = next(one for one in free.token_ids if one in special)
    stop = ["never there", llm.tokenizer.backend.id_to_token(token)]
    output = llm.generate("Hello", SamplingParams(seed=seed, stop=stop, **options))[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == free.token_ids[: free.token_ids.index(token) + 1]


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_stop_strings_end_the_text_and_are_not_in_it(llm, decoding):
    base = SamplingParams(decoding=decoding, max_tokens=40, ignore_eos=True, temperature=1.0, seed=3)
    whole = alone(llm, "Hello", base)
    stop = whole.text[9:12]  # three tokens: it crosses borders of tokens, and of steps
    assert "\ufffd" not in stop
    at = whole.text.index(stop)
    for strings in (stop, [stop], ["never there", stop, whole.text[20:24]]):
        params = SamplingParams(
            decoding=decoding, max_tokens=40, ignore_eos=True, temperature=1.0, seed=3, stop=strings
        )
        (output,) = llm.generate("Hello", params)
        assert output.text == whole.text[:at]
        assert output.finish_reason == "stop"
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
        assert len(output.token_ids) == len(output.token_steps) < 40
        pieces = list(llm.generate_stream("Hello", params))
        assert "".join(piece.text for piece in pieces) == output.text
    check_empty(llm)


def test_end_tokens_min_tokens_and_ignore_eos(llm):
    """The end token is the third of an answer that is otherwise known."""
    free = alone(llm, "Hello", SamplingParams(max_tokens=30, ignore_eos=True, decoding="autoregressive"))
    end = free.token_ids[2]
    at = free.token_ids.index(end)

    def ask(**options):
        return alone(llm, "Hello", SamplingParams(max_tokens=30, decoding="autoregressive", **options))

    stopped = ask(stop_token_ids=[end], ignore_eos=True)
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert (stopped.finish_reason, stopped.stats.num_tokens) == ("stop", at + 1)
    longer = ask(stop_token_ids=[end], ignore_eos=True, min_tokens=8)
    assert len(longer.token_ids) >= 8
    assert end not in longer.token_ids[:8]
    assert longer.token_ids[:at] == free.token_ids[:at]
    assert ask(stop_token_ids=[end], ignore_eos=True, min_tokens=30).finish_reason == "length"
    text_stop = ask(stop=llm.tokenizer.decode([end]), ignore_eos=True, min_tokens=8)
    assert len(text_stop.token_ids) >= 8
    assert text_stop.token_ids == free.token_ids[: len(text_stop.token_ids)]  # a stop string only delays, bans nothing


def test_the_checkpoints_end_token(directory, llm):
    """Ends a text and is no part of it, unless ignore_eos; min_tokens keeps it away."""
    params = [SamplingParams(max_tokens=60, temperature=3.0, seed=i, decoding=DECODINGS[i % 5]) for i in range(8)]
    ended = [o for o in llm.generate(["Hello"] * 8, params) if o.finish_reason == "stop"]
    assert ended
    for output in ended:
        assert output.token_ids.index(END) == len(output.token_ids) - 1
        assert output.text == llm.tokenizer.decode(output.token_ids[:-1])
    for options in ({"ignore_eos": True}, {"min_tokens": 60}):
        params = [
            SamplingParams(max_tokens=60, temperature=3.0, seed=i, decoding=DECODINGS[i % 5], **options)
            for i in range(8)
        ]
        assert {len(o.token_ids) for o in llm.generate(["Hello"] * 8, params)} == {60}


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_logprobs(llm, decoding):
    params = SamplingParams(decoding=decoding, max_tokens=15, logprobs=3)
    plain, output, none = llm.generate(["Hello"] * 3, [SHORT, params, SamplingParams(max_tokens=4, logprobs=0)])
    assert plain.logprobs is plain.top_logprobs is None
    assert len(none.logprobs) == 4
    assert none.top_logprobs is None
    assert len(output.logprobs) == len(output.top_logprobs) == 15
    for token, logprob, top in zip(output.token_ids, output.logprobs, output.top_logprobs, strict=True):
        assert len(top) == 3
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
        assert logprob <= 0
        found = dict(top)
        if token in found:
            assert found[token] == pytest.approx(logprob, abs=1e-5)
        else:
            assert logprob <= top[-1][1] + 1e-5
        assert token in found or MASK in found  # greedy: the best, but for the mask token
    expected = alone(llm, "Hello", SamplingParams(decoding=decoding, max_tokens=15))
    assert output.token_ids == expected.token_ids


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_the_models_length_cuts(directory, decoding):
    short = LLM(directory, device="cpu", max_model_len=20)
    params = SamplingParams(decoding=decoding, max_tokens=500, ignore_eos=True)
    output = alone(short, "abcdefgh", params)
    assert (len(output.token_ids), output.finish_reason) == (12, "length")
    assert len(alone(short, "abcdefgh" * 2 + "abc", params).token_ids) == 1
    with pytest.raises(ValueError, match="the prompt has 20 tokens; expected at most 19"):
        short.generate("abcde" * 4, params)


def test_max_tokens_never_changes_what_comes_before(llm):
    for decoding in DECODINGS:
        params = [SamplingParams(decoding=decoding, max_tokens=n, ignore_eos=True) for n in (1, 2, 7, 30)]
        outputs = llm.generate(["abc"] * 4, params)
        for output, one in zip(outputs, params, strict=True):
            assert output.token_ids == outputs[-1].token_ids[: one.max_tokens]


def test_the_engine_knows_who_reads_along(llm, monkeypatch):
    seen: list[tuple[str, bool]] = []
    step = llm.engine.step

    def noted():
        seen.extend((request.request_id, request.streamed) for request in llm.engine.requests.values())
        return step()

    monkeypatch.setattr(llm.engine, "step", noted)
    stream = llm.generate_stream("Hello", SHORT)
    llm.generate(["abc", "def"], SHORT)
    assert list(dict(seen).values()) == [True, False, False]
    stream.close()
