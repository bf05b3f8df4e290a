# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve``: turns options into a running server."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wedlm.cli.loading import load_llms
from wedlm.cli.options import MODEL, EngineOptions, Only, Threads, command, option
from wedlm.cli.replicas import Replica, supervise
from wedlm.cli.terminal import needs_extra, note
from wedlm.server.config import KEY_VARIABLE, REASONING_PARSERS, TOOL_PARSERS, ServerConfig

if TYPE_CHECKING:
    from socket import socket

    from wedlm import LLM

HTTP, LIMITS, FORMS = "Address and access", "Limits", "What models write"
_MOST_REPLICAS = 64
_SERVER: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ServerConfig)}


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Where the server listens, who may call, and how answers are read."""

    host: Annotated[str, option("Address to listen on; 0.0.0.0 for all.", HTTP)] = _SERVER["host"]
    port: Annotated[int, option("Port to listen on; 0 takes a free one.", HTTP)] = _SERVER["port"]
    uds: Annotated[str | None, option("Unix socket to listen on, instead of host and port.", HTTP)] = _SERVER["uds"]
    root_path: Annotated[str, option("Path under which a proxy has the server, such as /llm.", HTTP)] = _SERVER[
        "root_path"
    ]
    ssl_certfile: Annotated[str | None, option("Certificate, in PEM: speak TLS.", HTTP)] = _SERVER["ssl_certfile"]
    ssl_keyfile: Annotated[str | None, option("Its key, unless the certificate's file has it.", HTTP)] = _SERVER[
        "ssl_keyfile"
    ]
    api_key: Annotated[
        list[str] | None,
        option("Require this key; may be repeated. Better set the variable WEDLM_API_KEY.", HTTP),
    ] = None
    cors_origin: Annotated[list[str] | None, option("Let pages of this origin call; may be repeated.", HTTP)] = None
    allowed_host: Annotated[
        list[str] | None,
        option("A name by which clients may call a server without a key, besides localhost; may be repeated.", HTTP),
    ] = None
    tool_parser: Annotated[str, option(f"How the model writes calls: {', '.join(TOOL_PARSERS)}.", FORMS)] = _SERVER[
        "tool_parser"
    ]
    reasoning_parser: Annotated[
        str, option(f"Whether reasoning between <think> tags is split off: {', '.join(REASONING_PARSERS)}.", FORMS)
    ] = _SERVER["reasoning_parser"]
    otlp_traces_endpoint: Annotated[
        str | None, option("Send traces there, such as http://127.0.0.1:4318/v1/traces (extra: traces).", HTTP)
    ] = _SERVER["otlp_traces_endpoint"]
    log_level: Annotated[str, option("debug, info, warning or error.", HTTP)] = "info"


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What clients may ask of the server."""

    max_queue: Annotated[int, option("Sequences that may wait; more are refused with 429.", LIMITS)] = _SERVER[
        "max_queue"
    ]
    max_choices: Annotated[int, option("Most sequences of one request.", LIMITS)] = _SERVER["max_choices"]
    adapter_folder: Annotated[
        str | None, option("Let clients with the API key load adapters from below this folder.", LIMITS)
    ] = _SERVER["adapter_folder"]
    max_body_bytes: Annotated[int, option("Largest body of a request.", LIMITS)] = _SERVER["max_body_bytes"]
    max_connections: Annotated[int, option("Most connections; more are refused with 503.", LIMITS)] = _SERVER[
        "max_connections"
    ]
    header_timeout: Annotated[float, option("Seconds for a request's head to arrive.", LIMITS)] = _SERVER[
        "header_timeout_s"
    ]
    request_timeout: Annotated[float, option("Seconds for a whole answer.", LIMITS)] = _SERVER["request_timeout_s"]
    body_timeout: Annotated[float, option("Seconds for a body to arrive.", LIMITS)] = _SERVER["body_timeout_s"]
    shutdown_timeout: Annotated[float, option("Seconds for running answers after Ctrl-C or SIGTERM.", LIMITS)] = (
        _SERVER["shutdown_timeout_s"]
    )


