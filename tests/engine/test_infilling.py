# SPDX-License-Identifier: Apache-2.0
"""``LLM.infill``: what fills the gap between two texts, and what of it is refused."""

from dataclasses import replace

import pytest
import torch

from tests.engine.tiny_llm import END, LENGTH, MASK, VOCAB, alone, check_empty, save_tiny
from wedlm import LLM, SamplingParams
from wedlm.algorithm import reference
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.admission import decode_params

GAP = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PREFIX, SUFFIX = "The quick brown", " jumps over the lazy dog."


def filled_slowly(llm: LLM, prefix: str, suffix: str, params: SamplingParams) -> list[int]:
    """By reference.py, without a cache."""

    def rows(tokens: list[int], positions: list[int], num_masked: int) -> torch.Tensor:
        with torch.inference_mode():
            return llm.model(torch.tensor(tokens), torch.tensor(positions), CausalAttend())

    known, after = llm.tokenizer.encode(prefix), llm.tokenizer.encode(suffix)
    decode = decode_params(llm.engine.config, len(known), llm.before(suffix, params))
    return reference.decode(rows, known, params.max_tokens, decode, suffix=after).tokens


def test_it_is_what_the_reference_fills(llm):
    texts = [(PREFIX, SUFFIX), ("", "abc"), ("x", "y"), ("1 2 3", " 5 6")]
    asked = [replace(GAP, max_tokens=n) for n in (6, 1, 20, 40)]
    outputs = llm.infill([prefix for prefix, _ in texts], [suffix for _, suffix in texts], asked)
    for (prefix, suffix), params, output in zip(texts, asked, outputs, strict=True):
        assert output.token_ids == filled_slowly(llm, prefix, suffix, params)
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert (output.finish_reason, len(output.token_ids)) == ("length", params.max_tokens)
        assert output.stats.decoding == "streaming"
        assert output.stats.num_prompt_tokens == len(prefix) + len(suffix)
    check_empty(llm)


def test_masked_rows_decide_every_position(llm):
    """Of a gap, though not of a text without one, that begins with the same tokens in the cache."""
    masked, causal = (replace(GAP, wedlm_next_token=one) for one in ("masked", "causal"))
    by_masked, by_causal = (llm.infill(PREFIX, SUFFIX, params)[0] for params in (masked, causal))
    assert by_masked.token_ids == by_causal.token_ids
    assert by_masked.stats.num_forwards == by_causal.stats.num_forwards
    by_masked, by_causal = (
        alone(llm, PREFIX + SUFFIX, replace(params, decoding="streaming")) for params in (masked, causal)
    )
    assert by_masked.token_ids != by_causal.token_ids


def test_the_suffix_is_seen_and_where_it_stands(llm):
    """Another suffix, or another distance to it, fills another text."""
    texts = {llm.infill(PREFIX, suffix, GAP)[0].text for suffix in (SUFFIX, SUFFIX[::-1], "!")}
    longer = llm.infill(PREFIX, SUFFIX, replace(GAP, max_tokens=12))[0].text
    assert len(texts) == 3
    assert longer[:6] not in texts


def test_a_suffix_shares_no_page_with_a_text_without_a_gap(directory):
    """The same tokens in the same order, but at other positions: only what stands before the gap is found again."""
    llm = LLM(directory, device="cpu", page_size=4)
    plain = alone(llm, PREFIX + SUFFIX, SamplingParams(max_tokens=6, decoding="streaming"))
    gap = llm.infill(PREFIX, SUFFIX, GAP)[0]
    assert gap.stats.num_reused_tokens == len(PREFIX) // 4 * 4
    again, wider = (llm.infill(PREFIX, SUFFIX, replace(GAP, max_tokens=n))[0] for n in (6, 7))
    assert again.stats.num_reused_tokens == len(PREFIX + SUFFIX) // 4 * 4
    assert wider.stats.num_reused_tokens == len(PREFIX) // 4 * 4
    assert again.token_ids == gap.token_ids
    fresh = LLM(directory, device="cpu", page_size=4)
    assert wider.token_ids == fresh.infill(PREFIX, SUFFIX, replace(GAP, max_tokens=7))[0].token_ids
    assert alone(llm, PREFIX + SUFFIX, SamplingParams(max_tokens=6, decoding="streaming")).text == plain.text


