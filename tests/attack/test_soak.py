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
from http.client import HTTPException

import pytest

from tests.attack.cases import CHAT, TEXT, leave
from tests.attack.probe import tree
from tests.attack.victim import Victim, serving_process
from tests.engine.tiny_llm import save_tiny
from tests.server.running import wait_until
from wedlm import LLM, SamplingParams

MINUTES = float(os.environ.get("WEDLM_SOAK_MINUTES", "30"))
CLIENTS, FAULT_EVERY_S, GROWTH = 32, 60.0, 0.05
WARM_S = 120.0  # in which everything has been in use that is started, made or kept when it is first needed
PROMPTS = ["abc", "Hello", "x y z", "1 2 3 4 5 6 7 8 9", "The quick brown fox", "aaaa" * 10]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
FAULTS = ["forward", "tokenizer", "helper", "disk", "log"]


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
            except (OSError, HTTPException) as error:
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
        schema = {**SCHEMA, "title": str(rng.randrange(500))}  # more of them than are kept
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
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


def _with_faults(victim: Victim, minutes: float) -> int:
    """Let the time pass, with a fault each minute. Their number."""
    start, faults = time.monotonic(), 0
    next_fault = start + min(FAULT_EVERY_S, minutes * 6)
    while time.monotonic() < start + minutes * 60:
        time.sleep(0.5)
        assert victim.process.poll() is None, victim.lines[-5:]
        if time.monotonic() > next_fault:
            _inject(victim, FAULTS[faults % len(FAULTS)])
            next_fault, faults = time.monotonic() + FAULT_EVERY_S, faults + 1
    return faults


def _at_rest(victim: Victim) -> dict[str, int]:
    """What the server holds between the probe's questions: the least of many looks."""
    wait_until(victim.idle, seconds=20)
    time.sleep(2)
    looks = []
    for _ in range(40):
        held = {"threads": victim.num_threads, "descriptors": victim.num_descriptors}
        held["processes"] = len(tree(victim.process.pid)) - 1
        looks.append({"memory": victim.memory, "pages": int(victim.metrics()["cache_pages_in_use"]), **held})
        time.sleep(0.07)
    return {name: min(look[name] for look in looks) for name in looks[0]}


@pytest.mark.long
def test_soak(tmp_path, record_property):
    model = save_tiny(tmp_path / "tiny", max_position_embeddings=512)
    reference = LLM(model, device="cpu")
    expected = {}
    for decoding in ("autoregressive", "verified"):
        params = SamplingParams(max_tokens=24, decoding=decoding, ignore_eos=True)
        expected |= {(prompt, decoding): reference.generate(prompt, params)[0].text for prompt in PROMPTS}
    with serving_process(model, "--request-timeout", "60", entry="tests.attack.faulty") as victim:
        clients = Clients(victim, expected)
        time.sleep(min(WARM_S, MINUTES * 20))
        clients.stop()
        before, start = _at_rest(victim), time.monotonic()
        clients = Clients(victim, expected)
        faults = _with_faults(victim, MINUTES)
        seen = victim.seen(start, time.monotonic())
        clients.stop()
        after = _at_rest(victim)
        record_property("minutes", MINUTES)
        record_property("answers", dict(clients.statuses))
        record_property("faults", faults)
        for name in before:
            unit, scale = (" MB", 1e6) if name == "memory" else ("", 1)
            record_property(name, f"{before[name] / scale:.0f}{unit} before, {after[name] / scale:.0f} after")
        shares = [seen.percentile(share) * 1e3 for share in (0.5, 0.99)]
        record_property("/health at 50, 99 %", f"{shares[0]:.1f}, {shares[1]:.1f} ms of {len(seen.health)}")
        record_property("503 of /health while the engine restarts", len(seen.troubles))
        record_property("slowest text", f"{seen.slowest_text:.2f} s")
        assert not clients.wrong, clients.wrong[:3]
        assert clients.statuses["200"] > 100 * MINUTES
        assert faults
        assert after["memory"] < before["memory"] * (1 + GROWTH)
        assert after["pages"] == 0
        for name in ("threads", "descriptors", "processes"):
            assert after[name] <= before[name], (name, before, after)
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
        signals = {"forward": signal.SIGUSR1, "tokenizer": signal.SIGUSR2, "disk": signal.SIGRTMIN}
        victim.process.send_signal(signals[fault])
