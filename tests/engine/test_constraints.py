# SPDX-License-Identifier: Apache-2.0
"""Grammars, biases and penalties: verified text is AR's under the same rules, streamed text keeps to the grammar,
neighbours are left alone, and preemption changes nothing. The stub model; grammars are random automata."""

import random
from dataclasses import replace

import pytest

from tests.engine.histories import add_up
from tests.engine.stub_engine import check_engine, check_outcome, preempt_last, stub_engine
from tests.engine.table_matcher import TableMatcher, decode_constrained
from tests.stub import StubModel
from tests.tiers import EACH_DECODING
from wedlm.algorithm.params import DECODINGS, NEXT_TOKENS
from wedlm.engine.constraints.rules import Constraint
from wedlm.engine.engine import Engine
from wedlm.engine.request import Request
from wedlm.engine.sampling_params import SamplingParams

MODEL = StubModel()
VOCAB, MASK = MODEL.vocab_size, MODEL.mask_token_id
MODES: tuple[dict, ...] = (
    *({"decoding": decoding} for decoding in DECODINGS),
    {"decoding": "streaming", "wedlm_next_token": "causal"},
)
Rules = tuple[list[int], SamplingParams, TableMatcher | None]


def random_rules(rng: random.Random, decoding: str | None = None) -> Rules:
    """A prompt, its parameters, and a grammar more often than not."""
    grammar = TableMatcher.random(rng, VOCAB, MASK, (3, 5)) if rng.random() < 0.7 else None
    params = SamplingParams(
        decoding=decoding or rng.choice(DECODINGS),
        max_tokens=rng.randint(1, 25),
        temperature=rng.choice([0.0, 0.0, 1.0]),
        top_k=rng.choice([0, 0, 3]),
        seed=rng.randrange(2**63),
        stop_token_ids=rng.choice([(), (3,), (3, 5)]),
        logprobs=rng.choice([None, 2]),
        logit_bias=rng.choice([None, {}, {2: 5.0, 4: -100.0}]),
        presence_penalty=rng.choice([0.0, 0.0, 1.5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.5, 0.5]),
        min_p=rng.choice([0.0, 0.0, 0.03, 0.6]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.75, -0.5]),
        wedlm_window_size=rng.randint(1, 9),
        wedlm_entropy_threshold=rng.choice([None, 0.4, 1.5, 5.0]),
        wedlm_next_token=rng.choice(NEXT_TOKENS),
        wedlm_draft_entropy=rng.choice([0.5, 1.5, 5.0]),
        wedlm_lookup_drafts=rng.choice([None, 0, 8]),
    )
    return [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 9]))], params, grammar


def free_of_rules(params: SamplingParams) -> SamplingParams:
    none = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0}
    return replace(params, logit_bias=None, **none)


def add(engine: Engine, name: str, rules: Rules) -> Request:
    prompt, params, grammar = rules
    request = engine.add(name, prompt, params)
    if grammar is not None:
        request.output.constraint = Constraint(params, grammar.fresh(), request.decode.stop_token_ids, MASK, prompt)
    return request


def alone(rules: Rules) -> Request:
    engine = stub_engine(MODEL)
    request = add(engine, "alone", rules)
    while engine.has_work:
        engine.step()
    return request


def check_valid(request: Request, grammar: TableMatcher) -> None:
    """The text is one that the grammar admits, and it ended where the grammar and the limits let it end."""
    walk = grammar.fresh()
    output = request.output_token_ids
    ended = output[-1] in request.decode.stop_token_ids
    assert all(walk.advance(token) for token in output[: len(output) - ended]), (output, walk.path)
    assert request.finish_reason == ("stop" if ended or walk.complete else "length")
    assert walk.accepting or not ended
    assert request.finish_reason == "stop" or len(output) == request.max_tokens


def check_constrained(request: Request, rules: Rules) -> None:
    prompt, params, grammar = rules
    decode = request.decode
    if decode.is_verified or (decode.is_causal and decode.entropy_threshold is None):  # each token is AR's
        expected = decode_constrained(MODEL, prompt, request.max_tokens, request.decode, params, grammar)
        assert (request.output_token_ids, request.finish_reason) == expected
    elif grammar is not None:
        check_valid(request, grammar)
    if params.logprobs is not None:
        assert len(request.output.top_logprobs) == len(request.output.logprobs) == request.num_output_tokens


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_text_keeps_to_the_rules(decoding):
    rng = random.Random(decoding)
    stopped = drafted = 0
    for _ in range(30):
        rules = random_rules(rng, decoding)
        request = alone(rules)
        check_constrained(request, rules)
        stopped += request.finish_reason == "stop"
        drafted += request.counters.num_forwards < request.num_output_tokens
    assert stopped > 5
    assert drafted == 0 if decoding == "autoregressive" else drafted > 3


