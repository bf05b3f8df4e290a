# SPDX-License-Identifier: Apache-2.0
"""Ray Serve under load while replicas come and go: other weights, more replicas, fewer, and what goes wrong then."""

import asyncio
import json
import time

import httpx2
import pytest

pytest.importorskip("ray.serve")

from tests.deploy.deployed import Stream, client_of, ray_serve, say, stream, wait_until
from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, SamplingParams

NUM_STREAMS, NUM_TOKENS, NUM_LONG, LONG_TOKENS = 32, 48, 6, 1000  # a long answer takes longer than any default's patience
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Ray's own


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two with the same tokenizer and other weights."""
    directory = tmp_path_factory.mktemp("ray")
    return [save_tiny(directory / f"tiny {seed}", seed=seed, max_position_embeddings=2048) for seed in (0, 1)]


@pytest.fixture(scope="module")
def deployed(checkpoints):
    with ray_serve(checkpoints[0], replicas=2) as one:
        one.deploy()
        yield one


def lengths():
    return [LONG_TOKENS if number < NUM_LONG else NUM_TOKENS for number in range(NUM_STREAMS)]


def texts(checkpoint, prompts, lengths):
    llm = LLM(checkpoint, dtype="float32", device="cpu")
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    return [output.text for output in llm.generate(prompts, params)]


class Load:
    """Clients that ask for one stream after the other until they are stopped, and what each of them saw, with the
    times at which it was asked and ended."""

    def __init__(self, deployed, prompts, lengths):
        self._deployed, self._prompts, self._lengths = deployed, prompts, lengths
        self.seen, self._stopped = [], False

    def stop(self):
        self._stopped = True

    async def run(self):
        async with client_of(self._deployed) as client:
            await asyncio.gather(*(self._client(client, number) for number in range(len(self._prompts))))

    async def _client(self, client, number):
        body = {"max_tokens": self._lengths[number], "ignore_eos": True, "prompt": self._prompts[number]}
        while not self._stopped:
            one, start = Stream(), time.monotonic()
            try:
                await stream(client, one, "/v1/completions", body)
            except (httpx2.TransportError, json.JSONDecodeError) as error:
                one.error = f"cut: {error!r}"
            self.seen.append((number, start, time.monotonic(), one))
            if one.error is not None:
                await asyncio.sleep(0.2)


def under_load(load, change):
    """``change`` in a thread, while the load runs from a while before it until a while after it."""

    async def both():
        running = asyncio.ensure_future(load.run())
        await asyncio.sleep(3)
        start = time.monotonic()
        try:
            await asyncio.to_thread(change)
            end = time.monotonic()
            await asyncio.sleep(3)
        finally:
            load.stop()
            await asyncio.wait_for(running, 600)
        return start, end

    return asyncio.run(both())


def test_new_weights_under_load(deployed, checkpoints, record_property):
    prompts = [f"Tell me about the number {i}." for i in range(NUM_STREAMS)]
    old, new = (texts(one, prompts, lengths()) for one in checkpoints)
    assert not set(old) & set(new)
    load = Load(deployed, prompts, lengths())
    start, end = under_load(load, lambda: deployed.deploy(model=str(checkpoints[1]), surge=True))
    by, refused, wrong = {"old": 0, "new": 0}, {}, []
    last_old = first_new = None
    for number, asked, ended, one in load.seen:
        if one.error is not None:
            refused[one.error] = refused.get(one.error, 0) + 1
            say("error", one.error, asked - start, ended - start, len(one.text), one.replica)
        elif one.ended and one.text == old[number]:
            by["old"] += 1
            last_old = max(last_old or ended, ended)
        elif one.ended and one.text == new[number]:
            by["new"] += 1
            first_new = min(first_new or asked, asked)
        else:
            wrong.append(one)
    say(by, refused, wrong, start, end, first_new and first_new - start, last_old and last_old - start, "all", len(load.seen), end - start)
    longest = max(ended - asked for _, asked, ended, _ in load.seen)
    say("longest", longest)
    assert not wrong
    assert not refused