@dataclass(frozen=True, kw_only=True)
class ServedOptions:
    """Which models and adapters, and how much of the machine."""

    model: Annotated[
        list[str] | None,
        option(
            "Checkpoint directory, .gguf file, hub id, 'demo' or 'demo-base'; NAME=MODEL says what clients call it. "
            "May be repeated: the models share the memory and take turns. [demo]",
            MODEL,
        ),
    ] = None
    model_name: Annotated[
        str | None, option("What clients call the only model; default: the model's last part.", MODEL)
    ] = None
    adapter: Annotated[
        list[str] | None,
        option(
            "NAME=DIR: an adapter that requests choose by its name; may be repeated. DIR alone, or 'demo-masked': one "
            "for all requests, merged into the weights unless it is for masked rows.",
            MODEL,
        ),
    ] = None
    threads: Threads = None
    data_parallel_size: Annotated[
        int, option("Servers on this address, each with the models on its own devices or threads.", MODEL)
    ] = 1


replica: Replica | None = None  # which one of several this process is


_ENGINE = tuple(field.name for field in dataclasses.fields(EngineOptions) if field.name != "adapter")


@command
def serve(
    *, http: HttpOptions, limits: LimitOptions, model: ServedOptions, engine: Annotated[EngineOptions, Only(*_ENGINE)]
) -> None:
    """Serve one model, or several, to any OpenAI client.

    \b
    Examples:
    wedlm serve
    wedlm serve --model ./my-checkpoint --host 0.0.0.0 --port 8080 --max-queue 64
    wedlm serve --model small=demo --model large=./my-checkpoint
    wedlm serve --model ./my-checkpoint --adapter sql=./my-lora --adapter legal=./another
    wedlm serve --model ./my-checkpoint --tensor-parallel-size 2 --data-parallel-size 4
    WEDLM_API_KEY=secret wedlm serve

    Ctrl-C lets running answers finish; a second Ctrl-C stops at once. docs/server.md has the rest.
    """
    # All that can be wrong with these, before a model is fetched for nothing.
    for_all, by_name = served_adapters(model.adapter or [])
    engine = dataclasses.replace(engine, adapter=for_all)
    models = served_models(model, engine)
    check_adapters(by_name, models)
    count = model.data_parallel_size
    if not 1 <= count <= _MOST_REPLICAS:
        raise ValueError(f"data_parallel_size is {count}; expected 1 to {_MOST_REPLICAS}")
    config = server_config(http, limits, os.environ.get(KEY_VARIABLE))
    if http.log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"log_level is {http.log_level!r}; expected debug, info, warning or error")
    with needs_extra("serve"):
        from wedlm.server.run import AddressError, listening, tls_context
    tls_context(config)
    if config.otlp_traces_endpoint is not None:
        with needs_extra("traces"):
            import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    if replica is not None:
        threads, options = replica.threads(model.threads), replica.engine(engine)
        run(_loaded(models, by_name, threads, options), config, http.log_level, replica.sockets)
        return
    try:
        with listening(config) as sockets:
            if count > 1:
                raise typer.Exit(supervise(sockets, count, sys.argv[1:]))
            run(_loaded(models, by_name, model.threads, engine), config, http.log_level, sockets)
    except AddressError as error:
        note(f"error: {error}", "red")
        raise typer.Exit(1) from None


def _loaded(
    models: dict[str, str], adapters: dict[str, str], threads: int | None, engine: EngineOptions
) -> dict[str, "LLM"]:
    """The models; a single model also has its adapters by name."""
    llms = load_llms(models, threads, engine)
    for name, directory in adapters.items():
        next(iter(llms.values())).load_adapter(name, directory)
    return llms


