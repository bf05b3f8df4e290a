# SPDX-License-Identifier: Apache-2.0
"""The server on Ray Serve: a router in front, and behind it replicas of the whole OpenAI app, each with its engine.

client → Ray's HTTP proxy → ``Ingress`` → ``Replica``. A request's body decides which replica takes it, and Ray's proxy
chooses before it has seen the body; that is what the ingress is for. It reads a body, names its conversation, and hands
both to a replica through Ray's handle, whose router (``ConversationRouter``) keeps a conversation where its keys are.
The app stands beside the engine, not in front of it: what crosses processes are bytes that are ready to be sent, as
many events at once as there are, and no object for each token; the ingress has neither model nor tokenizer.

Neither of Ray's own two ways fits. ``ray.serve.llm`` (``server_cls``) imports vLLM wherever it describes a model, and
its prefix-aware router asks an actor about every request, in a call that holds up the router's loop, and reads only
arguments with ``messages`` or ``prompt``.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.types import Message, Receive, Scope, Send

from wedlm.cluster import Share
from wedlm.deploy.metrics import per_replica
from wedlm.deploy.routing import SPILL, choose, conversation_key, in_turn
from wedlm.deploy.scaling import DOWN_AFTER_S, LOOK_BACK_S, LookAhead
from wedlm.server.config import KEY_VARIABLE, ServerConfig
from wedlm.server.errors import ApiError, anthropic_body, internal_error, ollama_body, unavailable
from wedlm.server.limits import BodyLimit
from wedlm.server.sse import Disconnected, unless_disconnected

ROUTINGS = ("prefix", "round_robin")
_MOST_OPEN = 2**14  # requests of one ingress; each replica refuses beyond its own queue
_LATE_S = 15.0  # beyond a request's time, for a replica that says nothing any more
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path",
          "headers", "client", "server")  # fmt: skip
_HEALTH_S = 5.0
_OF_RAY = b"x-request-id"  # a header that Ray's proxy adds to each answer, and that each replica has added already
REPLICA_HEADER = b"x-wedlm-replica"  # of an answer: who gave it


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What is served, and how; the ``args`` of a Serve YAML (``of``). ValueError.

    name: what clients call the model. engine: options of ``LLM``, apart from the device. server: those of
    ``ServerConfig``. share: what a replica takes. autoscale: fewest and most replicas, and how many open requests each
    is to have; in place of ``replicas``. routing: by conversation ("prefix"), or each replica in its turn. surge: when
    what is served changes, a new replica starts before an old one ends, which takes one more share for a while.
    """

    model: str
    name: str
    adapters: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    share: Share = field(default_factory=lambda: Share(num_gpus=0, num_cpus=1))
    replicas: int = 1
    autoscale: tuple[int, int, float] | None = None
    routing: str = "prefix"
    spill: int = SPILL
    surge: bool = False

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas is {self.replicas}; expected at least 1")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing is {self.routing!r}; expected one of {', '.join(ROUTINGS)}")
        if self.spill < 0:
            raise ValueError(f"spill is {self.spill}; expected at least 0")
        if self.autoscale is not None:
            least, most, target = self.autoscale
            if not (1 <= least <= most and target > 0):
                given = f"{least},{most},{target:g}"
                raise ValueError(f"autoscale is {given}; expected MIN,MAX,TARGET with 1 <= MIN <= MAX and TARGET > 0")
        self.config()

    def config(self) -> ServerConfig:
        """The server's options, with the key that the environment has."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.server.items()
        }
        keys = (*given.pop("api_keys", ()), *filter(None, [os.environ.get(KEY_VARIABLE)]))
        return ServerConfig(**given, api_keys=keys)

    @property
    def patience_s(self) -> float:
        """How long a request can take at most, from its first byte: what ends on purpose waits as long for those it
        has."""
        config = self.config()
        return config.body_timeout_s + config.request_timeout_s + _LATE_S

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "RayOptions":
        """From plain values, as a YAML has them."""
        known = {one.name for one in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"{name} is no option of a deployment; expected one of {', '.join(sorted(known))}")
        made: dict[str, Any] = dict(values)
        if "share" in made:
            made["share"] = Share(**made["share"])
        if made.get("autoscale") is not None:
            least, most, target = made["autoscale"]
            made["autoscale"] = int(least), int(most), float(target)
        return cls(**made)

    def plain(self) -> dict[str, Any]:
        """What ``of`` takes, of lists and dictionaries alone."""
        return json.loads(json.dumps(asdict(self)))


class ConversationRouter(RequestRouter):
    """Ray's choice of a replica for a request, whose first argument is its conversation's name."""

    def initialize_state(self, **kwargs: Any) -> None:
        """``routing`` and ``spill`` of ``RayOptions``."""
        self._routing, self._spill, self._count = kwargs["routing"], kwargs["spill"], 0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica after the other, each only if those before it have no place."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        if self._routing == "round_robin":
            self._count += 1
            order = in_turn(sorted(by_name), self._count)
        else:
            cache = self.replica_queue_len_cache
            num_open = {name: cache.get(one.replica_id) or 0 for name, one in by_name.items()}
            order = choose(pending_request.args[0], num_open, self._spill)
        return [[by_name[name]] for name in order]


class ScalingPolicy:
    """Ray's question how many replicas there are to be, several times a second; one object asks for a deployment."""

    def __init__(self, target: float) -> None:
        self._rule = LookAhead(target)

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Replicas, which Ray rounds up, bounds and, if they are fewer, puts off; and no state of Ray's."""
        return self._rule.wanted(context.total_num_requests, context.current_time or time.time()), {}


