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
from tests.attack.victim import serving_process
from tests.engine.tiny_llm import save_tiny
from tests.server.running import wait_until
from wedlm import LLM, SamplingParams

MINUTES = float(os.environ.get("WEDLM_SOAK_MINUTES", "30"))
CLIENTS, FAULT_EVERY_S, GROWTH = 32, 60.0, 0.05
PROMPTS = ["abc", "Hello", "x y z", "1 2 3 4 5 6 7 8 9", "The quick brown fox", "aaaa" * 10]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
FAULTS = ["forward", "tokenizer", "helper", "log"]


@pytest.mark.long
def test_soak(tmp_path, record_property):
    model = save_tiny(tmp_path / "tiny", max_position_embeddings=512)
    reference = LLM(model, device="cpu")
    expected = {
        (prompt, decoding): reference.generate(
            prompt, SamplingParams(max_tokens=24, decoding=decoding, ignore_eos=True)
        )[0].text
        for prompt in PROMPTS
        for decoding in ("autoregressive", "verified")
    }
    statuses: Counter[str] = Counter()
    wrong: list[object] = []
    stop, lock = threading.Event(), threading.Lock()
    with serving_process(model, "--request-timeout", "60", entry="tests.attack.faulty") as victim:

        def client(number: int) -> None:
            rng = random.Random(number)
            while not stop.is_set():
                prompt, decoding = rng.choice(list(expected))
                body = {"model": victim.model, "prompt": prompt, "decoding": decoding, "max_tokens": 24}
                body |= {"temperature": 0, "ignore_eos": True}
                kind = rng.choice(["whole", "whole", "stream", "schema", "leaver"])
                try:
                    if kind == "leaver":
                        many = {**body, "n": 4, "max_tokens": 400, "temperature": 1, "stream": rng.random() < 0.5}
                        leave(TEXT, json.dumps(many).encode(), rng.random() * 0.3)(victim)
                        said = "left"
                    elif kind == "schema":
                        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
                        asked = {"messages": [{"role": "user", "content": prompt}], "response_format": form}
                        asked |= {"model": victim.model, "max_tokens": 40, "temperature": 0}
                        status, answer = victim.post(CHAT, json.dumps(asked).encode())
                        said = str(status)
                        if status == 200:
                            choice = json.loads(answer)["choices"][0]
                            if choice["finish_reason"] == "stop":
                                assert json.loads(choice["message"]["content"])["a"] in (True, False)
                    else:
                        asked = {**body, "stream": kind == "stream"}
                        status, answer = victim.post(TEXT, json.dumps(asked).encode())
                        said, text = str(status), _text(answer, kind == "stream") if status == 200 else None
                        if text is not None and text != expected[prompt, decoding]:
                            wrong.append((prompt, decoding, kind, text))
                        said = "fault in a stream" if status == 200 and text is None else said
                except OSError as error:
                    said = type(error).__name__
                with lock:
                    statuses[said] += 1
                time.sleep(rng.random() * 0.2)

        threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        end, faults = time.monotonic() + MINUTES * 60, 0
        warm = time.monotonic() + min(120.0, MINUTES * 20)
        next_fault, first = time.monotonic() + min(FAULT_EVERY_S, MINUTES * 6), None
        while time.monotonic() < end:
            time.sleep(0.5)
            assert victim.process.poll() is None, victim.lines[-5:]
            if first is None and time.monotonic() > warm:
                first = victim.memory
            if time.monotonic() > next_fault:
                _inject(victim, FAULTS[faults % len(FAULTS)])
                next_fault, faults = time.monotonic() + FAULT_EVERY_S, faults + 1
        stop.set()
        for thread in threads:
            thread.join(70)
        wait_until(victim.idle, seconds=20)
        time.sleep(3)
        last = victim.memory
        seen = victim.seen(end - MINUTES * 60, end)
        record_property("minutes", MINUTES)
        record_property("answers", dict(statuses))
        record_property("faults", faults)
        record_property("memory", f"{(first or last) / 1e6:.0f} MB after warm-up, {last / 1e6:.0f} MB at the end")
        record_property(
            "/health at 50, 99 %", f"{seen.percentile(0.5) * 1e3:.1f}, {seen.percentile(0.99) * 1e3:.1f} ms"
        )
        metrics = victim.metrics()
        record_property("left", f"{victim.num_threads} threads, {victim.num_descriptors} descriptors")
        assert not wrong, wrong[:3]
        assert faults
        assert metrics["cache_pages_in_use"] <= 2  # the probe's own text may be running
        assert victim.num_threads < 40
        assert victim.num_descriptors < 40
        assert len(tree(victim.process.pid)) <= 3  # a process that compiles grammars may wait
        assert last < (first or last) * (1 + GROWTH)
        victim.end()


def _text(answer: bytes, streamed: bool) -> str | None:
    """None of a stream that a fault has ended."""
    if not streamed:
        return json.loads(answer)["choices"][0]["text"]
    events = [json.loads(line[6:]) for line in answer.decode().split("\n") if line.startswith("data: {")]
    return None if "error" in events[-1] else "".join(event["choices"][0]["text"] for event in events)


def _inject(victim, fault: str) -> None:
    """Ask the process for a fault, end its helpers, or make the log's reader slow."""
    if fault == "helper":
        for pid in tree(victim.process.pid)[1:]:
            os.kill(pid, signal.SIGKILL)
    elif fault == "log":
        victim.pause_log(3.0)
    else:
        victim.process.send_signal(signal.SIGUSR1 if fault == "forward" else signal.SIGUSR2)
