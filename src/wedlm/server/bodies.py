# SPDX-License-Identifier: Apache-2.0
"""From the bytes of a body to a checked request, in a thread: a wrong body may be as large as a right one."""

from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any, TypeVar

from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from wedlm.server.errors import ApiError, explain

M = TypeVar("M", bound=BaseModel)


class RawBody(APIRoute):
    """A route whose endpoint takes the request alone and reads the body itself. What the endpoint's signature says of
    the body is for the OpenAPI document: ``endpoint(request, body=None)``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return self.endpoint


def is_json(content_type: str) -> bool:
    """Whether a body of this Content-Type is taken. Pages of other origins cannot send it without being asked first."""
    message = Message()
    message["Content-Type"] = content_type or "text/plain"
    return message.get_content_maintype() == "application" and (
        message.get_content_subtype() == "json" or message.get_content_subtype().endswith("+json")
    )


def parse(raw: bytes, model: type[M]) -> M:
    """The request in a JSON body. Raises ApiError 400 about the first thing that is wrong."""
    try:
        body = from_json(raw)  # half of json.loads's time, and neither lets another thread run meanwhile
    except ValueError as error:
        message = f"the body is not valid JSON ({error}); expected a JSON object in UTF-8"
        raise ApiError(400, message, code="invalid_json") from None
    if not isinstance(body, dict):
        raise not_an_object()
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise explain(error.errors(include_url=False)[0], body) from None


def not_an_object() -> ApiError:
    message = "the body is no JSON object; expected one, with Content-Type: application/json"
    return ApiError(400, message, code="invalid_body")
