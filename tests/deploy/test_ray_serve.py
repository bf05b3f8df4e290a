# SPDX-License-Identifier: Apache-2.0
"""The server on Ray Serve: two replicas on this machine, their texts, their ends, and where conversations go."""

import asyncio
import statistics
import time
from types import SimpleNamespace

import httpx2
import pytest

pytest.importorskip("ray.serve")
import yaml
from ray.serve._private.http_util import RequestIdMiddleware
from ray.serve.schema import ServeDeploySchema

from tests.cli.command import wedlm
from tests.deploy.deployed import Stream, client_of, complete, ray_serve, say, stream, wait_until
from tests.engine.tiny_llm import save_tiny
from wedlm.deploy.ray_serve import ConversationRouter, RayOptions, _Sending, build
from wedlm.deploy.routing import ranked
from wedlm.server.errors import unavailable
from wedlm.server.logs import RequestLog
from wedlm.server.metrics import Metrics

LOST = unavailable("the replica ended", "replica_lost")
NUM_KILLS = 20


def test_the_yaml_is_serves(monkeypatch, tmp_path):
    monkeypatch.setenv("WEDLM_API_KEY", "secret")
    words = (
        "--model",
        "mine=./checkpoint",
        "--surge",
        "--tensor-parallel-size",
        "2",
        "--autoscale",
        "1,8,32",
        "--yaml",
    )
    result = wedlm("deploy", "ray", *words, "--max-queue", "7", "--host", "0.0.0.0", "--api-key", "told")
    assert result.exit_code == 0, result.stderr
    assert "secret" not in result.stdout
    assert "told" not in result.stdout
    schema = ServeDeploySchema.model_validate(yaml.safe_load(result.stdout))
    (app,) = schema.applications
    assert app.import_path == "wedlm.deploy.ray_serve:build"
    options = RayOptions.of(app.args)
    assert (options.model, options.name, options.autoscale) == ("./checkpoint", "mine", (1, 8, 32.0))
    assert options.share.needs == {"num_gpus": 2, "num_cpus": 0}
    config = options.config()
    assert (config.max_queue, config.host, config.api_keys) == (7, "0.0.0.0", ("secret",))
    # Where it is built, there must be the checkpoint: what is served already goes on otherwise.
    with pytest.raises((ValueError, OSError), match="checkpoint"):
        build(app.args)
    bound = build({**app.args, "model": str(save_tiny(tmp_path / "tiny"))})
    ingress, replica = bound._bound_deployment, bound._bound_deployment.init_args[0]._bound_deployment
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s) == (1, 8, 0)
    policy = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    assert policy(SimpleNamespace(total_num_requests=80.0, current_time=1.0)) == (2.5, {})
    # All end no sooner than the longest request, and begin before others end.
    for one in (ingress, replica):
        assert one._deployment_config.graceful_shutdown_timeout_s > config.request_timeout_s
        assert one._deployment_config.max_surge_percent > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slurm"], "the platform is 'slurm'; expected ray"),
        (["ray", "--replicas", "0"], "replicas is 0; expected at least 1"),
        (["ray", "--autoscale", "4,2,8"], "autoscale is 4,2,8; expected MIN,MAX,TARGET with 1 <= MIN <= MAX"),
        (["ray", "--autoscale", "4"], "autoscale is '4'; expected MIN,MAX,TARGET, such as 1,8,32"),
        (["ray", "--routing", "best"], "routing is 'best'; expected one of prefix, round_robin"),
        (["ray", "--model", "a=x", "--model", "b=y"], "2 models are given; expected one"),
    ],
)
def test_wrong_options(words, message):
    result = wedlm("deploy", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("path", "kind", "last"),
    [
        ("/v1/completions", "text/event-stream", b"data: [DONE]"),
        ("/v1/messages", "text/event-stream", b"event: error"),
        ("/v1/responses", "text/event-stream", b"event: error"),
        ("/api/chat", "application/x-ndjson", b'{"error"'),
    ],
)
def test_a_lost_stream_is_told_in_its_form(path, kind, last):
    sent = []

    async def send(message):
        sent.append(message)

    async def lose(begun):
        sending = _Sending(send, path)
        if begun:
            head = [(b"content-type", f"{kind}; charset=utf-8".encode())]
            await sending({"type": "http.response.start", "status": 200, "headers": head})
            await sending({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        await sending.fail(LOST)

    asyncio.run(lose(begun=True))
    assert last in sent[-1]["body"]
    assert b"the replica ended" in sent[-1]["body"]
    assert not sent[-1]["more_body"]
    sent.clear()
    asyncio.run(lose(begun=False))
    assert sent[0]["status"] == 503
    assert b"the replica ended" in sent[1]["body"]


@pytest.mark.parametrize("given", [[], [(b"x-request-id", b"mine")]])
def test_one_request_id(given):
    """Ray's proxy gives the request an id, unless the client has, and adds it to the answer; the replica knows it."""
    sent = []

    async def replica(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def ingress(scope, receive, send):
        await RequestLog(replica, Metrics())(scope, receive, _Sending(send, scope["path"]))

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": given}
    asyncio.run(RequestIdMiddleware(ingress)(scope, None, send))
    (found,) = [value for name, value in sent[0]["headers"] if name.lower() == b"x-request-id"]
    assert found == b"mine" if given else len(found) > 8


def test_an_answer_that_is_cut_is_not_ended():
    async def send(message):
        pass

    async def lose():
        sending = _Sending(send, "/v1/completions")
        await sending(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
        )
        await sending.fail(LOST)

    with pytest.raises(RuntimeError, match="the answer is cut"):
        asyncio.run(lose())


def test_rays_router_asks_ours():
    names = ["a", "b", "c"]
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]
    router = ConversationRouter.__new__(ConversationRouter)
    router._replica_queue_len_cache = SimpleNamespace(get=lambda _: None)

    def order(key):
        pending = SimpleNamespace(args=[key, {}, b""], routing_context=SimpleNamespace(should_backoff=False))
        chosen = asyncio.run(router.choose_replicas(replicas, pending))
        return [one.replica_id.unique_id for (one,) in chosen]

    router.initialize_state(routing="prefix", spill=8)
    assert order("conversation") == ranked("conversation", names)
    router.initialize_state(routing="round_robin", spill=8)
    assert [order("conversation")[0] for _ in range(4)] == ["b", "c", "a", "b"]


# From here on: Ray itself.


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    directory = save_tiny(tmp_path_factory.mktemp("ray") / "tiny", max_position_embeddings=2048)
    with ray_serve(directory, replicas=2) as one:
        one.deploy()
        yield one


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_who_leaves_stops_the_engine(deployed, record_property):
    async def leave():
        async with client_of(deployed) as client:
            body = {"model": "tiny", "prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line:
                        return

    def figure(name):
        page = httpx2.get(f"{deployed.url}/metrics", timeout=60).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name + "{"))

    before = figure("wedlm_generated_tokens_total")
    asyncio.run(leave())
    wait_until(lambda: figure("wedlm_sequences_open") == 0)
    tokens = figure("wedlm_generated_tokens_total") - before
    assert tokens < 1900
    record_property("tokens made of 1900", round(tokens))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_conversations_of_ten_turns(deployed, record_property):
    def talk(routing):
        async def conversation(client, number, found):
            messages = []
            for turn in range(10):
                messages.append({"role": "user", "content": f"{routing} {number}, turn {turn}: " + "word " * 15})
                one = await stream(client, Stream(), "/v1/chat/completions", {"messages": messages, "max_tokens": 8})
                assert one.error is None, one
                found.append((turn, one))
                messages.append({"role": "assistant", "content": one.text})

        async def all_of_them():
            found = []
            async with client_of(deployed) as client:
                await asyncio.gather(*(conversation(client, i, found) for i in range(8)))
            return found

        deployed.deploy(replicas=2, routing=routing)
        found = asyncio.run(all_of_them())
        cached = sum(one.usage["prompt_tokens_details"]["cached_tokens"] for _, one in found)
        prompts = sum(one.usage["prompt_tokens"] for _, one in found)
        first = statistics.median(one.first_s for turn, one in found if turn)
        say(routing, cached / prompts, first)
        return cached / prompts, first

    rates = {}
    for routing in ("round_robin", "prefix"):
        rate, first = talk(routing)
        rates[routing] = rate
        record_property(f"{routing}: hit rate", round(rate, 3))
        record_property(f"{routing}: median ms to the first token, turns 2 to 10", round(first * 1e3))
    assert rates["prefix"] > rates["round_robin"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_64_streams(deployed, record_property):
    prompts = [f"Tell me about the number {i}." for i in range(64)]
    wanted = deployed.expected(prompts, 64)
    seconds = {}
    for count in (2, 2, 1, 1):
        deployed.deploy(replicas=count)
        start = time.monotonic()
        streams = asyncio.run(complete(deployed, prompts, 64))
        seconds.setdefault(count, []).append(time.monotonic() - start)
        say(count, "replicas:", seconds[count][-1], "s")
        assert [one.text for one in streams] == wanted
        assert all(one.ended and one.error is None for one in streams)
        assert len({one.replica for one in streams}) == count
    rates = {count: 64 * 64 / min(some) for count, some in seconds.items()}
    record_property("right texts", "64 of 64, four times")
    for count, rate in rates.items():
        record_property(f"tok/s of {count} replicas", round(rate))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_a_replica_that_ends_takes_its_streams_alone(deployed, record_property):
    import ray

    deployed.deploy(replicas=2, routing="prefix")
    prompts = [f"Count to {i}, please." for i in range(12)]
    wanted = deployed.expected(prompts, 300)
    lost = told = others = 0
    recovered = []

    async def round_of_streams():
        begun = asyncio.Semaphore(0)
        streams = [Stream() for _ in prompts]
        async with client_of(deployed) as client:
            body = {"max_tokens": 300, "ignore_eos": True}
            tasks = [
                asyncio.ensure_future(stream(client, one, "/v1/completions", {"prompt": prompt, **body}, begun))
                for one, prompt in zip(streams, prompts, strict=True)
            ]
            for _ in prompts:
                await begun.acquire()
            running = [one for one in streams if not one.ended]
            victim = (running or streams)[0].replica
            on_it = {id(one) for one in running if one.replica == victim}
            actor = ray.get_actor(f"SERVE_REPLICA::wedlm#Replica#{victim}", namespace="serve")
            ray.kill(actor)
            start = time.monotonic()
            await asyncio.gather(*tasks)
        return streams, victim, on_it, start

    for number in range(NUM_KILLS):
        streams, victim, on_it, start = asyncio.run(round_of_streams())
        for one, text in zip(streams, wanted, strict=True):
            if one.error is None:
                assert one.ended
                assert one.text == text
                others += 1
            else:
                assert one.error == "replica_lost"
                assert one.replica == victim
                assert id(one) in on_it
                assert text.startswith(one.text)
                lost, told = lost + 1, told + one.ended
        wait_until(lambda victim=victim: len(deployed.replicas() - {victim}) == 2)
        recovered.append(time.monotonic() - start)
        say(number, "lost so far", lost, "recovered in", recovered[-1])
    assert told == lost > 0
    record_property("kills", NUM_KILLS)
    record_property("streams", others + lost)
    record_property("lost, all on the replica that was killed", lost)
    record_property("told", told)
    record_property("others, with the right text", others)
    record_property("seconds until there are two replicas again, median", round(statistics.median(recovered), 1))
    record_property("longest", round(max(recovered), 1))
