# SPDX-License-Identifier: Apache-2.0
"""The server's options; the engine's options are ``EngineOptions``."""

import os
import re
from dataclasses import dataclass, field

TOOL_PARSERS = ("auto", "hermes", "llama3", "mistral", "pythonic")
REASONING_PARSERS = ("auto", "think", "none")
KEY_VARIABLE = "WEDLM_API_KEY"  # of the environment: a key that stands in no command line


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The server's options, checked on construction (ValueError). A request for n choices of p prompts counts as n · p
    sequences.

    * ``tool_parser``: the form in which the model writes calls, one of ``TOOL_PARSERS``; auto goes by its chat
      template.
    * ``reasoning_parser``: whether text between <think> tags is split off; auto goes by the template, too.
    * ``host``, ``port``: the address to listen on. ``uds``: the path of a socket to listen on instead.
    * ``root_path``: where a proxy serves this server, such as /llm; requests may include it or not.
    * ``ssl_certfile``, ``ssl_keyfile``: for TLS; the first may also contain the key.
    * ``otlp_traces_endpoint``: a URL that takes traces.
    * ``api_keys``: if there are any, each request to /v1, /api and /metrics must come with one of them.
    * ``cors_origins``: origins whose pages may call, or "*".
    * ``allowed_hosts``: names, besides addresses and localhost, by which clients may call a server without a key, or
      "*".
    * ``adapter_folder``: the folder below which clients with a key may load adapters at run time; None allows none.
    * ``max_connections``: open connections at once. ``max_body_bytes``: the largest body of a request.
    * ``max_queue``: sequences that may wait besides those that run. ``max_choices``: sequences of one request.
    * ``header_timeout_s``: for a request's head to arrive, counted from the connection's start or the head's first
      byte.
    * ``body_timeout_s``: for the body to arrive. ``request_timeout_s``: from the body's arrival to the answer's last
      byte.
    * ``shutdown_timeout_s``: how long running requests have to finish.
    """

    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    otlp_traces_endpoint: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    adapter_folder: str | None = None
    max_connections: int = 1024
    max_queue: int = 256
    max_choices: int = 64
    max_body_bytes: int = 2**20
    request_timeout_s: float = 600.0
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    shutdown_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, known in (("tool_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        self._check_address()
        for name, low in (("max_queue", 0), ("max_choices", 1), ("max_body_bytes", 1), ("max_connections", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {low}")
        for name in ("request_timeout_s", "body_timeout_s", "header_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0 seconds")
        if not self.shutdown_timeout_s >= 0:
            raise ValueError(f"shutdown_timeout_s is {self.shutdown_timeout_s}; expected at least 0 seconds")
        if self.adapter_folder is not None and not os.path.isdir(self.adapter_folder):
            raise ValueError(f"adapter_folder is {self.adapter_folder!r}; expected a directory")
        if any(not key or not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ValueError("an API key is empty or not printable ASCII; expected printable ASCII characters")

    def _check_address(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; expected 0 to 65535")
        root = self.root_path
        if root and not re.fullmatch(r"(/[\w.~-]+)+", root, re.ASCII):
            raise ValueError(f"root_path is {root!r}; expected a path such as /llm, without a slash at its end")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError(f"ssl_keyfile is {self.ssl_keyfile!r} without ssl_certfile; expected both")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(
                f"otlp_traces_endpoint is {endpoint!r}; expected a URL that begins with http:// or https://"
            )
