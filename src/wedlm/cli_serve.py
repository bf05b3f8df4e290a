# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve``: options to a running server."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wedlm.cli_terminal import note, option, plain_errors, status

if TYPE_CHECKING:
    from wedlm import LLM
    from wedlm.server.config import ServerConfig

HTTP, LIMITS, ENGINE = "Address and access", "Limits", "Model and machine"
_KEY_VARIABLE = "WEDLM_API_KEY"
_LLM_OPTIONS = (
    "adapter",
    "dtype",
    "quantization",
    "device",
    "max_model_len",
    "decoding",
    "max_num_seqs",
    "kv_cache_bytes",
    "capture_chunks",
    "chunk_step_ratio",
)


def serve(
    ctx: typer.Context,
    host: Annotated[str, option("Address to listen on; 0.0.0.0 for all.", HTTP)] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on; 0 takes a free one.", HTTP)] = 8000,
    model_name: Annotated[str | None, option("What clients call the model; default: the model's last part.", HTTP)] = (
        None
    ),
    api_key: Annotated[
        list[str] | None,
        option("Require this key, or another one given so; better in the variable WEDLM_API_KEY.", HTTP),
    ] = None,
    cors_origin: Annotated[list[str] | None, option("Let pages of this origin call; may be repeated.", HTTP)] = None,
    log_level: Annotated[str, option("debug, info, warning or error.", HTTP)] = "info",
    max_queue: Annotated[int, option("Sequences that may wait; more are refused with 429.", LIMITS)] = 256,
    max_choices: Annotated[int, option("Most sequences of one request.", LIMITS)] = 64,
    max_body_bytes: Annotated[int, option("Largest body of a request.", LIMITS)] = 2**20,
    request_timeout: Annotated[float, option("Seconds for a whole answer.", LIMITS)] = 600.0,
    body_timeout: Annotated[float, option("Seconds for a body to arrive.", LIMITS)] = 30.0,
    shutdown_timeout: Annotated[float, option("Seconds for running answers after Ctrl-C or SIGTERM.", LIMITS)] = 30.0,
    model: Annotated[str, option("Checkpoint directory, .gguf file, hub id, or 'demo'.", ENGINE)] = "demo",
    adapter: Annotated[
        str | None, option("Directory of a LoRA, merged in; one of masked rows stays beside.", ENGINE)
    ] = None,
    decoding: Annotated[str, option("Mode of requests that name none.", ENGINE)] = "auto",
    window_size: Annotated[int, option("Window of requests that name none.", ENGINE)] = 16,
    dtype: Annotated[str, option("auto, float32, bfloat16 or float16.", ENGINE)] = "auto",
    quantization: Annotated[
        str | None, option("int8 or fp8: the layers' weights in eight bits, for GPUs.", ENGINE)
    ] = None,
    device: Annotated[str, option("auto, cpu, cuda, cuda:1, ...", ENGINE)] = "auto",
    max_model_len: Annotated[int | None, option("Longest prompt and answer together, in tokens.", ENGINE)] = None,
    max_num_seqs: Annotated[int, option("Most sequences in one forward.", ENGINE)] = 64,
    kv_cache_bytes: Annotated[int | None, option("Memory for keys and values.", ENGINE)] = None,
    capture_chunks: Annotated[
        bool, option("Steps with prompt chunks as CUDA graphs, too.", ENGINE, "--capture-chunks/--no-capture-chunks")
    ] = True,
    chunk_step_ratio: Annotated[
        float | None,
        option(
            "A step with prompt chunks takes about so many times one without, at most. [captured 1.8; else inf]", ENGINE
        ),
    ] = None,
    threads: Annotated[int | None, option("CPU threads; default: torch's choice.", ENGINE)] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", ENGINE, "--debug")] = False,
) -> None:
    """Serve a model to any OpenAI client.

    \b
    Examples:
    wedlm serve
    wedlm serve --model ./my-checkpoint --host 0.0.0.0 --port 8080 --max-queue 64
    WEDLM_API_KEY=secret wedlm serve

    Ctrl-C lets running answers finish; a second one does not. docs/server.md has the rest.
    """
    with plain_errors(debug):
        config = server_config(ctx.params, os.environ.get(_KEY_VARIABLE))  # before a model is fetched for nothing
        if log_level not in ("debug", "info", "warning", "error"):
            raise ValueError(f"log_level is {log_level!r}; expected debug, info, warning or error")
        run(_load(ctx.params), config, log_level)


def server_config(options: dict[str, Any], key_variable: str | None) -> "ServerConfig":
    """The server's options among those of the command. Raises ValueError."""
    try:
        from wedlm.server.config import ServerConfig
    except ModuleNotFoundError as error:  # pragma: no cover - the tests have the extra
        raise ValueError(f"{error.name} is not installed; expected pip install 'wedlm[serve]'") from error

    model = options["model"]
    keys = [*(options["api_key"] or []), *([key_variable] if key_variable else [])]
    return ServerConfig(
        model_name=model.rstrip("/").rpartition("/")[2] if options["model_name"] is None else options["model_name"],
        host=options["host"],
        port=options["port"],
        api_keys=tuple(keys),
        cors_origins=tuple(options["cors_origin"] or ()),
        max_queue=options["max_queue"],
        max_choices=options["max_choices"],
        max_body_bytes=options["max_body_bytes"],
        request_timeout_s=options["request_timeout"],
        body_timeout_s=options["body_timeout"],
        shutdown_timeout_s=options["shutdown_timeout"],
    )


def _load(options: dict[str, Any]) -> "LLM":
    """The model, with a status line while it loads. Raises ValueError."""
    threads = options["threads"]
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    import torch

    from wedlm import LLM
    from wedlm.model.formats.resolve import locate

    locate(options["model"])  # outside the status line: a download shows its own progress
    if threads is not None:
        torch.set_num_threads(threads)
    with status(f"Loading {options['model']} ..."):
        return LLM(
            options["model"], wedlm_window_size=options["window_size"], **{name: options[name] for name in _LLM_OPTIONS}
        )


def run(llm: "LLM", config: "ServerConfig", log_level: str) -> None:
    """Serve until told to stop; exit code 1 if the engine is beyond repair, or the address is taken."""
    try:
        from wedlm.server.app import create_app
        from wedlm.server.logs import set_up_logging
        from wedlm.server.run import Server
    except ModuleNotFoundError as error:  # pragma: no cover - the tests have the extra
        raise ValueError(f"{error.name} is not installed; expected pip install 'wedlm[serve]'") from error

    set_up_logging(log_level)
    server = Server(create_app(llm, config))
    where = f"http://{config.host}:{config.port}" if config.port else f"http://{config.host} (a free port, see below)"
    note(f"serving {config.model_name} at {where}; Ctrl-C ends it")
    server.run()
    if server.failed:
        raise typer.Exit(1)
