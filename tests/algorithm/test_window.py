# SPDX-License-Identifier: Apache-2.0
"""The batched tensor algorithm against reference.py, token for token."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stub import StubModel
from wedlm.algorithm import reference
from wedlm.algorithm.params import DECODINGS, NEXT_TOKENS, REMASKINGS, DecodeParams
from wedlm.algorithm.reorder import leading_run, pack_rows, topological_order
from wedlm.algorithm.sample import SamplingBatch, ban_tokens, choose_tokens, entropy_and_logsumexp
from wedlm.algorithm.verify import row_layout
from wedlm.algorithm.window import RowResults, WindowParams, WindowState, extend, update_windows

MODEL = StubModel()


def decode_batch(model: StubModel, prompts: list[list[int]], max_tokens: list[int], params: list[DecodeParams]):
    """All sequences in lockstep through the tensor functions, each run of the model without a cache."""
    window_params = WindowParams.stack(params, torch.device("cpu"))
    state = WindowState.empty(len(params), max(p.max_rows for p in params), torch.device("cpu"))
    for s, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        state.cached[s] = len(prompt) - p.has_anchor
        state.width[s] = p.width(0, p.max_positions - int(state.cached[s]))
        state.filled[s, 0] = p.has_anchor
        state.tokens[s, 0] = prompt[-1] if p.has_anchor else 0
    history = [list(prompt) for prompt in prompts]
    out = [reference.ReferenceOutput([], [], []) for _ in params]
    done = [False] * len(params)
    for step in range(400):
        state, run = extend(state, window_params)
        results = forward_batch(model, state, history, params)
        widths = state.width.tolist()
        state, emitted = update_windows(state, run, results, window_params)
        check_state(state, params)
        for s, p in enumerate(params):
            if done[s]:
                continue
            out[s].rows.append(widths[s])
            for token in emitted.tokens[s, : emitted.count[s]].tolist():
                history[s].append(token)
                out[s].tokens.append(token)
                out[s].steps.append(step)
                limit = min(max_tokens[s], p.max_positions - len(prompts[s]))
                done[s] = token in p.stop_token_ids or len(out[s].tokens) == limit
                if done[s]:
                    state.width[s] = 0
                    state.filled[s] = False
                    break
        if all(done):
            return out
    raise AssertionError("decoding did not end")


def forward_batch(model: StubModel, state: WindowState, history: list[list[int]], params: list[DecodeParams]):
    """Logits of every window column, chosen from by the tensor functions, as RowResults."""
    order = topological_order(state.filled, state.width)
    packed = pack_rows(state.width, int(state.width.sum()) + 3)
    assert packed.real.sum() == state.width.sum()
    column = order[packed.sequence, packed.row]
    filled = state.filled[packed.sequence, column]
    tokens = torch.where(filled, state.tokens[packed.sequence, column], model.mask_token_id)
    layout = row_layout(state.filled, state.width, torch.tensor([p.is_verified for p in params]))
    offset, shared, own_start = (
        part[packed.sequence, column] for part in (layout.offset, layout.shared, layout.own_start)
    )
    positions = state.cached[packed.sequence] + offset
    logits = torch.zeros(len(column), model.vocab_size)
    for s, known in enumerate(history):
        rows = ((packed.sequence == s) & packed.real).nonzero()[:, 0]
        if len(rows):
            n = int(state.cached[s])
            # Each row alone, after what it sees: no mask is needed.
            for i, row in enumerate(rows.tolist()):
                seen = [r for j, r in enumerate(rows[: i + 1].tolist()) if j < shared[row] or j >= own_start[row]]
                after = (known[:n] + tokens[seen].tolist(), [*range(n), *positions[seen].tolist()])
                logits[row] = model.rows_model(*after, num_masked=int((~filled[seen]).sum()))[-1]
    entropy, logsumexp = entropy_and_logsumexp(logits)
    of = [params[s] for s in packed.sequence.tolist()]
    target = positions + filled
    ends = torch.tensor([[*p.stop_token_ids, -1][:1] for p in of])
    eos_banned = target < torch.tensor([p.min_eos_position for p in of])
    choosable = ban_tokens(logits.clone(), model.mask_token_id, ends, eos_banned)
    batch = SamplingBatch(
        temperature=torch.tensor([p.temperature for p in of]),
        top_k=torch.tensor([p.top_k for p in of]),
        top_p=torch.tensor([p.top_p for p in of]),
        seed=torch.tensor([p.seed for p in of]),
        position=target,
        any_sampled=any(p.temperature > 0 for p in of),
        any_truncated=any(p.top_k > 0 or p.top_p < 1 for p in of),
    )
    choice = choose_tokens(choosable, batch)
    results = RowResults(
        choice=torch.full_like(state.tokens, -7),
        entropy=torch.full(state.tokens.shape, torch.nan),
        logprobs=torch.full(state.tokens.shape, torch.nan),
    )
    at = (packed.sequence[packed.real], column[packed.real])
    results.choice[at] = choice[packed.real]
    results.entropy[at] = entropy[packed.real]
    results.logprobs[at] = (logits.gather(1, choice[:, None])[:, 0] - logsumexp)[packed.real]
    for s, p in enumerate(params):  # the row before the first masked column decides it, and its own agrees or not
        run = int(leading_run(state.filled[s : s + 1]))
        if p.is_causal and run < state.width[s]:
            if results.choice[s, run] != results.choice[s, run - 1]:
                results.entropy[s, run] = torch.inf
            for part in (results.choice, results.logprobs):
                part[s, run] = part[s, run - 1]
    return results


def check_state(state: WindowState, params: list[DecodeParams]) -> None:
    column = torch.arange(state.tokens.shape[1])
    assert not (state.filled & (column >= state.width[:, None])).any()
    for s, p in enumerate(params):
        assert state.width[s] <= p.row_budget
        assert state.width[s] == 0 or state.cached[s] + state.width[s] <= p.max_positions


def params_strategy() -> st.SearchStrategy[DecodeParams]:
    """Any; the probability of tokens is an option of block decoding."""
    return st.builds(
        lambda decoding, remasking, **rest: DecodeParams(
            decoding, remasking=remasking if decoding == "block" else "entropy", **rest
        ),
        decoding=st.sampled_from(DECODINGS),
        window_size=st.integers(1, 9),
        entropy_threshold=st.none() | st.floats(0.0, 3.0),
        pos_penalty=st.sampled_from([0.0, 0.02, 0.5]),
        next_token=st.sampled_from(NEXT_TOKENS),
        remasking=st.sampled_from(REMASKINGS),
        confidence_threshold=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        denoising_steps=st.none() | st.integers(1, 10),
        draft_entropy=st.floats(0.0, 3.0),
        temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
        top_k=st.sampled_from([0, 0, 1, 3]),
        top_p=st.sampled_from([1.0, 1.0, 0.9, 0.3]),
        seed=st.integers(0, 2**63 - 1),
        mask_token_id=st.just(MODEL.mask_token_id),
        stop_token_ids=st.sampled_from([(), (3,)]),
        min_eos_position=st.integers(0, 8),
        max_positions=st.sampled_from([12, 20, 1000]),
    )


def sequences() -> st.SearchStrategy[list[tuple[list[int], int, DecodeParams]]]:
    prompt = st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=9)  # the mask id is a legal token
    return st.lists(st.tuples(prompt, st.integers(1, 30), params_strategy()), min_size=1, max_size=5)


def check_against_reference(batch: list[tuple[list[int], int, DecodeParams]]) -> None:
    prompts, max_tokens, params = (list(part) for part in zip(*batch, strict=True))
    found = decode_batch(MODEL, prompts, max_tokens, params)
    for prompt, limit, p, got in zip(prompts, max_tokens, params, found, strict=True):
        expected = reference.decode(MODEL.rows_model, prompt, limit, p)
        assert got == expected, p
        assert MODEL.mask_token_id not in got.tokens


@settings(max_examples=25, deadline=None)
@given(sequences())
def test_batched_steps_equal_the_reference(batch):
    check_against_reference(batch)


@pytest.mark.long
@settings(max_examples=4000, deadline=None)
@given(sequences())
def test_batched_steps_equal_the_reference_long(batch):
    check_against_reference(batch)


@settings(max_examples=120, deadline=None)
@given(
    params_strategy(),
    st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=9),
    st.integers(1, 16),
)
def test_verified_text_is_autoregressive_text(params, prompt, window_size):
    """Whatever the row budget, the draft limit, the temperature and the seed."""
    ar = reference.decode(MODEL.rows_model, prompt, 25, replace(params, decoding="autoregressive"))
    verified = reference.decode(
        MODEL.rows_model, prompt, 25, replace(params, decoding="verified", window_size=window_size)
    )
    assert verified.tokens == ar.tokens
    assert len(verified.rows) <= len(ar.rows)
    assert all(rows == 1 for rows in ar.rows)


@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=pytest.mark.long)])
def test_causal_streaming_never_takes_more_steps_than_ar(examples):
    """Every forward gives a token, from the first one on, and the first is AR's. Where only one position is filled a
    step, or the window has no other, the text is AR's, whatever the masked rows say."""
    prompts = st.lists(st.integers(0, MODEL.vocab_size - 1), min_size=1, max_size=9)
    settings(max_examples=examples, deadline=None)(given(params_strategy(), prompts)(check_causal_streaming))()


def check_causal_streaming(params, prompt):
    causal = replace(params, decoding="streaming", next_token="causal", remasking="entropy")
    ar = reference.decode(MODEL.rows_model, prompt, 25, replace(params, decoding="autoregressive"))
    out = reference.decode(MODEL.rows_model, prompt, 25, causal)
    assert sorted(set(out.steps)) == list(range(len(out.rows)))
    assert out.tokens[0] == ar.tokens[0]
    for alone in (replace(causal, entropy_threshold=None), replace(causal, window_size=1)):
        assert reference.decode(MODEL.rows_model, prompt, 25, alone).tokens == ar.tokens


def test_drafts_are_accepted_at_all():
    """The equality above would hold trivially if nothing were ever drafted."""
    params = DecodeParams("verified", mask_token_id=MODEL.mask_token_id, draft_entropy=10.0)
    out = reference.decode(StubModel(agreement=12.0).rows_model, [1, 2], 60, params)
    assert len(out.tokens) / len(out.rows) > 2
    assert max(out.rows) == 16
