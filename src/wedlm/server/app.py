# SPDX-License-Identifier: Apache-2.0
"""The server's routes."""

import mimetypes
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from starlette.responses import FileResponse, JSONResponse, Response

from wedlm import __version__
from wedlm.engine.llm import LLM
from wedlm.server import errors
from wedlm.server.config import ServerConfig
from wedlm.server.converters.anthropic import CountRequest, MessagesRequest
from wedlm.server.converters.ollama import OllamaChatRequest, OllamaGenerateRequest, now
from wedlm.server.converters.responses import ResponsesRequest
from wedlm.server.converters.tokens import DetokenizeRequest, TokenizeRequest
from wedlm.server.limits import ApiKeys, BodyLimit, KnownHosts, RootPath
from wedlm.server.logs import RequestLog
from wedlm.server.protocol import ChatRequest, CompletionRequest, LoadAdapterRequest, UnloadAdapterRequest
from wedlm.server.service import WARNING, Service
from wedlm.server.traces import Tracing, tracer_of

DEMO = Path(__file__).parent / "demo"
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": errors.ErrorBody, "description": text}
    for status, text in {
        400: "A field is wrong, unknown or not supported",
        401: "No valid API key",
        403: "Called by an unknown name, or from a page of another origin",
        404: "No such model",
        408: "The body came too slowly",
        413: "The body is too large",
        429: "The queue is full",
        500: "The engine failed",
        503: "The engine restarts, or the server shuts down",
        504: "The answer took too long",
    }.items()
}
_GENERATES: dict[str, Any] = {"response_model": None, "responses": {**_REFUSALS, 422: {"description": "Never sent"}}}
_OWN: Any = Body(default=...)  # for the OpenAPI document; the service reads it
# The demo page has its own files and nothing else, and may talk to any server that the reader names. One library alone
# makes HTML of a text: the one that cleans it.
_PAGE_POLICY = (
    "default-src 'self'; connect-src *; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)


class RawBody(APIRoute):
    """A route whose endpoint takes only the request and reads the body itself. The body in the endpoint's signature is
    for the OpenAPI document: ``endpoint(request, body=None)``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def create_app(models: Mapping[str, LLM], config: ServerConfig, demo: Path = DEMO) -> FastAPI:
    """The server for these models, by the names that clients use. From start-up on it owns their engines.
    ``app.state.service`` is its inside."""
    service = Service(models, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        app.openapi()  # made once, and not while somebody waits
        service.start()
        try:
            yield
        finally:
            await service.stop()

    # FastAPI's documentation pages fetch scripts from a third party; /openapi.json is served.
    about: dict[str, Any] = {"title": "wedlm", "version": __version__, "docs_url": None, "redoc_url": None}
    if config.root_path:
        about["servers"] = [{"url": config.root_path}]
    app = FastAPI(lifespan=lifespan, **about)
    app.state.service = service
    errors.install(app)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, timeout_s=config.body_timeout_s)
    app.add_middleware(ApiKeys, keys=config.api_keys)
    if not config.api_keys:
        names = [config.host, *config.allowed_hosts]
        app.add_middleware(KnownHosts, names=names, origins=config.cors_origins)
    if config.cors_origins:
        exposed = ["X-Request-Id", "Retry-After", WARNING]
        allow: dict[str, Any] = {
            "allow_methods": ["GET", "POST", "DELETE"],
            "allow_headers": ["*"],
            "expose_headers": exposed,
        }
        app.add_middleware(CORSMiddleware, allow_origins=list(config.cors_origins), **allow)
    if config.otlp_traces_endpoint is not None:
        app.add_middleware(Tracing, tracer=tracer_of(config.otlp_traces_endpoint))
    app.add_middleware(RequestLog, metrics=service.metrics)
    if config.root_path:
        app.add_middleware(RootPath, root=config.root_path)
    _add_api(app, service)
    _add_operations(app, service)
    _add_heads(app)
    if (demo / "index.html").is_file():
        _add_page(app, demo)
    return app


def _add_heads(app: FastAPI) -> None:
    """Add HEAD wherever there is GET, because load balancers ask this way."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            app.add_api_route(
                route.path, route.endpoint, methods=["HEAD"], include_in_schema=False, response_model=None
            )