def served_models(model: ServedOptions, engine: EngineOptions) -> dict[str, str]:
    """The checkpoints by the names that clients use. Raises ValueError."""
    models: dict[str, str] = {}
    for word in model.model or ["demo"]:
        name, separator, path = word.partition("=")
        if not separator or os.path.exists(word):
            name, path = word.rstrip("/").rpartition("/")[2], word
            if model.model_name is not None:
                name = model.model_name
        elif model.model_name is not None:
            raise ValueError(f"model_name is {model.model_name!r} with --model {word}; expected one name")
        if not name or not path:
            raise ValueError(f"model is {word!r}; expected a checkpoint, or NAME=CHECKPOINT")
        if name in models:
            raise ValueError(f"two models are called {name!r}; expected different names: --model NAME=CHECKPOINT")
        models[name] = path
    for option_name in ("adapter", "mask_token_id"):
        if len(models) > 1 and (value := getattr(engine, option_name)) is not None:
            raise ValueError(f"{option_name} is {value!r} with {len(models)} models; expected a single model")
    return models


def served_adapters(words: list[str]) -> tuple[str | None, dict[str, str]]:
    """(the adapter of all requests, the others by name). Raises ValueError."""
    for_all: str | None = None
    by_name: dict[str, str] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if separator and not os.path.exists(word):
            if not name or not path:
                raise ValueError(f"adapter is {word!r}; expected DIR, or NAME=DIR")
            if name in by_name:
                raise ValueError(f"two adapters are called {name!r}; expected different names")
            by_name[name] = path
        elif for_all is not None:
            raise ValueError(f"adapter is {for_all!r} and {word!r}, both without a name; expected NAME=DIR for one")
        else:
            for_all = word
    return for_all, by_name


def check_adapters(by_name: Mapping[str, str], models: Mapping[str, str]) -> None:
    """Raises ValueError for adapters that do not fit the models' number or names."""
    if by_name and len(models) > 1:
        raise ValueError(f"adapters by name are given with {len(models)} models; expected one model with them")
    for name in by_name:
        if name in models:
            raise ValueError(f"a model and an adapter are called {name!r}; expected different names")


def server_config(http: HttpOptions, limits: LimitOptions, key_variable: str | None) -> ServerConfig:
    """The server's options. Raises ValueError."""
    keys = [*(http.api_key or []), *([key_variable] if key_variable else [])]
    return ServerConfig(
        tool_parser=http.tool_parser,
        reasoning_parser=http.reasoning_parser,
        host=http.host,
        port=http.port,
        uds=http.uds,
        root_path=http.root_path,
        ssl_certfile=http.ssl_certfile,
        ssl_keyfile=http.ssl_keyfile,
        otlp_traces_endpoint=http.otlp_traces_endpoint,
        api_keys=tuple(keys),
        cors_origins=tuple(http.cors_origin or ()),
        allowed_hosts=tuple(http.allowed_host or ()),
        adapter_folder=limits.adapter_folder,
        max_connections=limits.max_connections,
        header_timeout_s=limits.header_timeout,
        max_queue=limits.max_queue,
        max_choices=limits.max_choices,
        max_body_bytes=limits.max_body_bytes,
        request_timeout_s=limits.request_timeout,
        body_timeout_s=limits.body_timeout,
        shutdown_timeout_s=limits.shutdown_timeout,
    )


def run(models: "Mapping[str, LLM]", config: ServerConfig, log_level: str, sockets: "list[socket]") -> None:
    """Serve until told to stop; exit code 1 if the engine is beyond repair."""
    with needs_extra("serve"):
        from wedlm.server.app import create_app
        from wedlm.server.logs import set_up_logging
        from wedlm.server.run import Server

    set_up_logging(log_level)
    app = create_app(models, config)
    server = Server(app, lambda url: note(f"serving {', '.join(models)} at {url}; Ctrl-C ends it"))
    server.run(sockets)
    if server.failed:
        raise typer.Exit(1)