class Replica:
    """The app with its engine, called without a socket."""

    async def __init__(self, values: Mapping[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        from wedlm.server.app import create_app

        options = RayOptions.of(values)
        llm = await asyncio.to_thread(_load, options)
        self._app = create_app({options.name: llm}, options.config())
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()
        self._name = serve.get_replica_context().replica_tag
        self._tasks: set[asyncio.Future[None]] = set()

    async def __del__(self) -> None:
        await self._life.__aexit__(None, None, None)

    def check_health(self) -> None:
        """Ray starts another replica in place of one that raises."""
        if self._app.state.service.is_dead:
            raise RuntimeError("the engine is beyond repair")

    async def answer(self, key: str, scope: dict[str, Any], body: bytes) -> AsyncIterator[list[Message]]:
        """The app's ASGI messages, all that are there at once. Whoever stops listening cancels the request. ``key`` is
        the router's."""
        ready: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        bodies: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (REPLICA_HEADER, self._name.encode())]}
            ready.put_nowait(message)

        async def receive() -> Message:
            if bodies:
                return bodies.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app(scope, receive, send))
        self._tasks.add(task)  # which may go on for a moment after the client has left
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: ready.put_nowait(None))
        try:
            while not task.done() or not ready.empty():
                messages = [await ready.get()]
                while not ready.empty():
                    messages.append(ready.get_nowait())
                if found := [one for one in messages if one is not None]:
                    yield found
            task.result()
        finally:
            left.set()

    async def whole(self, scope: dict[str, Any]) -> tuple[str, int, bytes]:
        """This replica's name, and status and body of its answer to a request without a body."""
        messages = [message async for some in self.answer("", scope, b"") for message in some]
        return self._name, messages[0]["status"], b"".join(message.get("body", b"") for message in messages)


def _load(options: RayOptions) -> Any:
    import torch

    from wedlm.engine.llm import LLM

    if not options.share.num_gpus:
        torch.set_num_threads(options.share.num_cpus)
    return LLM(options.model, adapters=options.adapters, **{**options.engine, "device": options.share.device})


