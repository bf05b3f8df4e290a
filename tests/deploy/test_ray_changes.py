# SPDX-License-Identifier: Apache-2.0
"""Ray Serve under load while replicas come and go: other weights, more replicas, fewer, and what goes wrong then."""

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass

import httpx2
import pytest

pytest.importorskip("ray.serve")

from tests.deploy.deployed import Stream, client_of, ray_serve, say, stream, wait_until
from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, SamplingParams

NUM_STREAMS, NUM_TOKENS = 32, 32
NUM_LONG, LONG_TOKENS = 3, 600  # answers that take longer than Ray waits for a replica by itself
TARGET = 20  # more than three times the few clients, which is as much growth as is believed
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Ray's own


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two with the same tokenizer and other weights."""
    directory = tmp_path_factory.mktemp("ray")
    return [save_tiny(directory / f"tiny {seed}", seed=seed, max_position_embeddings=2048) for seed in (0, 1)]


@pytest.fixture(scope="module")
def asked():
    """(prompt, tokens) of each client."""
    lengths = [LONG_TOKENS] * NUM_LONG + [NUM_TOKENS] * (NUM_STREAMS - NUM_LONG)
    return [(f"Tell me about the number {i}.", length) for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def texts(checkpoints, asked):
    """Of each checkpoint, by one engine."""
    found = []
    for checkpoint in checkpoints:
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for _, length in asked]
        llm = LLM(checkpoint, dtype="float32", device="cpu")
        found.append([one.text for one in llm.generate([prompt for prompt, _ in asked], params)])
    assert not set(found[0]) & set(found[1])
    return found


@pytest.fixture(scope="module")
def deployed(checkpoints):
    with ray_serve(checkpoints[0], replicas=2) as one:
        one.deploy()
        yield one


@dataclass
class Seen:
    """What one client saw of one request."""

    client: int
    asked: float
    ended: float
    stream: Stream


class Load:
    """Clients that ask for one stream after the other until they are stopped."""

    def __init__(self, deployed, asked, clients):
        self._deployed, self._asked, self._clients = deployed, asked, clients
        self.seen, self._stopped = [], False

    def stop(self):
        self._stopped = True

    async def run(self):
        async with client_of(self._deployed) as client:
            await asyncio.gather(*(self._client(client, number) for number in self._clients))

    async def _client(self, client, number):
        prompt, length = self._asked[number]
        while not self._stopped:
            one, start = Stream(), time.monotonic()
            try:
                await stream(
                    client, one, "/v1/completions", {"max_tokens": length, "ignore_eos": True, "prompt": prompt}
                )
            except (httpx2.TransportError, json.JSONDecodeError) as error:
                one.error = f"cut: {error!r}"
            self.seen.append(Seen(number, start, time.monotonic(), one))
            if one.error is not None:
                await asyncio.sleep(0.2)

    def by_model(self, texts):
        """How many streams have the whole text of each model; the rest by their error, or "wrong"."""
        found = Counter()
        for seen in self.seen:
            whole = [i for i, some in enumerate(texts) if seen.stream.ended and seen.stream.text == some[seen.client]]
            found[seen.stream.error or (whole[0] if whole else "wrong")] += 1
        return found


def under_load(load, change):
    """When ``change`` began, which runs in a thread while the load runs, from a while before it to a while after."""

    async def both():
        running = asyncio.ensure_future(load.run())
        await asyncio.sleep(3)
        start = time.monotonic()
        try:
            await asyncio.to_thread(change)
            await asyncio.sleep(3)
        finally:
            load.stop()
            await asyncio.wait_for(running, 600)
        return start

    return asyncio.run(both())


def states():
    """How many replicas Serve has in each state."""
    from ray import serve

    return serve.status().applications["wedlm"].deployments["Replica"].replica_states


def test_new_weights_under_load(deployed, checkpoints, asked, texts, record_property):
    for surge in (False, True):
        kind, order = f"surge {surge}", texts if not surge else texts[::-1]
        load = Load(deployed, asked, range(NUM_STREAMS))
        model = str(checkpoints[0 if surge else 1])
        start = under_load(load, lambda model=model, surge=surge: deployed.deploy(model=model, surge=surge))
        found = load.by_model(order)
        say(kind, found)
        assert found.keys() == {0, 1}
        new = {one.stream.replica for one in load.seen if one.stream.text == order[1][one.client]}
        old = {one.stream.replica for one in load.seen} - new
        assert all((one.stream.text == order[1][one.client]) == (one.stream.replica in new) for one in load.seen)
        last = max(one.asked for one in load.seen if one.stream.replica in old) - start
        first = min(one.asked for one in load.seen if one.stream.replica in new) - start
        ended = max(one.ended for one in load.seen if one.stream.replica in old) - start
        record_property(f"{kind}: whole streams of the old weights", found[0])
        record_property("of the new ones", found[1])
        record_property("cut, refused or mixed", found.total() - found[0] - found[1])
        record_property("seconds until new weights answer", round(first, 1))
        record_property("until they alone take requests", round(last, 1))
        record_property("until the last old stream has ended", round(ended, 1))
        longest = max(one.ended - one.asked for one in load.seen)
        record_property("longest stream, s", round(longest, 1))
        record_property("longest wait for a first token, s", round(max(one.stream.first_s for one in load.seen), 1))


def command_of(deployed, *words):
    """``wedlm deploy ray`` in a process of its own, on the cluster of this one."""
    import ray

    address = ray.get_runtime_context().gcs_address
    port = deployed.url.rpartition(":")[2]
    options = ("--device", "cpu", "--dtype", "float32", "--replicas", "2", "--port", port)
    command = (sys.executable, "-m", "wedlm", "deploy", "ray", *options, *words)
    return subprocess.Popen(
        command, env={**os.environ, "RAY_ADDRESS": address}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_what_cannot_be_served_changes_nothing(deployed, checkpoints, asked, texts, record_property, tmp_path):
    """A path that is wrong, a checkpoint that is broken, and one that a replica refuses once it has loaded it."""
    broken = save_tiny(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    deployed.deploy(model=str(checkpoints[0]), surge=True)
    before = deployed.replicas()
    for what, words in (
        ("a path that is wrong", ("--model", str(tmp_path / "nothing"))),
        ("a broken checkpoint", ("--model", str(broken))),
        ("what a replica refuses", ("--model", str(checkpoints[1]), "--mask-token-id", "100000", "--surge")),
    ):
        load = Load(deployed, asked, range(NUM_LONG, NUM_STREAMS))
        said = []

        def deploy(words=words, said=said):
            process = command_of(deployed, *words)
            said += [process.communicate(timeout=500)[0], process.returncode]

        start = under_load(load, deploy)
        say(what, said, load.by_model(texts), states())
        assert said[1] == 2
        assert "Traceback" not in said[0]
        assert load.by_model(texts).keys() == {0}
        assert len(before & deployed.replicas()) == 2
        record_property(f"{what}: seconds until it is told", round(max(one.asked for one in load.seen) - start - 3, 1))
        record_property("streams meanwhile, all right", len(load.seen))


def test_the_same_command_with_another_model(deployed, checkpoints, asked, texts):
    """It replaces what another one has deployed; a command that has been replaced ends nothing."""
    deployed.deploy(model=str(checkpoints[0]))
    process = command_of(deployed, "--model", f"tiny={checkpoints[1]}")
    load = Load(deployed, asked, range(NUM_LONG, NUM_STREAMS))

    def replaced():
        wait_until(lambda: load.seen and load.seen[-1].stream.text == texts[1][load.seen[-1].client])

    under_load(load, replaced)
    assert load.by_model(texts).keys() == {0, 1}
    for line in process.stdout:
        if "Ctrl-C ends it" in line:
            break
    deployed.deploy(model=str(checkpoints[0]))
    process.send_signal(signal.SIGINT)
    assert "which goes on" in process.communicate(timeout=120)[0]
    assert process.returncode == 0
    load = Load(deployed, asked, range(NUM_LONG, NUM_STREAMS))
    under_load(load, lambda: None)
    assert load.by_model(texts).keys() == {0}


LEAVES = """
import httpx2, sys
body = {"model": "tiny", "prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "stream": True}
with httpx2.stream("POST", sys.argv[1] + "/v1/completions", json=body, timeout=600) as answer:
    print(answer.headers["x-wedlm-replica"], flush=True)
    for _ in answer.iter_lines():
        pass
"""


def test_replicas_come_and_go_by_load(deployed, checkpoints, asked, texts, record_property, monkeypatch):
    monkeypatch.setattr("wedlm.deploy.ray_serve.DOWN_AFTER_S", 10.0)
    deployed.deploy(model=str(checkpoints[0]), replicas=1, autoscale=(1, 2, TARGET))
    (first,) = deployed.replicas()
    few = Load(deployed, asked, range(NUM_LONG + 2))  # all long ones and two more, for which one replica is enough
    many = Load(deployed, asked, range(NUM_LONG + 2, NUM_STREAMS))

    async def until(condition):
        await asyncio.to_thread(wait_until, condition)

    async def day():
        running = [asyncio.ensure_future(few.run())]
        await asyncio.sleep(15)
        assert set(states()) == {"RUNNING"}
        times = {"rise": time.monotonic()}
        running.append(asyncio.ensure_future(many.run()))
        await until(lambda: states().get("STARTING"))
        times["asked for"] = time.monotonic()
        await until(lambda: states().get("RUNNING") == 2)
        times["there"] = time.monotonic()
        await until(lambda: any(one.stream.replica != first for one in many.seen))
        await asyncio.sleep(10)
        times["fall"] = time.monotonic()
        many.stop()
        leaving = []
        for _ in range(2):  # one on each replica, probably
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", LEAVES, deployed.url, stdout=asyncio.subprocess.PIPE
            )
            await process.stdout.readline()
            leaving.append(process)
        await until(lambda: states().get("STOPPING"))
        times["sent away"] = time.monotonic()
        for process in leaving:
            process.kill()
            await process.wait()
        await until(lambda: states() == {"RUNNING": 1})
        times["gone"] = time.monotonic()
        await asyncio.sleep(3)
        few.stop()
        await asyncio.wait_for(asyncio.gather(*running), 600)
        return times

    times = asyncio.run(day())
    for load in (few, many):
        say(load.by_model(texts))
        assert load.by_model(texts).keys() == {0}
    assert {one.stream.replica for one in many.seen} > {first}

    def seconds(name, since):
        return round(times[name] - times[since], 1)

    def firsts(begin, end):
        some = [one.stream.first_s for one in many.seen if times[begin] <= one.asked < times[end]]
        return f"{round(statistics.median(some) * 1e3)} and {round(max(some) * 1e3)}"

    drained = [one for one in few.seen if one.asked < times["sent away"] < one.ended]
    record_property(
        f"seconds from {NUM_LONG + 2} streams to {NUM_STREAMS} until a replica is asked for",
        seconds("asked for", "rise"),
    )
    record_property("until it is there", seconds("there", "rise"))
    record_property("ms to a first token until then, median and longest", firsts("rise", "there"))
    record_property("once it is there", firsts("there", "fall"))
    record_property(f"seconds from {NUM_LONG + 2} streams again until one is sent away", seconds("sent away", "fall"))
    record_property("until it has gone", seconds("gone", "fall"))
    record_property("streams that ran when it was sent away", len(drained))
    record_property("streams, all with the right text", len(few.seen) + len(many.seen))
