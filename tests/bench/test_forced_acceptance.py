# SPDX-License-Identifier: Apache-2.0
"""Drafts accepted at given rates: exact at 0 and 1, the kernel against torch operations, and whole runs."""

import pytest
import torch

from tests.bench.conftest import settings
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.window import RowResults, WindowParams, WindowState
from wedlm.bench.forced_acceptance import FIRST_OTHER, Chances, force_choices, injected
from wedlm.bench.loop import Loop
from wedlm.bench.prompts import Arrival
from wedlm.bench.target import load_target

CPU = torch.device("cpu")


def state_of(drafts: list[int], width: int = 16) -> WindowState:
    """Verified windows with an anchor and so many drafts."""
    state = WindowState.empty(len(drafts), 16, CPU)
    column = torch.arange(16)
    filled = column <= torch.tensor(drafts)[:, None]
    tokens = torch.randint(50, 900, filled.shape)
    return WindowState(state.cached, state.width + width, tokens, filled, state.logprobs)


def chances_of(*rates: float) -> Chances:
    chances = Chances(CPU, 1200)
    chances.set(rates)
    return chances


@pytest.mark.parametrize("rates", [(0.0,), (1.0,), (1.0, 0.0), (0.0, 1.0)])
def test_choices_after_drafts_are_forced_and_no_others(rates):
    state = state_of([0, 1, 3])
    params = WindowParams.stack([DecodeParams("verified")] * 2 + [DecodeParams("auto")], CPU)
    choice = torch.zeros_like(state.tokens)
    results = RowResults(choice, torch.zeros(choice.shape), torch.zeros(choice.shape))
    forced = force_choices(state, results, params, chances_of(*rates))
    for s, drafts in enumerate([0, 1, 3]):
        for column in range(16):
            if column >= drafts:
                assert forced[s, column] == 0
            else:
                accepts = rates[min(column, len(rates) - 1)] == 1.0
                assert (forced[s, column] == state.tokens[s, column + 1]) == accepts


def test_streaming_windows_are_left_alone():
    state = state_of([3])
    choice = torch.zeros_like(state.tokens)
    results = RowResults(choice, torch.zeros(choice.shape), torch.zeros(choice.shape))
    params = WindowParams.stack([DecodeParams("streaming")], CPU)
    assert torch.equal(force_choices(state, results, params, chances_of(1.0)), choice)


@pytest.mark.parametrize("rates", [(0.0,), (1.0,), (1.0, 0.0)])
def test_kernel_is_its_twin(rates):
    pytest.importorskip("triton")
    from wedlm.bench.forced_acceptance_kernel import force_rows
    from wedlm.kernels.window_verified import verified_rows

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drafts = [0, 1, 3, 2]
    state = state_of(drafts)
    params = WindowParams.stack([DecodeParams("verified")] * 4, CPU)
    choice = torch.randint(0, 9, state.tokens.shape)
    results = RowResults(choice, torch.zeros(choice.shape), torch.zeros(choice.shape))
    expected = force_choices(state, results, params, chances_of(*rates))
    moved = WindowState(*(getattr(state, n).to(device) for n in ("cached", "width", "tokens", "filled", "logprobs")))
    table = torch.zeros(4, 4, dtype=torch.long, device=device)
    rows = verified_rows(moved, torch.arange(4, device=device), table, 16, 80, 3, 0)  # 16 rows of padding
    chances = Chances(device, 1200)
    chances.set(rates)
    padded = torch.cat((choice.flatten(), torch.zeros(16, dtype=torch.long))).to(device)
    actual = force_rows(rows, padded, chances.by_depth, chances.count, chances.num_others, FIRST_OTHER).cpu()
    assert torch.equal(actual[:64].reshape(4, 16), expected)
    assert torch.equal(actual[64:], padded[64:].cpu())
    assert chances.count.item() == 1


def test_whole_runs(target):
    loop = Loop(target)
    params = settings().params("verified", 200, wedlm_draft_entropy=1e9)
    with injected(target.engine) as chances:
        found = {}
        for rates in ((0.0,), (0.6,), (1.0,)):
            chances.set(rates)
            found[rates[0]] = loop.batch([target.prompts.of(0, 8)], params, 2, 40)["tokens_per_step"]
    assert found[0.0] == 1.0
    assert 1.5 < found[0.6] < 3.0  # 2.1 expected
    assert found[1.0] == pytest.approx(3.5, abs=0.1)
    assert target.engine.runner.eager.force_choice is None
    assert loop.batch([target.prompts.of(0, 8)], params, 2, 5)["tokens_per_step"] < 2


@pytest.mark.long
# Padding rows are whatever lay in memory, and the interpreter reports what a GPU ignores.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")
def test_a_small_vocabulary_and_captured_steps(monkeypatch):
    """Refused drafts become tokens that exist; device steps accept at the rates, too."""
    pytest.importorskip("triton")
    from tests.kernels.graph_engine import engine, few_rows_beside_chunks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    few_rows_beside_chunks(device, monkeypatch)
    one = engine(device, graphs=True)
    params = settings().params("verified", 4, wedlm_draft_entropy=1e9, wedlm_window_size=6)

    def forwards() -> int:
        request = one.add("one", [3, 4, 5], params)
        while one.has_work:
            one.step()
        return request.counters.num_forwards

    with injected(one) as chances:
        assert forwards() == 4
        chances.set((1.0,))
        assert forwards() == 3  # the first step has no drafts


def test_serve_gives_every_request_its_tokens(target):
    loop = Loop(target)
    arrivals = [Arrival(at, target.prompts.of(i, 5 + i), 3 + i) for i, at in enumerate((0.0, 0.01, 0.2))]
    figures = loop.serve(arrivals, settings().params("autoregressive", 9))
    assert figures["tokens"] == 3 + 4 + 5
    assert figures["tokens_per_forward"] == 1.0
    assert figures["seconds"] >= 0.2
    assert not target.engine.has_work
    assert target.engine.pool.num_available == target.engine.pool.num_pages


def test_nothing_of_a_prompt_is_found_again(target):
    loop = Loop(target)
    arrivals = [Arrival(0.0, target.prompts.of(0, 100), 2)]
    reused = []
    add = target.engine.add

    def watched(*args, **options):
        reused.append(add(*args, **options))
        return reused[-1]

    target.engine.add = watched
    try:
        for _ in range(2):
            loop.serve(arrivals, settings().params("autoregressive", 2))
    finally:
        del target.engine.add
    assert [request.progress.num_reused for request in reused] == [0, 0]


def test_loading_a_shape_is_repeatable():
    first, second = (load_target(settings()) for _ in range(2))
    a, b = (one.engine.runner.eager.model.model.embed_tokens.weight for one in (first, second))
    assert torch.equal(a, b)