def run_history(seed: int) -> dict[str, int]:
    """Constrained and free requests together, with aborts and preemptions; each text is what it is alone."""
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 16])
    engine = stub_engine(
        MODEL,
        page_size=page_size,
        num_pages=-(-90 // page_size) + rng.randint(0, 60 // page_size),
        max_num_seqs=rng.randint(1, 5),
        max_num_batched_tokens=rng.choice([18, 24, 64]),
    )
    given: dict[str, Rules] = {}
    finished: list[Request] = []

    def step() -> None:
        finished.extend(request for request in engine.step() if request.finish_reason is not None)

    for _ in range(rng.randint(5, 40)):
        action = rng.random()
        if action < 0.3:
            prompt, params, grammar = random_rules(rng)
            if rng.random() < 0.4:  # a neighbour without rules
                params, grammar = free_of_rules(params), None
            given[f"r{len(given)}"] = (prompt, params, grammar)
            add(engine, f"r{len(given) - 1}", (prompt, params, grammar))
        elif action < 0.35 and engine.requests:
            engine.abort(rng.choice(list(engine.requests)))
        elif not (action < 0.45 and preempt_last(engine)):
            step()
        check_engine(engine)
    while engine.has_work:
        step()
        check_engine(engine)
    free = 0
    for request in finished:
        rules = given[request.request_id]
        if request.output.constraint is None:
            check_outcome(MODEL, request)
            free += 1
            continue
        check_constrained(request, rules)
        lonely = alone(rules)
        assert request.output_token_ids == lonely.output_token_ids
        if request.params.logprobs is not None:
            assert request.output.logprobs == pytest.approx(lonely.output.logprobs, abs=1e-5)
        if request.decode.decoding != "auto":  # how many steps that takes depends on the load
            assert (request.output.token_steps, request.counters.num_rows) == (
                lonely.output.token_steps,
                lonely.counters.num_rows,
            )
    preempted = sum(request.progress.num_preemptions for request in finished if request.output.constraint is not None)
    return {"free": free, "constrained": len(finished) - free, "preempted": preempted}


def test_histories():
    add_up(map(run_history, range(8)))


@pytest.mark.long
def test_a_thousand_histories(record_property):
    for name, value in add_up(map(run_history, range(1000, 2000))).items():
        record_property(name, value)


def test_penalties_count_the_output_alone():
    """Token 1 is favoured; a penalty for each use outweighs that in time, and the twenty of the prompt do not count."""
    params = SamplingParams(max_tokens=60, decoding="verified", logit_bias={1: 15.0})
    plain, flat = (alone(([1] * 20, replace(params, frequency_penalty=f), None)) for f in (0.0, 2.0))
    assert plain.output_token_ids.count(1) > 50
    assert flat.output_token_ids[:4].count(1) >= 2
    assert flat.output_token_ids.count(1) < 20


def test_a_bias_wins_in_every_mode():
    for mode in MODES:
        params = SamplingParams(max_tokens=12, **mode, logit_bias={6: 100.0}, temperature=1.0, seed=1)
        assert alone(([1, 2], params, None)).output_token_ids == [6] * 12


def test_a_grammar_that_fails_cuts_its_own_text_only():
    """A matcher may meet its limits of work: the text ends there, valid so far, and neighbours go on."""
    table = TableMatcher([dict.fromkeys(range(VOCAB - 1), 0)], set(), VOCAB)

    class Failing(TableMatcher):
        def advance(self, token: int) -> bool:
            self.failed = self.failed or len(self.path) > 4
            return not self.failed and super().advance(token)

        def rewind(self, count: int) -> None:
            super().rewind(count)
            self.failed = self.failed and count == 0

    for mode in MODES:
        engine = stub_engine(MODEL)
        params = SamplingParams(**mode, max_tokens=20)
        request = engine.add("a", [1], params)
        request.output.constraint = Constraint(params, Failing(table.table, set(), VOCAB), (), MASK)
        neighbour = engine.add("b", [2], params)
        while engine.has_work:
            engine.step()
        assert request.finish_reason == "length"
        assert 1 <= request.num_output_tokens <= 4
        check_outcome(MODEL, neighbour)


def test_a_dead_end_cuts_the_text():
    """Where a grammar admits no token, the text ends, even inside a block."""
    for mode in MODES:
        params = SamplingParams(**mode, max_tokens=20)
        request = alone(([1], params, TableMatcher([{4: 1}, {5: 2}, {}], set(), VOCAB)))
        assert (request.output_token_ids, request.finish_reason) == ([4, 5], "length")


def test_a_bias_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"^logit_bias has the token id 13; expected ids below 13$"):
        stub_engine(MODEL).add("a", [1], SamplingParams(logit_bias={13: 1}))
    with pytest.raises(ValueError, match=r"^json_schema or grammar is set but the engine has no tokenizer"):
        stub_engine(MODEL).add("a", [1], SamplingParams(json_schema={}))
