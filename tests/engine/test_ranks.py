# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism on a CPU: two processes on one tiny model, as one."""

import socket
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.ranks_twin import chunk, engine_of, run_history
from tests.engine.tiny_llm import PROMPTS, check_empty, save_tiny
from tests.tiers import EACH_DECODING
from wedlm.algorithm.sample import SamplingBatch, ban_tokens, choose_tokens, entropy_and_logsumexp
from wedlm.engine.llm import LLM
from wedlm.engine.ranks.choice import ChoiceRows, choose_over_ranks
from wedlm.engine.ranks.messages import Kind, encode, receive
from wedlm.engine.ranks.processes import _Processes
from wedlm.engine.ranks.reports import FAILED, send_report
from wedlm.engine.sampling_params import SamplingParams

ONE = {"device": "cpu", "dtype": "float32", "quantization": "none", "max_num_batched_tokens": 36, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def one(directory) -> LLM:
    """A twin that adds up as two ranks do."""
    llm = LLM(directory, **ONE)
    chunk(llm, llm.model_config, 2)
    return llm


@pytest.fixture(scope="module")
def two(directory):
    with pytest.MonkeyPatch.context() as patch:  # on a machine that is busy a rank may have to wait for a processor
        patch.setattr("wedlm.engine.ranks.processes.ANSWER_S", 120.0)
        llm = LLM(directory, **ONE, tensor_parallel_size=2)
    yield llm
    llm.exit()
    assert llm._ranks.pids == []


@pytest.mark.parametrize("decoding", EACH_DECODING)
def test_two_ranks_write_what_one_writes(one, two, decoding):
    """Prompts in chunks, prefixes that are found again, rules, reports and whole logits."""
    assert "over 2 ranks" in two.describe()
    assert "the native forward runs in one process" in two.describe()
    params = [
        SamplingParams(max_tokens=6, decoding=decoding),
        SamplingParams(max_tokens=6, decoding=decoding, temperature=1.0, seed=5),
        SamplingParams(max_tokens=5, decoding=decoding, temperature=1.0, seed=6, top_k=9, min_tokens=4),
        SamplingParams(max_tokens=5, decoding=decoding, logprobs=2, presence_penalty=0.5, stop_token_ids=(7,)),
        SamplingParams(max_tokens=5, decoding=decoding, logit_bias={40: 30.0, 90: 30.0}),
        SamplingParams(max_tokens=5, decoding=decoding, min_tokens=3, stop_token_ids=(3, 8, 60)),
    ]
    expected, found = one.generate(PROMPTS, params), two.generate(PROMPTS, params)
    assert [o.token_ids for o in found] == [o.token_ids for o in expected]
    assert [o.finish_reason for o in found] == [o.finish_reason for o in expected]
    assert found[3].logprobs == pytest.approx(expected[3].logprobs, abs=1e-4)
    check_empty(two)


def test_histories_with_preemption(one, two):
    totals: dict[str, int] = {}
    for seed in range(5):
        expected, counts = run_history(lambda rng: engine_of(one.blueprint, rng), seed)
        found, _ = run_history(lambda rng: engine_of(two.blueprint, rng), seed)
        assert found == expected
        totals = {name: totals.get(name, 0) + value for name, value in counts.items()}
    assert totals["preempted"]
    assert totals["reused"]
    two.engine = two.blueprint.build()  # the others' caches are those of the latest engine


def test_prompts_are_scored_over_all_ranks(one, two):
    from wedlm.engine.prompt_logprobs import PromptScorer

    scores = []
    for llm in (one, two):
        scorer = PromptScorer(llm.engine, [1, 2, 3, 4, 5, 6], 2)
        while not scorer.done:
            assert scorer.advance(llm.engine)
        scores.append(scorer.result)
    assert scores[1].logprobs == pytest.approx(scores[0].logprobs, abs=1e-4)
    assert scores[1].ranks == scores[0].ranks


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, "tensor_parallel_size is 3; expected a divisor of the model's 4 \\(attention heads\\)"),
        ({"num_heads": 6, "num_kv_heads": 2}, 3, "a divisor or a multiple of the model's 2 key/value heads"),
        ({"intermediate_size": 49}, 2, "expected a divisor of the model's 49 \\(intermediate size\\)"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_starts(tmp_path, changes, size, message):
    directory = save_tiny(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        LLM(directory, device="cpu", tensor_parallel_size=size)


def test_bad_values_are_one_sentence(directory):
    for value in (0, -1, "2", True):
        with pytest.raises(ValueError, match=r"tensor_parallel_size is .*; expected an integer >= 1"):
            LLM(directory, device="cpu", tensor_parallel_size=value)
    with pytest.raises(ValueError, match="quantization is 'int8' and tensor_parallel_size is 2; expected 1"):
        LLM(directory, device="cpu", quantization="int8", tensor_parallel_size=2)


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Other ranks that do nothing."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    processes = _Processes([{"threads": 1}] * 3, tmp_path / "meeting")
    yield processes
    processes.close()


def test_whoever_is_told_of_a_lost_rank_finds_all_ended(three):
    codes: list[int | None] = []

    def fail(reason: str) -> None:
        three.fail(reason)
        codes.extend(process.returncode for process in three.processes)

    threads = [threading.Thread(target=fail, args=(reason,)) for reason in ("one", "another")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [-9] * 6
    assert three.reason in ("one", "another")


@pytest.mark.parametrize("missing", ["RuntimeError: [/x/gloo/transport/pair.cc:9] closed", "DistBackendError: x"])
@pytest.mark.parametrize("is_killed", [True, False])
def test_the_rank_that_was_lost_is_named_rather_than_one_that_missed_it(three, missing, is_killed):
    ours, theirs = socket.socketpair()
    three.connections[0].close()
    three.connections[0] = ours
    lost = threading.Event()
    three.on_fault = lost.set
    with theirs:
        send_report(theirs, FAILED, message=missing)
        if is_killed:
            three.processes[1].kill()
            three.processes[1].wait()
        three.watch()
        assert lost.wait(60)
    assert three.reason == ("rank 2 of 4 was ended by SIGKILL" if is_killed else f"rank 1 of 4 failed: {missing}")


def test_one_rank_has_nothing_of_it(directory, monkeypatch):
    """No process group, no hook, no wrapper: with one rank the engine is the one without the option, and imports
    nothing of several while it is made and runs (``test_layers.py``: nor before)."""
    for name in [name for name in sys.modules if name.startswith("wedlm.engine.ranks")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    llm = LLM(directory, **ONE, tensor_parallel_size=1)
    assert llm.generate(["x"], SamplingParams(max_tokens=4))[0].token_ids
    assert llm._ranks is None
    assert not any(module._forward_hooks for module in llm.model.modules())
    assert llm.engine.runner.eager.model is llm.model
    assert llm.engine.runner.eager.local_model is None


def test_messages():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arrays = [np.arange(5), np.zeros(0, dtype=np.int64), np.array([2**62])]
        ours.sendall(encode(Kind.FORWARD, arrays) + encode(Kind.GATHER, []))
        kind, found = receive(theirs)
        assert kind == Kind.FORWARD
        assert [one.tolist() for one in found] == [one.tolist() for one in arrays]
        assert receive(theirs) == (Kind.GATHER, [])
        whole = encode(Kind.FORWARD, arrays)
        for damaged in (b"\xff" * 16, whole[:16] + b"\xff" * len(whole[16:])):
            ours.sendall(damaged)
            with pytest.raises(ValueError, match="a message"):
                receive(theirs)
        ours.close()
        assert receive(theirs) is None


class Replay:
    """A group whose other ranks' numbers are computed here, one rank after the other."""

    def __init__(self, size: int) -> None:
        self.given: list[list[torch.Tensor]] = [[] for _ in range(size)]
        self.rank, self.round = 0, 0

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        mine = self.given[self.rank]
        if self.round == len(mine):
            mine.append(x.clone())
        self.round += 1
        known = [given[self.round - 1] if len(given) >= self.round else x for given in self.given]
        return torch.stack(known)


@pytest.mark.parametrize("size", [2, 3])
def test_the_choice_is_the_whole_logits(size):
    torch.manual_seed(size)
    count, vocab, mask = 64, 50, 7
    logits = torch.randn(count, vocab) * 3
    logits[:8] = logits[:8].round()  # ties, which rank by token id
    sampling = SamplingBatch(
        temperature=torch.tensor([0.0, 1.0, 0.3, 1e-30]).repeat(count // 4),
        top_k=torch.zeros(count, dtype=torch.long),
        top_p=torch.ones(count, dtype=torch.double),
        seed=torch.randint(2**62, (count,)),
        position=torch.arange(count),
        any_sampled=True,
        any_truncated=False,
    )
    stops = torch.randint(-1, vocab, (count, 3))
    banned = torch.arange(count) % 2 == 0
    entropy, logsumexp = entropy_and_logsumexp(logits)
    allowed = ban_tokens(logits.clone(), mask, stops, banned)
    choice = choose_tokens(allowed, sampling)
    rows = ChoiceRows(sampling, stops, banned, mask, wants_entropy=True)
    group = Replay(size)
    for _ in range(3):  # the first rounds fill what the others have given
        for rank in range(size):
            group.rank, group.round = rank, 0
            group.given[rank] = group.given[rank][:1]
            first, stop = vocab * rank // size, vocab * (rank + 1) // size
            found = choose_over_ranks(group, logits[:, first:stop].clone(), first, rows)
    assert torch.equal(found[0], choice)
    assert torch.allclose(found[1], entropy, atol=1e-5)
    assert torch.allclose(found[2], logits.gather(1, choice[:, None])[:, 0] - logsumexp, atol=1e-5)


def test_the_command_line_has_it(tmp_path):
    from typer.testing import CliRunner

    from wedlm.cli import app

    for command in (["generate", "x"], ["bench"], ["serve"], ["eval", "gsm8k"]):
        result = CliRunner().invoke(app, [*command, "--tensor-parallel-size", "0"])
        assert result.exit_code == 2, result.output
        assert "tensor_parallel_size is 0; expected an integer >= 1" in result.output


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # padding is what memory happened to hold
def test_steps_on_kernels_over_two_ranks(one, two, monkeypatch):
    """What a GPU captures, run directly: rows, parts of the logits and choices go between the ranks within the step."""
    pytest.importorskip("triton")
    for name in ("_FEWEST_CHUNK_ROWS", "_FEWEST_BESIDE"):  # the interpreter is slow
        monkeypatch.setattr(f"wedlm.engine.execution.graphs.{name}", 4)
    kernels = replace(two.blueprint, packed=two.model, num_pages=40)
    small = {"max_tokens": 3, "wedlm_window_size": 3}
    params = [
        SamplingParams(decoding="verified", **small),
        SamplingParams(decoding="verified", temperature=1.0, seed=5, **small),
        SamplingParams(decoding="streaming", min_tokens=2, stop_token_ids=(3, 8, 60), **small),
        SamplingParams(decoding="streaming", temperature=1.0, seed=6, top_k=9, **small),
    ]
    texts = []
    for blueprint in (one.blueprint, kernels):
        engine = blueprint.build()
        requests = [engine.add(f"r{i}", [i + 1, 2, 3], each) for i, each in enumerate(params)]
        engine.step()
        requests.append(engine.add("host", [1, 2, 3], SamplingParams(decoding="block", logprobs=1, **small)))
        while engine.has_work:
            engine.step()
        texts.append([request.output_token_ids for request in requests])
    assert engine.runner.executors[0].graphs.captures is False
    assert texts[1] == texts[0]
    two.engine = two.blueprint.build()
