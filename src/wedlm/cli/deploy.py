# SPDX-License-Identifier: Apache-2.0
"""``wedlm deploy``: the server, several times, on somebody else's machinery."""

import dataclasses
import os
import signal
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from wedlm.cli.options import EngineOptions, Only, changed, command, option
from wedlm.cli.serve import HttpOptions, LimitOptions, ServedOptions, served_adapters, served_models, server_config
from wedlm.cli.terminal import needs_extra, note, out, status
from wedlm.cluster import Share, join_ray, share_of
from wedlm.server.config import KEY_VARIABLE, ServerConfig

WHERE = "Replicas"
_APP = "wedlm"  # its name in Serve
_ASKED_S = 10.0  # an ingress answers at once; one that does not is not there


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """How many copies there are, and which of them a request goes to."""

    platform: Annotated[str, typer.Argument(help="ray: Ray Serve.")]
    replicas: Annotated[int, option("Copies of the model, each on devices, or threads, of its own.", WHERE)] = 1
    autoscale: Annotated[
        str | None,
        option("MIN,MAX,TARGET: as many copies as leave each TARGET open requests, in place of --replicas.", WHERE),
    ] = None
    routing: Annotated[
        str, option("prefix: a conversation stays where its keys are cached; round_robin: each in its turn.", WHERE)
    ] = "prefix"
    surge: Annotated[
        bool | None,
        option(
            "When another model takes the place of this one: start a replica before an old one ends, which takes a "
            "device more; by default if Ray has one to spare.",
            WHERE,
        ),
    ] = None
    yaml: Annotated[bool, option("Print Serve's YAML for a cluster (serve deploy FILE), and start nothing.", WHERE)] = (
        False
    )


_ENGINE = tuple(one.name for one in dataclasses.fields(EngineOptions))
_HTTP = ("host", "port", "api_key", "cors_origin", "allowed_host", "tool_parser", "reasoning_parser")
_LIMITS = ("max_queue", "max_choices", "max_body_bytes", "request_timeout", "body_timeout", "shutdown_timeout")


@command
def deploy(
    *,
    where: ReplicaOptions,
    http: Annotated[HttpOptions, Only(*_HTTP)],
    limits: Annotated[LimitOptions, Only(*_LIMITS)],
    model: Annotated[ServedOptions, Only("model", "model_name", "adapter", "threads")],
    engine: Annotated[EngineOptions, Only(*(name for name in _ENGINE if name != "adapter"))],
) -> None:
    """Serve copies of a model behind one address, on Ray Serve.

    \b
    Examples:
    wedlm deploy ray --replicas 2 --threads 1
    wedlm deploy ray --model ./my-checkpoint --replicas 4 --tensor-parallel-size 2
    wedlm deploy ray --model ./my-checkpoint --autoscale 1,8,32
    wedlm deploy ray --model /models/mine --replicas 8 --yaml > wedlm.yaml && serve deploy wedlm.yaml

    It joins the cluster that RAY_ADDRESS names, or starts Ray on this machine. Ctrl-C ends it. docs/scale.md has the
    rest.
    """
    if where.platform != "ray":
        raise ValueError(f"the platform is {where.platform!r}; expected ray")
    for_all, by_name = served_adapters(model.adapter or [])
    engine = dataclasses.replace(engine, adapter=for_all)
    models = served_models(model, engine)
    if len(models) > 1:
        raise ValueError(f"{len(models)} models are given; expected one: deploy the others beside it")
    ((name, path),) = models.items()
    config = server_config(http, limits, None)
    server = {
        one.name: value for one in dataclasses.fields(config) if (value := getattr(config, one.name)) != one.default
    }
    values: dict[str, Any] = {
        "model": path,
        "name": name,
        "adapters": by_name,
        "engine": {one: value for one, value in changed(engine).items() if one != "device"},
        "server": {one: value for one, value in server.items() if one not in ("port", "api_keys")},
        "replicas": where.replicas,
        "autoscale": read_autoscale(where.autoscale),
        "routing": where.routing,
        "surge": bool(where.surge),
    }
    with needs_extra("ray"), status("Loading Ray ..."):
        from wedlm.deploy.ray_serve import RayOptions
    if where.yaml:
        gpus = engine.tensor_parallel_size if engine.device != "cpu" else 0
        share = Share(num_gpus=gpus, num_cpus=0 if gpus else model.threads or 1)
        out.file.write(serve_yaml(RayOptions(**values, share=share), config.host, config.port))
        return
    keys = [*config.api_keys, *filter(None, [os.environ.get(KEY_VARIABLE)])]
    options = RayOptions(**{**values, "server": {**values["server"], "api_keys": keys}})  # before Ray is started
    _run(options, where.surge, engine, model.threads, config)


