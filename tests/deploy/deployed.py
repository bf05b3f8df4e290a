# SPDX-License-Identifier: Apache-2.0
"""Ray Serve on this machine with replicas of a tiny checkpoint, and clients that say what they saw."""

import asyncio
import json
import socket
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import httpx2
import pytest

from wedlm import LLM, SamplingParams
from wedlm.deploy.ray_serve import RayOptions, build


@contextmanager
def ray_serve(directory, **options):
    """Ray and Serve's proxy with replicas of that checkpoint, until the end of the block."""
    import ray
    from ray import serve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
        ray.init(num_cpus=3, address="local", object_store_memory=2 * 10**8, **quiet)  # one for a change of weights
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        try:
            with suppress(TimeoutError):  # after a minute, which a busy machine's proxy needs; then it goes on loading
                serve.start(http_options={"host": "127.0.0.1", "port": port})
            given = RayOptions(model=str(directory), name="tiny", engine={"dtype": "float32"}, **options)
            yield Deployed(f"http://127.0.0.1:{port}", given, LLM(directory, dtype="float32", device="cpu"))
        finally:
            serve.shutdown()
            ray.shutdown()


@dataclass
class Deployed:
    """``llm``: the checkpoint's own texts."""

    url: str
    options: RayOptions
    llm: LLM

    def deploy(self, **changes):
        from ray import serve

        self.options = replace(self.options, **changes)
        serve.run(build(self.options.plain()), name="wedlm", route_prefix="/")
        wait_until(lambda: len(self.replicas()) == self.options.replicas)

    def replicas(self):
        try:
            page = httpx2.get(f"{self.url}/metrics", timeout=60).text
        except httpx2.TransportError:
            return set()
        return {
            line.split('replica="')[1].split('"')[0]
            for line in page.splitlines()
            if line.startswith("wedlm_engine_up{")
        }

    def expected(self, prompts, num_tokens):
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        return [output.text for output in self.llm.generate(prompts, params)]


def wait_until(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.2)


@dataclass
class Stream:
    """What a client saw: the replica's name, the text, the error's code, and when the first text came."""

    replica: str = ""
    text: str = ""
    error: str | None = None
    usage: dict | None = None
    first_s: float = 0.0
    ended: bool = False


async def stream(client, stream, path, body, begun=None):
    start = time.monotonic()
    body = {"model": "tiny", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
    async with client.stream("POST", path, json=body) as answer:
        stream.replica = answer.headers.get("x-wedlm-replica", "")
        if answer.status_code != 200:
            stream.error = json.loads(await answer.aread())["error"]["code"]
            return stream
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                stream.ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    stream.error = event["error"]["code"]
                stream.usage = event.get("usage") or stream.usage
                for choice in event.get("choices", ()):
                    stream.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                if stream.text and not stream.first_s:
                    stream.first_s = time.monotonic() - start
                    if begun is not None:
                        begun.release()
    return stream


def client_of(deployed):
    limits = httpx2.Limits(max_connections=100)
    return httpx2.AsyncClient(base_url=deployed.url, timeout=httpx2.Timeout(600), limits=limits)


async def complete(deployed, prompts, num_tokens):
    async with client_of(deployed) as client:
        body = {"max_tokens": num_tokens, "ignore_eos": True}
        return await asyncio.gather(
            *(stream(client, Stream(), "/v1/completions", {"prompt": one, **body}) for one in prompts)
        )


def say(*words):
    print(*words, flush=True)