def _add_api(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def shown(name: str, parent: str | None) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": created, "owned_by": "wedlm"}
        return about if parent is None else {**about, "parent": parent}

    generating = APIRouter(route_class=RawBody)

    @generating.post("/v1/chat/completions", **_GENERATES)
    async def chat(request: Request, body: ChatRequest = _OWN) -> Response:
        """Answer a conversation."""
        return await service.respond(request, ChatRequest)

    @generating.post("/v1/completions", **_GENERATES)
    async def complete(request: Request, body: CompletionRequest = _OWN) -> Response:
        """Continue a text."""
        return await service.respond(request, CompletionRequest)

    _add_converted(generating, service)
    _add_adapters(generating, service)
    app.include_router(generating)
    _add_ollama(app, service)

    @app.get("/v1/responses/{name}", responses={401: _REFUSALS[401], 404: _REFUSALS[404]}, response_model=None)
    async def stored(name: str) -> Response:
        """A stored answer."""
        return Response(service.responses.get(name).body, media_type="application/json")

    @app.delete("/v1/responses/{name}", responses={401: _REFUSALS[401], 404: _REFUSALS[404]})
    async def forget(name: str) -> dict[str, Any]:
        """Forget an answer."""
        service.responses.delete(name)
        return {"id": name, "object": "response", "deleted": True}

    @app.get("/v1/models", responses={401: _REFUSALS[401]})
    async def models() -> dict[str, Any]:
        """The models and their adapters by name."""
        return {"object": "list", "data": [shown(*one) for one in service.names.items()]}

    @app.get("/v1/models/{name:path}", responses={401: _REFUSALS[401], 404: _REFUSALS[404]})
    async def one_model(name: str) -> dict[str, Any]:
        """The model of that name."""
        found = service.model(name).name
        return shown(found, service.names.get(found))


def _add_adapters(generating: APIRouter, service: Service) -> None:
    """Add vLLM's calls for adapters at run time."""

    @generating.post("/v1/load_lora_adapter", **_GENERATES)
    async def load(request: Request, body: LoadAdapterRequest = _OWN) -> Response:
        """Serve an adapter by name; needs an API key."""
        return await service.load_adapter(request)

    @generating.post("/v1/unload_lora_adapter", **_GENERATES)
    async def unload(request: Request, body: UnloadAdapterRequest = _OWN) -> Response:
        """Stop serving an adapter; needs an API key. Requests that use it finish with it."""
        return await service.unload_adapter(request)


def _add_converted(generating: APIRouter, service: Service) -> None:
    """Add the addresses of other APIs."""

    @generating.post("/v1/responses", **_GENERATES)
    async def respond(request: Request, body: ResponsesRequest = _OWN) -> Response:
        """Answer a conversation in OpenAI's newer API."""
        return await service.respond(request, ResponsesRequest)

    @generating.post("/v1/messages", **_GENERATES)
    async def message(request: Request, body: MessagesRequest = _OWN) -> Response:
        """Answer a conversation in Anthropic's API."""
        return await service.respond(request, MessagesRequest)

    @generating.post("/v1/messages/count_tokens", **_GENERATES)
    async def count(request: Request, body: CountRequest = _OWN) -> Response:
        """Count the tokens of a conversation."""
        return await service.look_up(request, CountRequest, service.count)

    @generating.post("/api/chat", **_GENERATES)
    async def ollama_chat(request: Request, body: OllamaChatRequest = _OWN) -> Response:
        """Answer a conversation in Ollama's API."""
        return await service.respond(request, OllamaChatRequest)

    @generating.post("/api/generate", **_GENERATES)
    async def ollama_generate(request: Request, body: OllamaGenerateRequest = _OWN) -> Response:
        """Answer a prompt in Ollama's API."""
        return await service.respond(request, OllamaGenerateRequest)

    @generating.post("/tokenize", **_GENERATES)
    async def tokenize(request: Request, body: TokenizeRequest = _OWN) -> Response:
        """The token ids of a text or of a conversation."""
        return await service.look_up(
            request, TokenizeRequest, lambda asked: asked.answer(service.model(asked.model).prompts)
        )

    @generating.post("/detokenize", **_GENERATES)
    async def detokenize(request: Request, body: DetokenizeRequest = _OWN) -> Response:
        """The text of token ids."""
        return await service.look_up(
            request, DetokenizeRequest, lambda asked: asked.answer(service.model(asked.model).prompts)
        )


def _add_ollama(app: FastAPI, service: Service) -> None:
    """Add what Ollama's clients ask before they generate."""
    started = now()

    @app.get("/api/tags", responses={401: _REFUSALS[401]})
    async def tags() -> dict[str, Any]:
        """The models, in Ollama's API."""
        return {"models": [_ollama_model(service, *one, started) for one in service.names.items()]}

    @app.get("/api/version")
    async def ollama_version() -> dict[str, str]:
        """The version of wedlm."""
        return {"version": __version__}


def _ollama_model(service: Service, name: str, parent: str | None, started: str) -> dict[str, Any]:
    family = service.models[parent or name].llm.model_config.model_type
    details = {"format": "safetensors", "family": family, "families": [family]}
    details |= {"parent_model": parent or "", "parameter_size": "", "quantization_level": ""}
    return {"name": name, "model": name, "modified_at": started, "size": 0, "digest": "", "details": details}


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: {"description": "Requests are refused now"}})
    async def health() -> JSONResponse:
        """200 while requests are served."""
        status = service.status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/version")
    async def show_version() -> dict[str, str]:
        """The version of wedlm."""
        return {"version": __version__}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI, folder: Path) -> None:
    """Serve the files of a folder, found once, so that no path from outside is ever opened. The index is at /, too."""
    headers = {"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}

    def add(address: str, path: Path) -> None:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"

        async def serve() -> FileResponse:
            return FileResponse(path, media_type=kind, headers={**headers, "Cache-Control": "no-cache"})

        app.add_api_route(address, serve, methods=["GET", "HEAD"], include_in_schema=False, response_class=FileResponse)

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            add("/" + path.relative_to(folder).as_posix(), path)
    add("/", folder / "index.html")