def read_autoscale(text: str | None) -> tuple[int, int, float] | None:
    """MIN,MAX,TARGET. ValueError."""
    if text is None:
        return None
    try:
        least, most, target = text.split(",")
        return int(least), int(most), float(target)
    except ValueError:
        raise ValueError(f"autoscale is {text!r}; expected MIN,MAX,TARGET, such as 1,8,32") from None


def serve_yaml(options: Any, host: str, port: int) -> str:
    """What ``serve deploy`` takes. API keys stand in no file: the replicas read WEDLM_API_KEY."""
    import yaml

    app = {"name": _APP, "route_prefix": "/", "import_path": "wedlm.deploy.ray_serve:build", "args": options.plain()}
    http = {"host": host, "port": port}
    return yaml.safe_dump({"proxy_location": "EveryNode", "http_options": http, "applications": [app]}, sort_keys=False)


def _run(options: Any, surge: bool | None, engine: EngineOptions, threads: int | None, config: ServerConfig) -> None:
    """Until Ctrl-C or SIGTERM. What was served before goes on if this fails, and this ends nothing that was deployed
    after it."""
    import ray
    from ray import serve

    from wedlm.deploy.ray_serve import build

    # Serve ends its own proxy if that has not loaded three times as long, 5 s by default: not enough on a busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    stopping = threading.Event()
    joins = not ray.is_initialized()
    name, owns = uuid.uuid4().hex, False
    try:
        with status("Starting Ray ..."):
            join_ray()
            share = share_of(engine.device, threads, "deploy", engine.tensor_parallel_size)
            share.check(options.replicas if options.autoscale is None else options.autoscale[0], "--replicas")
            serve.start(http_options={"host": config.host, "port": config.port})
        surge = share.has_room() if surge is None else surge
        app = build(dataclasses.replace(options, share=share, surge=surge).plain(), name)
        owns = _APP not in serve.status().applications  # else what is there goes on if this fails
        with status(f"Loading {options.name} ..."):
            try:
                serve.run(app, name=_APP, route_prefix="/")
            except RuntimeError as error:
                raise ValueError(f"{options.model} cannot be served: {_why(error)}") from error
        owns = True
        number = f"{options.replicas}" if options.autoscale is None else "{} to {}".format(*options.autoscale)
        where = f"http://{config.host}:{config.port}"
        note(f"serving {options.name} at {where} by {number} replicas of {share}; Ctrl-C ends it")
        former = {one: signal.signal(one, lambda *_: stopping.set()) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            stopping.wait()
        finally:
            for one, handler in former.items():
                signal.signal(one, handler)
    finally:
        if ray.is_initialized():
            if owns:
                _stop(name, config.shutdown_timeout_s)
            if joins:
                if not serve.status().applications:
                    serve.shutdown()
                ray.shutdown()  # and Ray itself, if this command started it


def _deployed_by() -> str | None:
    """Which command deployed what is served; None if no ingress says so."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_app_handle(_APP).deployed_by.remote().result(timeout_s=_ASKED_S)
    except (RayError, RayServeException, TimeoutError):
        return None


def _why(error: RuntimeError) -> str:
    """What a replica said last, of which Serve's own error has nothing."""
    from ray import serve

    app = serve.status().applications.get(_APP)
    said = [] if app is None else [one.message.strip() for one in app.deployments.values() if one.message.strip()]
    return next((one.splitlines()[-1] for one in said), str(error))


def _stop(name: str, patience_s: float) -> None:
    """End what the command of that name deployed. Requests have ``patience_s`` to end; on a cluster that goes on they
    have as long as they need, without this command."""
    from ray import serve

    if _deployed_by() not in (name, None):  # an application that never ran has no ingress to ask
        note("another command has deployed something else in its place, which goes on")
        return
    serve.delete(_APP, _blocking=False)
    end = time.monotonic() + patience_s
    while _APP in serve.status().applications and time.monotonic() < end:
        time.sleep(0.1)
