# SPDX-License-Identifier: Apache-2.0
"""Errors in the form that OpenAI's clients expect: an object ``error`` with ``message``, ``type``, ``param``,
``code``."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from wedlm.engine.adapters import UnknownAdapter
from wedlm.server.neutral import UNSUPPORTED
from wedlm.server.protocol import EXPECTED

if TYPE_CHECKING:  # the process that parses bodies has no app
    from fastapi import FastAPI

_ENCODER = json.JSONEncoder(ensure_ascii=False)
_LONGEST = 500  # of a message, which may quote what it refuses
_SHOWN = 80  # characters of a refused value that the message repeats
# What clients try that is not built, by the end of the address.
_NO_EMBEDDINGS = (
    "there are no embeddings at this server: its models are trained to write text, and their hidden states compare "
    "texts poorly; expected the address of a server with an embedding model, such as llama.cpp's, vLLM's or Ollama's"
)
_ELSEWHERE = dict.fromkeys(("/v1/embeddings", "/api/embed", "/api/embeddings"), _NO_EMBEDDINGS)
_TYPES = {  # of JSON; pydantic speaks of Python's
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "an integer",
    "list_type": "a list",
    "string_type": "a string",
}


class ErrorDetail(BaseModel):
    """What went wrong; ``param`` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer with a status other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        message = _shortened(message, _LONGEST)
        self.status, self.headers = status, dict(headers or {})
        self.detail = ErrorDetail(message=message, type=type, param=param, code=code)

    @property
    def body(self) -> dict[str, Any]:
        return ErrorBody(error=self.detail).model_dump()

    def response(self, path: str = "") -> Response:
        """The error in the form of the API that ``path`` belongs to."""
        body = self.body
        if path.startswith("/v1/messages"):
            body = anthropic_body(self.status, self.detail)
        elif path.startswith("/api/"):
            body = ollama_body(self.detail)
        # json.dumps escapes what is not ASCII: a message may quote half of a surrogate pair, which has no UTF-8.
        content = json.dumps(body)
        return Response(content, self.status, self.headers, media_type="application/json")


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_body(status: int, detail: ErrorDetail) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": detail.message}}


def ollama_body(detail: ErrorDetail) -> dict[str, Any]:
    return {"error": detail.message}


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "..."


def internal_error() -> ApiError:
    """How our own bug looks from outside; the log has the details."""
    return ApiError(500, "the server failed on this request", type="server_error", code="internal_error")


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, type="server_error", code=code, headers={"Retry-After": "5"})


def queue_full(message: str) -> ApiError:
    headers = {"Retry-After": "1"}
    return ApiError(429, f"{message}, try again later", type="rate_limit_error", code="queue_full", headers=headers)


def unknown_model(message: str) -> ApiError:
    return ApiError(404, message, type="not_found_error", param="model", code="model_not_found")


def refused(error: ValueError, kind: str) -> ApiError:
    """A 400 for what the engine refuses, whose sentences name the field first or begin with "the prompt"; a 404 for an
    adapter that is no longer loaded."""
    if isinstance(error, UnknownAdapter):
        return unknown_model(str(error).replace("adapter", "model", 1))
    name = str(error).partition(" ")[0]
    if name == "the":
        name = "messages" if kind == "chat" else "prompt"
    return ApiError(400, str(error), param=name, code="invalid_value")


def install(app: "FastAPI") -> None:
    """Make the app answer its own and the framework's errors in this form."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        status = error.status_code
        message, code = str(error.detail), None
        if status == 404:
            message, code = _nothing_at(request.url.path), "not_found"
        elif status == 405:
            message, code = f"the method is {request.method}; this address expects another one", "method_not_allowed"
        return ApiError(status, message, code=code, headers=error.headers).response(request.url.path)


def _nothing_at(path: str) -> str:
    """What a client hears at an address that the server does not have, and what it can do instead."""
    for address, why in _ELSEWHERE.items():
        if path.endswith(address):
            return why
    return "there is nothing at this address"


def explain(error: Any, body: dict[str, Any]) -> ApiError:
    """A 400 about one of pydantic's errors in ``body``: the field, its value, and what was expected."""
    if not error["loc"]:
        return ApiError(400, f"the body has {len(body)} fields; expected {error['msg']}", code="invalid_body")
    names, value = _walk(error["loc"], body)
    path = names[0] + "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names[1:])
    last = next(name for name in reversed(names) if isinstance(name, str))
    unsupported = UNSUPPORTED.get(last) if error["type"] == "extra_forbidden" else None
    if error["type"] == "missing" and (value is body or names[-1] != error["loc"][-1]):
        missing = str(error["loc"][-1])
        path = missing if value is body else f"{path}.{missing}"
        message, code = f"{path} is missing; expected {EXPECTED.get(missing, 'a value')}", "missing"
    elif unsupported is not None:
        message, code = f"{path} is {_show(value)}; {unsupported}", "unsupported"
    elif error["type"] == "extra_forbidden":
        message, code = f"{path} is {_show(value)}; this server knows no field of that name", "unknown_field"
    else:
        said = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
        expected = EXPECTED.get(last) or _TYPES.get(error["type"], said)
        message, code = f"{path} is {_show(value)}; expected {expected}", "invalid_value"
    return ApiError(400, message, param=path, code=code)


def _walk(location: Sequence[Any], body: Any) -> tuple[list[Any], Any]:
    """The part of an error's location that exists in the body, and its value; pydantic adds names of its own types."""
    names: list[Any] = []
    value = body
    for name in location:
        inside_list = isinstance(value, list) and isinstance(name, int) and name < len(value)
        if inside_list or (isinstance(value, dict) and name in value):
            value = value[name]
            names.append(name if isinstance(name, int) else str(name)[:_SHOWN])
    return names or [str(location[0])], value


def _show(value: Any) -> str:
    """The beginning of a value as JSON, written piece by piece and only as far as it is shown."""
    if isinstance(value, str):
        value = value[: _SHOWN + 1]
    text = ""
    try:
        for piece in _ENCODER.iterencode(value):
            text += piece[: _SHOWN + 1]
            if len(text) > _SHOWN:
                return text[:_SHOWN] + "..."
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text
