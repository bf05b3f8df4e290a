# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism, at length: random histories over two and four ranks, ranks that die, and where memory goes."""

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.engine.ranks_twin import chunk, engine_of, run_history
from tests.engine.tiny_llm import PROMPTS, check_empty, save_tiny
from tests.processes import is_running, peak_bytes
from wedlm.algorithm.params import DECODINGS
from wedlm.engine.async_llm import AsyncEngine
from wedlm.engine.llm import LLM
from wedlm.engine.ranks.processes import RankFault
from wedlm.engine.request_stream import EngineFault, RequestStream
from wedlm.engine.sampling_params import SamplingParams

pytestmark = pytest.mark.long

ONE = {"device": "cpu", "dtype": "float32", "quantization": "none", "max_num_batched_tokens": 36, "max_num_seqs": 4}
SOME = PROMPTS[:3]
LONG = SamplingParams(max_tokens=50, decoding="autoregressive", ignore_eos=True)


@pytest.mark.parametrize(("size", "block"), [*((2, block) for block in range(8)), *((4, block) for block in range(4))])
def test_a_thousand_histories(directory, size, block, record_property, monkeypatch):
    """Against a twin in one process that adds up in the ranks' order: bit for bit. Against one rank as it is, whose
    sums have another order: how many histories have the same text."""
    monkeypatch.setattr("wedlm.engine.ranks.processes.ANSWER_S", 120.0)  # the machine may be busy
    count = 100 if size == 2 else 50
    plain, twin = LLM(directory, **ONE), LLM(directory, **ONE)
    chunk(twin, twin.model_config, size)
    ranks = LLM(directory, **ONE, tensor_parallel_size=size)
    same, totals = 0, {}
    try:
        for seed in range(block * count, (block + 1) * count):
            expected, counts = run_history(lambda rng: engine_of(twin.blueprint, rng), seed)
            found, _ = run_history(lambda rng: engine_of(ranks.blueprint, rng), seed)
            assert found == expected, seed
            same += run_history(lambda rng: engine_of(plain.blueprint, rng), seed)[0] == found
            totals = {name: totals.get(name, 0) + value for name, value in counts.items()}
    finally:
        ranks.exit()
    for name, value in {"histories": count, "equal to one rank's, too": same, **totals}.items():
        record_property(name, value)
    assert totals["preempted"]
    assert totals["reused"]
    assert same >= 0.99 * count


@pytest.mark.parametrize("size", [2, 4])
def test_every_mode_writes_what_one_rank_writes(directory, size, record_property):
    one, ranks = LLM(directory, **ONE), LLM(directory, **ONE, tensor_parallel_size=size)
    same = total = 0
    try:
        for decoding in DECODINGS:
            for temperature in (0.0, 1.0):
                params = SamplingParams(max_tokens=24, decoding=decoding, temperature=temperature, seed=4)
                for a, b in zip(one.generate(PROMPTS, params), ranks.generate(PROMPTS, params), strict=True):
                    same, total = same + (a.token_ids == b.token_ids), total + 1
        check_empty(ranks)
    finally:
        ranks.exit()
    record_property("texts equal to one rank's", f"{same} of {total}")
    assert same == total


def end(pid: int, how: str) -> None:
    """One way to lose a rank."""
    if how == "memory":  # the next allocation of any size fails
        resource.prlimit(pid, resource.RLIMIT_AS, (2**20, 2**20))
    else:
        os.kill(pid, getattr(signal, how))


@pytest.mark.parametrize(("size", "block"), [(2, 0), (2, 1), (2, 2), (4, 3), (4, 4)])
def test_fifty_lost_ranks(directory, size, block, record_property):
    """Each ends the running requests with one clear error in time, leaves no process, and the next one is served."""
    rng = random.Random(block)
    llm = LLM(directory, **ONE, tensor_parallel_size=size)
    expected = [output.token_ids for output in llm.generate(SOME, LONG)]
    latest, reasons = 0.0, set()
    try:
        for number in range(10):
            kinds = {3: "SIGSTOP", 6: "memory"}
            loss = Loss(llm, rng, kinds.get(number) or rng.choice(["SIGKILL", "SIGKILL", "SIGTERM"]))
            pids = llm._ranks.pids
            with pytest.raises(RankFault, match="the engine's ranks were ended, and what they were generating is lost"):
                loss.generate()
            latest = max(latest, time.monotonic() - loss.at)
            name = f"rank {pids.index(loss.victim) + 1} of {size} "
            assert ("a rank did not answer" if loss.how == "SIGSTOP" else name) in str(llm._fault), loss.how
            reasons.add(str(llm._fault).rpartition("lost: ")[2][:60])
            assert not any(map(is_running, pids)), loss.how
            assert [output.token_ids for output in llm.generate(SOME, LONG)] == expected
            check_empty(llm)
    finally:
        last = llm._ranks.pids
        llm.exit()
    assert not any(map(is_running, last))
    assert latest < 10
    figures = {"lost ranks": 10, "clear errors": 10, "processes left": 0, "next requests served": 10}
    for name, value in {**figures, "slowest error, s": round(latest, 1), "reasons": "; ".join(sorted(reasons))}.items():
        record_property(name, value)