@serve.ingress()
class Ingress:
    """The ASGI app that Ray's proxy calls. ``deployed_by``: a name for the command that deployed it, which Serve's own
    status does not tell."""

    def __init__(self, replicas: DeploymentHandle, values: Mapping[str, Any], deployed_by: str) -> None:
        self._replicas, self._deployed_by = replicas, deployed_by
        self._config = RayOptions.of(values).config()

    def deployed_by(self) -> str:
        """For the command line (``_stop``)."""
        return self._deployed_by

    def __serve_build_asgi_app__(self) -> Any:
        return self._serve

    @property
    def _serve(self) -> Any:
        limited = BodyLimit(self._route, self._config.max_body_bytes, self._config.body_timeout_s)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "lifespan":
                for word in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{word}.complete"})
            elif scope["type"] == "http":
                await limited(scope, receive, send)

        return app

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        plain = {name: scope[name] for name in _SCOPE if name in scope}
        if scope["path"] == "/metrics" and scope["method"] == "GET":
            await self._metrics(plain, send)
            return
        body = b""
        if scope["method"] == "POST":
            body = (await receive()).get("body", b"")  # BodyLimit gives it in one piece
        sending = _Sending(send, scope["path"])
        try:
            async with asyncio.timeout(self._config.request_timeout_s + _LATE_S):
                await unless_disconnected(receive, self._pass_on(plain, body, sending))
        except Disconnected:
            pass
        except TimeoutError:
            await sending.fail(ApiError(504, "the replica said nothing", type="timeout_error", code="timeout"))
        except RayTaskError:
            await sending.fail(internal_error())
            raise  # for the log: a fault of ours
        except RayServeException:
            await sending.fail(unavailable("there is no replica that takes requests", "no_replica"))
        except RayError:
            message = "the replica that had this request ended, and its answer is lost; send the request again"
            await sending.fail(unavailable(message, "replica_lost"))

    async def _pass_on(self, scope: dict[str, Any], body: bytes, sending: "_Sending") -> None:
        handle: Any = self._replicas.options(stream=True)
        messages = handle.answer.remote(conversation_key(body), scope, body)
        try:
            async for some in messages:
                for message in some:
                    await sending(message)
        except asyncio.CancelledError:
            messages.cancel()  # the replica's engine stops at its next step
            raise

    async def _metrics(self, scope: dict[str, Any], send: Send) -> None:
        """Those of all replicas; or the first refusal, for want of a key."""
        answers = await self._replicas.broadcast("whole", scope).results_async(return_exceptions=True)
        answers = [one for one in answers if not isinstance(one, Exception)]
        refusals = [(status, body) for _, status, body in answers if status != 200]
        status, kind = 200, b"text/plain; version=0.0.4; charset=utf-8"
        if refusals:
            (status, body), kind = refusals[0], b"application/json"
        else:
            body = per_replica({name: page.decode() for name, _, page in answers}).encode()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class _Sending:
    """Passes ASGI messages on, and knows how far the answer is, so that an end can be told in its form."""

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path = send, path
        self._stream = ""  # the media type of a stream that has begun
        self._begun = self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            # Ray's proxy adds the client's own or, if it gave none, the one by which the replica knows the request.
            message = {**message, "headers": [one for one in message["headers"] if one[0].lower() != _OF_RAY]}
            kind = dict(message["headers"]).get(b"content-type", b"").decode("latin-1").partition(";")[0]
            self._stream = kind if kind in ("text/event-stream", "application/x-ndjson") else ""
        elif message["type"] == "http.response.body":
            self._ended = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Tell the client: by a status, or as the last event of a stream. A body that is cut stays cut, which the end
        of the connection tells: RuntimeError."""
        if self._ended:
            return
        if not self._begun:
            # Responses' __call__ is used for its sending alone.
            await error.response(self._path)({"type": "http"}, _nothing, self._send)
        elif self._stream:
            last = failure_event(self._path, error)
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            raise RuntimeError(f"the answer is cut: {error}")


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def failure_event(path: str, error: ApiError) -> bytes:
    """The last event of a stream of the API at ``path``."""

    def event(name: str, body: dict[str, Any]) -> bytes:
        head = f"event: {name}\n" if name else ""
        return f"{head}data: {json.dumps(body)}\n\n".encode()

    if path.startswith("/v1/messages"):
        return event("error", anthropic_body(error.status, error.detail))
    if path.startswith("/api/"):
        return json.dumps(ollama_body(error.detail)).encode() + b"\n"
    if path.startswith("/v1/responses"):
        detail = {"code": error.detail.code, "message": error.detail.message, "param": None}
        return event("error", {"type": "error", "sequence_number": -1, **detail})
    return event("", error.body) + b"data: [DONE]\n\n"


def build(values: dict[str, Any], deployed_by: str = "") -> Any:
    """Serve's application; what a Serve YAML imports, with its ``args``. ValueError or OSError if there is no such
    model, so that what is served already goes on: a replica finds that out when another one has ended for it.

    ``deployed_by`` is the ingress's."""
    from wedlm.model import load_tokenizer  # with torch, which the ingress does without
    from wedlm.model.formats.checkpoint import open_checkpoint

    options = RayOptions.of(values)
    open_checkpoint(options.model)
    load_tokenizer(options.model)
    config, engine = options.config(), options.engine
    room = int(engine.get("max_num_seqs", _default("max_num_seqs"))) + config.max_queue
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.autoscale is not None:
        least, most, target = options.autoscale
        policy = AutoscalingPolicy(policy_function=f"{__name__}:ScalingPolicy", policy_kwargs={"target": target})
        scaling = AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=target,
            look_back_period_s=LOOK_BACK_S,
            upscale_delay_s=0.0,
            downscale_delay_s=DOWN_AFTER_S,
            policy=policy,
        )
        scale = {"autoscaling_config": scaling}
    router = RequestRouterConfig(
        request_router_class=ConversationRouter,  # type: ignore[arg-type] # pydantic's plug-in would know
        request_router_kwargs={"routing": options.routing, "spill": options.spill},
    )
    replica: Any = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=room + 8,  # one that is full says so itself
        ray_actor_options=options.share.needs,
        request_router_config=router,
        graceful_shutdown_timeout_s=options.patience_s,
        health_check_period_s=_HEALTH_S,
        max_surge_percent=int(options.surge),  # rounded up to a replica
        **scale,
    )
    # Serve replaces this one, too, at each change, by default before there is another, and ends it after 20 s.
    ingress: Any = serve.deployment(
        Ingress,
        name="Ingress",
        max_ongoing_requests=_MOST_OPEN,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.patience_s,
        max_surge_percent=100,
    )
    return ingress.bind(replica.bind(options.plain()), options.plain(), deployed_by)


def _default(name: str) -> Any:
    from wedlm.engine.options import EngineOptions

    return next(one.default for one in fields(EngineOptions) if one.name == name)
