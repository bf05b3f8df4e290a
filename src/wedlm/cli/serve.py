# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve``: options to a running server."""

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wedlm.cli.loading import load_llm
from wedlm.cli.options import EngineOptions, ModelOptions, command, option
from wedlm.cli.terminal import needs_extra, note
from wedlm.server.config import REASONING_PARSERS, TOOL_PARSERS, ServerConfig

if TYPE_CHECKING:
    from socket import socket

    from wedlm import LLM

HTTP, LIMITS, FORMS = "Address and access", "Limits", "What models write"
_KEY_VARIABLE = "WEDLM_API_KEY"
_SERVER: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(ServerConfig)}


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Where the server listens, who may call, and how answers are read."""

    host: Annotated[str, option("Address to listen on; 0.0.0.0 for all.", HTTP)] = _SERVER["host"]
    port: Annotated[int, option("Port to listen on; 0 takes a free one.", HTTP)] = _SERVER["port"]
    model_name: Annotated[str | None, option("What clients call the model; default: the model's last part.", HTTP)] = (
        None
    )
    api_key: Annotated[
        list[str] | None,
        option("Require this key, or another one given so; better in the variable WEDLM_API_KEY.", HTTP),
    ] = None
    cors_origin: Annotated[list[str] | None, option("Let pages of this origin call; may be repeated.", HTTP)] = None
    allowed_host: Annotated[
        list[str] | None,
        option("A name by which clients may call a server without a key, beside localhost; may be repeated.", HTTP),
    ] = None
    tool_parser: Annotated[str, option(f"How the model writes calls: {', '.join(TOOL_PARSERS)}.", FORMS)] = _SERVER[
        "tool_parser"
    ]
    reasoning_parser: Annotated[
        str, option(f"Whether reasoning between <think> tags is split off: {', '.join(REASONING_PARSERS)}.", FORMS)
    ] = _SERVER["reasoning_parser"]
    log_level: Annotated[str, option("debug, info, warning or error.", HTTP)] = "info"


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What clients may ask of the server."""

    max_queue: Annotated[int, option("Sequences that may wait; more are refused with 429.", LIMITS)] = _SERVER[
        "max_queue"
    ]
    max_choices: Annotated[int, option("Most sequences of one request.", LIMITS)] = _SERVER["max_choices"]
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


@command
def serve(*, http: HttpOptions, limits: LimitOptions, model: ModelOptions, engine: EngineOptions) -> None:
    """Serve a model to any OpenAI client.

    \b
    Examples:
    wedlm serve
    wedlm serve --model ./my-checkpoint --host 0.0.0.0 --port 8080 --max-queue 64
    WEDLM_API_KEY=secret wedlm serve

    Ctrl-C lets running answers finish; a second one does not. docs/server.md has the rest.
    """
    # All that can be wrong with these, before a model is fetched for nothing.
    config = server_config(http, limits, model.model, os.environ.get(_KEY_VARIABLE))
    if http.log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"log_level is {http.log_level!r}; expected debug, info, warning or error")
    with needs_extra("serve"):
        from wedlm.server.run import AddressError, bound_sockets
    try:
        with bound_sockets(config.host, config.port) as sockets:
            run(load_llm(model, engine), config, http.log_level, sockets)
    except AddressError as error:
        note(f"error: {error}", "red")
        raise typer.Exit(1) from None


def server_config(http: HttpOptions, limits: LimitOptions, model: str, key_variable: str | None) -> ServerConfig:
    """The server's options. Raises ValueError."""
    keys = [*(http.api_key or []), *([key_variable] if key_variable else [])]
    return ServerConfig(
        model_name=model.rstrip("/").rpartition("/")[2] if http.model_name is None else http.model_name,
        tool_parser=http.tool_parser,
        reasoning_parser=http.reasoning_parser,
        host=http.host,
        port=http.port,
        api_keys=tuple(keys),
        cors_origins=tuple(http.cors_origin or ()),
        allowed_hosts=tuple(http.allowed_host or ()),
        max_connections=limits.max_connections,
        header_timeout_s=limits.header_timeout,
        max_queue=limits.max_queue,
        max_choices=limits.max_choices,
        max_body_bytes=limits.max_body_bytes,
        request_timeout_s=limits.request_timeout,
        body_timeout_s=limits.body_timeout,
        shutdown_timeout_s=limits.shutdown_timeout,
    )


def run(llm: "LLM", config: ServerConfig, log_level: str, sockets: "list[socket]") -> None:
    """Serve until told to stop; exit code 1 if the engine is beyond repair."""
    with needs_extra("serve"):
        from wedlm.server.app import create_app
        from wedlm.server.logs import set_up_logging
        from wedlm.server.run import Server

    set_up_logging(log_level)
    app = create_app(llm, config)
    server = Server(app, lambda url: note(f"serving {config.model_name} at {url}; Ctrl-C ends it"))
    server.run(sockets)
    if server.failed:
        raise typer.Exit(1)