def test_seeds_stops_and_log_probabilities(llm):
    params = replace(GAP, temperature=1.0, top_p=0.9, seed=3, logprobs=2, max_tokens=12)
    one, other = (llm.infill(PREFIX, SUFFIX, params)[0] for _ in range(2))
    assert one.token_ids == other.token_ids
    assert one.token_ids == filled_slowly(llm, PREFIX, SUFFIX, params)
    assert [len(top) for top in one.top_logprobs] == [2] * 12
    assert one.token_ids != llm.infill(PREFIX, SUFFIX, replace(params, seed=4))[0].token_ids
    stopped = llm.infill(PREFIX, SUFFIX, replace(params, stop=one.text[4:6]))[0]
    assert one.text.startswith(stopped.text)
    assert (stopped.finish_reason, len(stopped.text)) == ("stop", one.text.find(one.text[4:6]))


def test_an_end_token_closes_the_gap(llm):
    free = llm.infill(PREFIX, SUFFIX, GAP)[0]
    ends = replace(GAP, stop_token_ids=[free.token_ids[2]])
    first = free.token_ids.index(free.token_ids[2])
    closed = llm.infill(PREFIX, SUFFIX, ends)[0]
    assert (closed.finish_reason, closed.text) == ("stop", free.text[:first])
    kept = llm.infill(PREFIX, SUFFIX, replace(ends, min_tokens=6))[0]
    assert len(kept.token_ids) == 6
    assert free.token_ids[2] not in kept.token_ids


def test_of_several_lengths_the_most_likely_text_is_kept(llm):
    lengths = (1, 2, 5, 9)
    texts = [(PREFIX, SUFFIX), ("x", "y" * 40)]
    chosen = llm.infill([prefix for prefix, _ in texts], [suffix for _, suffix in texts], GAP, lengths=lengths)
    for (prefix, suffix), output in zip(texts, chosen, strict=True):
        scores = {}
        for length in lengths:
            filling = llm.infill(prefix, suffix, replace(GAP, max_tokens=length))[0].token_ids
            text = [*llm.tokenizer.encode(prefix), *filling, *llm.tokenizer.encode(suffix)[:32]]
            tokens = torch.tensor(text)
            with torch.inference_mode():
                rows = torch.log_softmax(llm.model(tokens, torch.arange(len(text)), CausalAttend()).float(), -1)
            own = rows[:-1].gather(1, tokens[1:, None])[:, 0]
            scores[tuple(filling)] = float(own[len(prefix) - 1 :].mean())
        assert tuple(output.token_ids) == max(scores, key=scores.get)
    check_empty(llm)


def test_it_streams_from_the_left(llm):
    pieces = list(llm.generate_stream(PREFIX, llm.before(SUFFIX, GAP)))
    assert "".join(piece.text for piece in pieces) == llm.infill(PREFIX, SUFFIX, GAP)[0].text
    assert len(pieces) > 1


def test_what_is_refused(llm, tmp_path):
    with pytest.raises(ValueError, match="decoding is 'verified', whose text is AR's, which sees no suffix; expected"):
        llm.infill("a", "b", SamplingParams(decoding="verified"))
    with pytest.raises(
        ValueError, match=f"max_tokens is {LENGTH}, the length of a gap between 1 and 1 tokens; expected"
    ):
        llm.infill("a", "b", SamplingParams(max_tokens=LENGTH))
    with pytest.raises(ValueError, match="the prompt and its suffix have 128 tokens; expected at most 127"):
        llm.infill("a" * 64, "b" * 64)
    with pytest.raises(ValueError, match="the prompt contains 9999"):
        llm.infill("a", [9999])
    with pytest.raises(ValueError, match="the suffix is ''; expected some text"):
        llm.infill("a", "")
    with pytest.raises(ValueError, match="there are 2 suffixes; expected one for each of 1 prefixes"):
        llm.infill("a", ["b", "c"])
    for lengths in ([], [0, 3]):
        with pytest.raises(ValueError, match=r"lengths are \["):
            llm.infill("a", "b", lengths=lengths)
    plain = save_tiny(tmp_path, model_type="qwen3", mask_token_id=None, decoding=None)
    with pytest.raises(ValueError, match="suffix has 1 tokens, and this checkpoint was never adapted"):
        LLM(plain, device="cpu").infill("a", "b")
    assert llm.infill("a", [END, MASK, VOCAB - 1], GAP)[0].error is None  # as tokens of a text
    check_empty(llm)
