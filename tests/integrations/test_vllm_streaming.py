# SPDX-License-Identifier: Apache-2.0
"""The vLLM plug-in under a stand-in for vLLM's scheduler and runner, against reference.py, token for token."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.integrations.fake_vllm import Engine, Request, Runner
from tests.stub import StubModel
from wedlm.algorithm import reference

MODEL = StubModel()
END = 3


def history(seed: int) -> tuple[int, int]:
    """Run a random server under random requests; returns how many tokens were compared, and preemptions."""
    from wedlm_vllm.settings import StreamingSettings

    rng = random.Random(seed)
    window = rng.randint(1, 9)
    settings = StreamingSettings(
        window_size=window,
        num_rows=rng.randint(window + 1, 2 * window),
        entropy_threshold=rng.choice([None, 0.3, 1.0, 2.5]),
        pos_penalty=rng.choice([0.0, 0.02, 0.5]),
        next_token=rng.choice(["masked", "causal"]),
        mask_token_id=MODEL.mask_token_id,
    )
    length, most = rng.choice([40, 200, 200]), rng.randint(1, 6)
    budget = max(most * settings.num_rows, rng.choice([8, 30, 100]))
    model = StubModel(agreement=rng.choice([2.0, 4.0, 8.0]), seed=rng.randrange(4))
    runner = Runner(model, settings, length, most, budget)
    engine = Engine(runner, most, budget, rng.random() < 0.5, rng, unrest=rng.choice([0.0, 0.1]))
    requests = []
    for i in range(rng.randint(1, 6)):
        prompt = [rng.choice([t for t in range(MODEL.vocab_size) if t not in (END, MODEL.mask_token_id)])]
        prompt += [rng.randrange(MODEL.vocab_size - 1) for _ in range(rng.choice([0, 1, 5, 25]))]
        params = SimpleNamespace(
            max_tokens=min(rng.choice([1, 5, 24, 60]), length - len(prompt)),
            stop_token_ids=(END,) if rng.random() < 0.6 else (),
            temperature=rng.choice([0.0, 0.0, 0.8]),
            top_k=rng.choice([0, 3]),
            top_p=rng.choice([1.0, 0.9]),
            seed=rng.randrange(2**40),
        )
        requests.append(Request(f"request-{i}", prompt, params))
    aborted = {r.name for r in requests if rng.random() < 0.1}
    engine.run(requests, aborted)
    assert not runner.req_states.req_id_to_index
    return sum(check(model, settings, length, request) for request in requests), sum(
        r.num_preemptions for r in requests
    )


def check(model: StubModel, settings, length: int, request: Request) -> int:
    params, given = settings.decode_params(length), request.params
    params = replace(params, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, seed=given.seed)
    expected = reference.decode(
        model.rows_model, request.prompt, given.max_tokens, replace(params, stop_token_ids=given.stop_token_ids)
    ).tokens
    found = request.output
    if request.status == "aborted":
        expected = expected[: len(found)]
    else:
        assert request.status == "finished"
    same = max(0, length - 4 * settings.window_size - len(request.prompt))  # beyond, windows may have fewer rows
    assert found[:same] == expected[:same], (settings, request.prompt, request.params)
    if len(found) <= same or len(expected) <= same:
        assert found == expected
    elif request.status == "finished":
        assert len(found) == given.max_tokens or found[-1] in given.stop_token_ids
    return min(same, len(found))


def test_texts_are_the_references():
    """Chunked prompts, end tokens and lengths inside a commit, preemption, aborts, asynchronous scheduling, a number of
    rows that splits a commit, and the model's end."""
    found = [history(seed) for seed in range(20)]
    assert sum(tokens for tokens, _ in found) > 600
    assert sum(preempted for _, preempted in found) > 15


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_texts_are_the_references_in_thousands_of_histories(first):
    for seed in range(first, first + 250):
        history(1000 + seed)


def test_windows_return_to_their_own_requests_only():
    import torch
    from wedlm_vllm.rule import Slots, StreamingRule
    from wedlm_vllm.settings import StreamingSettings

    rule = StreamingRule(StreamingSettings(window_size=2, num_rows=4, mask_token_id=9), 100, 3, "cpu")
    slots = Slots(rule, 1)

    def start(name: str, slot: int = 0) -> list[bool]:
        """The window of a request with ten tokens, all cached."""
        slots.add(name, slot)
        slots.begin(torch.tensor([slot]), torch.tensor([10]), torch.tensor([7]))
        return slots.state.filled[slot, :2].tolist()

    assert start("first") == [False, False]
    slots.state.filled[0, 1] = True
    slots.remove("first", 0)
    assert start("second") == [False, False]
    slots.remove("second", 0)
    assert start("first") == [False, True]
    slots.remove("first", 0)
    for i in range(4):  # as many as are kept
        slots.add(f"other-{i}", 0)
        slots.remove(f"other-{i}", 0)
    assert start("first") == [False, False]