class Loss:
    """Loses a random rank at a random step, before the step or in the middle of it."""

    def __init__(self, llm: LLM, rng: random.Random, how: str) -> None:
        self.llm, self.how, self.at = llm, how, 0.0
        self.victim, self.left = rng.choice(llm._ranks.pids), rng.randint(1, 40)
        self.delay = rng.choice([None, rng.random() * 0.01])
        self.step = llm.engine.step
        llm.engine.step = self._step  # of this engine; the next one has its own

    def _step(self) -> list:
        self.left -= 1
        if self.left == 0:
            self.at = time.monotonic()
            if self.delay is None:
                end(self.victim, self.how)
            else:
                threading.Timer(self.delay, end, (self.victim, self.how)).start()
        return self.step()

    def generate(self) -> None:
        for _ in range(50):  # a rank whose memory is short goes on as long as it asks for none
            self.llm.generate(SOME, LONG)


def test_a_server_restarts_its_engine(directory):
    llm = LLM(directory, **ONE, tensor_parallel_size=2)
    ids = llm.tokenizer.encode("Hello")
    (expected,) = llm.generate(["Hello"], LONG)

    async def lose(stream: RequestStream) -> None:
        async for _ in stream:
            os.kill(llm._ranks.pids[0], signal.SIGKILL)

    async def serve() -> list[int]:
        engine = AsyncEngine(llm.engine, llm.blueprint.rebuild, first_retry_s=0.1)
        try:
            with pytest.raises(EngineFault, match="rank 1 of 2 was ended by SIGKILL"):
                await lose(engine.submit([(ids, LONG)]))
            while engine.state != "running":
                await asyncio.sleep(0.05)
            assert engine.num_restarts == 1
            pieces = [piece async for updates in engine.submit([(ids, LONG)]) for _, piece in updates]
            return [token for piece in pieces for token in piece.token_ids]
        finally:
            await engine.stop()

    try:
        assert asyncio.run(asyncio.wait_for(serve(), 90)) == expected.token_ids
    finally:
        llm.exit()


def test_ranks_end_with_the_first(directory):
    """Killed with SIGKILL, it has no time to end the others."""
    program = (
        "from wedlm import LLM, SamplingParams\n"
        f"llm = LLM({str(directory)!r}, device='cpu', dtype='float32', tensor_parallel_size=4)\n"
        "print(*llm._ranks.pids, llm._ranks._processes.directory, flush=True)\n"
        "while True:\n"
        "    llm.generate(['x'] * 4, SamplingParams(max_tokens=50))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment) as first:
        *pids, meeting = first.stdout.readline().split()
        time.sleep(0.5)
        first.kill()
    end_time = time.monotonic() + 10
    while any(is_running(int(pid)) for pid in pids) or Path(meeting).exists():
        assert time.monotonic() < end_time
        time.sleep(0.02)


def test_no_rank_ever_holds_the_whole_model(tmp_path, record_property):
    """The most memory that a rank of two has while it loads, beyond that of a rank of a tiny model."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_layers": 4, "num_heads": 16, "num_kv_heads": 8}
    small, large = save_tiny(tmp_path / "small"), save_tiny(tmp_path / "large", **wide, head_dim=64)
    whole = (large / "model.safetensors").stat().st_size
    peaks = []
    for path in (small, large):
        llm = LLM(path, **ONE, tensor_parallel_size=2)
        peaks.append(peak_bytes(llm._ranks.pids[0]))
        llm.exit()
    share = (peaks[1] - peaks[0]) / whole
    record_property("weights, MB", whole // 10**6)
    record_property("share of them at the peak of a rank of two", round(share, 2))
    assert 0.4 < share < 0.85


def test_several_engines_of_one_process(directory):
    """Each has ranks of its own; they do not meet each other's."""
    llms = LLM.together({"a": directory, "b": directory}, **ONE, tensor_parallel_size=2)
    try:
        texts = [llm.generate(PROMPTS, SamplingParams(max_tokens=20)) for llm in llms.values()]
        assert [one.token_ids for one in texts[0]] == [one.token_ids for one in texts[1]]
        assert not {*llms["a"]._ranks.pids} & {*llms["b"]._ranks.pids}
    finally:
        for llm in llms.values():
            llm.exit()
