# SPDX-License-Identifier: Apache-2.0
"""32 clients for ``WEDLM_SOAK_MINUTES`` (30 unless told otherwise), who leave at random, of a server into which a fault
is injected every minute: every text at temperature 0 is right, and nothing grows."""

import json
import os
import random
import signal
import threading
import time
from collections import Counter

import pytest

from tests.attack.cases import CHAT, TEXT, leave
from tests.attack.probe import tree
from tests.attack.victim import Victim, serving_process
from tests.engine.tiny_llm import save_tiny
from tests.server.running import wait_until
from wedlm import LLM, SamplingParams

MINUTES = float(os.environ.get("WEDLM_SOAK_MINUTES", "30"))
CLIENTS, FAULT_EVERY_S, GROWTH = 32, 60.0, 0.05
PROMPTS = ["abc", "Hello", "x y z", "1 2 3 4 5 6 7 8 9", "The quick brown fox", "aaaa" * 10]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
FAULTS = ["forward", "tokenizer", "helper", "log"]


class Clients:
    """32 threads; ``statuses`` counts what they got, and ``wrong`` has the texts that are not as expected."""

    def __init__(self, victim: Victim, expected: dict[tuple[str, str], str]) -> None:
        self.victim, self.expected = victim, expected
        self.statuses: Counter[str] = Counter()
        self.wrong: list[object] = []
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(70)
            assert not thread.is_alive()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        while not self._stop.is_set():
            act = rng.choice([self._ask, self._ask, self._ask, self._fill_schema, self._leave])
            try:
                said = act(rng)
            except OSError as error:
                said = type(error).__name__
            with self._lock:
                self.statuses[said] += 1
            time.sleep(rng.random() * 0.2)

    def _ask(self, rng: random.Random) -> str:
        prompt, decoding = rng.choice(list(self.expected))
        streamed = rng.random() < 0.33
        body = {"model": self.victim.model, "prompt": prompt, "decoding": decoding, "max_tokens": 24, "temperature": 0}
        body |= {"ignore_eos": True, "stream": streamed}
        status, answer = self.victim.post(TEXT, json.dumps(body).encode())
        if status != 200:
            return str(status)
        text = _text(answer, streamed)
        if text is not None and text != self.expected[prompt, decoding]:
            self.wrong.append((prompt, decoding, streamed, text))
        return "fault in a stream" if text is None else "200"

    def _fill_schema(self, rng: random.Random) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        messages = [{"role": "user", "content": rng.choice(PROMPTS)}]
        body = {"model": self.victim.model, "messages": messages, "response_format": form, "max_tokens": 40}
        status, answer = self.victim.post(CHAT, json.dumps({**body, "temperature": 0}).encode())
        if status == 200:
            choice = json.loads(answer)["choices"][0]
            if choice["finish_reason"] == "stop" and not isinstance(
                json.loads(choice["message"]["content"])["a"], bool
            ):
                self.wrong.append(choice)
        return str(status)

    def _leave(self, rng: random.Random) -> str:
        body = {"model": self.victim.model, "prompt": rng.choice(PROMPTS), "n": 4, "max_tokens": 400}
        body |= {"ignore_eos": True, "stream": rng.random() < 0.5}
        leave(TEXT, json.dumps(body).encode(), rng.random() * 0.3)(self.victim)
        return "left"


def _with_faults(victim: Victim, minutes: float) -> tuple[int, int]:
    """Let the time pass, with a fault each minute. Their number, and the memory after warming up."""
    start, faults, warm = time.monotonic(), 0, 0
    next_fault = start + min(FAULT_EVERY_S, minutes * 6)
    while time.monotonic() < start + minutes * 60:
        time.sleep(0.5)
        assert victim.process.poll() is None, victim.lines[-5:]
        if not warm and time.monotonic() > start + min(120.0, minutes * 20):
            warm = victim.memory
        if time.monotonic() > next_fault:
            _inject(victim, FAULTS[faults % len(FAULTS)])
            next_fault, faults = time.monotonic() + FAULT_EVERY_S, faults + 1
    return faults, warm


@pytest.mark.long
def test_soak(tmp_path, record_property):
    model = save_tiny(tmp_path / "tiny", max_position_embeddings=512)
    reference = LLM(model, device="cpu")
    expected = {}
    for decoding in ("autoregressive", "verified"):
        params = SamplingParams(max_tokens=24, decoding=decoding, ignore_eos=True)
        expected |= {(prompt, decoding): reference.generate(prompt, params)[0].text for prompt in PROMPTS}
    with serving_process(model, "--request-timeout", "60", entry="tests.attack.faulty") as victim:
        start, clients = time.monotonic(), Clients(victim, expected)
        faults, warm = _with_faults(victim, MINUTES)
        seen = victim.seen(start, time.monotonic())
        clients.stop()
        wait_until(victim.idle, seconds=20)
        time.sleep(3)
        last, children = victim.memory, len(tree(victim.process.pid)) - 1
        record_property("minutes", MINUTES)
        record_property("answers", dict(clients.statuses))
        record_property("faults", faults)
        record_property("memory", f"{warm / 1e6:.0f} MB after warm-up, {last / 1e6:.0f} MB at the end")
        shares = [seen.percentile(share) * 1e3 for share in (0.5, 0.99)]
        record_property("/health at 50, 99 %", f"{shares[0]:.1f}, {shares[1]:.1f} ms")
        left = f"{victim.num_threads} threads, {victim.num_descriptors} descriptors, {children} processes"
        record_property("left", left)
        assert not clients.wrong, clients.wrong[:3]
        assert faults
        assert victim.metrics()["cache_pages_in_use"] <= 2  # the probe's own text may be running
        assert victim.num_threads < 40
        assert victim.num_descriptors < 40
        assert children <= 3  # processes that compile grammars may wait for the next one
        assert last < warm * (1 + GROWTH)
        victim.end()


def _text(answer: bytes, streamed: bool) -> str | None:
    """None of a stream that a fault has ended."""
    if not streamed:
        return json.loads(answer)["choices"][0]["text"]
    events = [json.loads(line[6:]) for line in answer.decode().split("\n") if line.startswith("data: {")]
    return None if "error" in events[-1] else "".join(event["choices"][0]["text"] for event in events)


def _inject(victim: Victim, fault: str) -> None:
    """Ask the process for a fault, end its helpers, or make the log's reader slow."""
    if fault == "helper":
        for pid in tree(victim.process.pid)[1:]:
            os.kill(pid, signal.SIGKILL)
    elif fault == "log":
        victim.pause_log(3.0)
    else:
        victim.process.send_signal(signal.SIGUSR1 if fault == "forward" else signal.SIGUSR2)
