# SPDX-License-Identifier: Apache-2.0
"""Turn the bytes of a body into a checked request. ``python -m`` this module is the process that does so for large
bodies: a wrong body may be as large as a right one, and while a library reads a megabyte nothing else of Python's can
run."""

import io
import pickle
import threading
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from wedlm.engine.helper_process import HelperProcess, answer_questions
from wedlm.server.converters.anthropic import CountRequest, MessagesRequest
from wedlm.server.converters.ollama import OllamaChatRequest, OllamaGenerateRequest
from wedlm.server.converters.responses import ResponsesRequest
from wedlm.server.converters.tokens import DetokenizeRequest, TokenizeRequest
from wedlm.server.errors import ApiError, explain
from wedlm.server.protocol import ChatRequest, CompletionRequest

M = TypeVar("M", bound=BaseModel)
_MAX_S = 30.0  # for a megabyte, of which a tenth of a second is usual
_MODELS: dict[bytes, type[BaseModel]] = {
    b"C": ChatRequest,
    b"T": CompletionRequest,
    b"R": ResponsesRequest,
    b"M": MessagesRequest,
    b"N": CountRequest,
    b"O": OllamaChatRequest,
    b"G": OllamaGenerateRequest,
    b"K": TokenizeRequest,
    b"D": DetokenizeRequest,
}


def parse(raw: bytes, model: type[M]) -> M:
    """The request in a JSON body. Raises ApiError 400 about the first error."""
    try:
        body = from_json(raw)  # in half of json.loads's time
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


class Parser:
    """Runs ``parse`` in a separate process, for one thread. The process starts with the first body, or with
    ``start``."""

    def __init__(self) -> None:
        self._process: HelperProcess | None = None
        self._asking = threading.Lock()
        self._closed = False

    def start(self) -> HelperProcess:
        """Start the process, which may not be ready when this returns."""
        if self._process is None:
            self._process = HelperProcess(__spec__.name)
        return self._process

    def parse(self, raw: bytes, model: type[M]) -> M:
        """Like ``parse``. Raises RuntimeError if the process dies over the body."""
        name = next(name for name, one in _MODELS.items() if one is model)
        body, error = pickle.Unpickler(_Frames(self._ask(name + raw))).load()
        if error is not None:
            raise ApiError(**error)
        return body

    def close(self) -> None:
        """End the process, from any thread; a question it has not answered fails."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        if self._asking.acquire(blocking=False):  # or else who asks sees to the rest
            self._drop()
            self._asking.release()

    def _ask(self, question: bytes) -> bytes:
        with self._asking:
            for _ in range(2):  # once more if somebody else ended the process
                process = self.start()
                if self._closed:
                    process.kill()
                answer = process.ask(question, _MAX_S)
                if answer is not None:
                    return answer
                self._drop()
        raise RuntimeError("the process that parses bodies ended twice over one")

    def _drop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


class _Frames:
    """A stream for the unpickler that asks for 64 KiB at a time. As this is Python, other threads get their turn each
    time, while a megabyte in one call would hold them up for 60 ms."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self._stream.read(size)

    def readline(self) -> bytes:
        return self._stream.readline()


def _answer(question: bytes) -> bytes:
    """Runs in that process: returns the request, or the arguments of ApiError, pickled."""
    body, error = None, None
    try:
        body = parse(question[1:], _MODELS[question[:1]])
    except ApiError as refusal:
        error = {"status": refusal.status, "headers": refusal.headers, **refusal.detail.model_dump()}
    return pickle.dumps((body, error), protocol=pickle.HIGHEST_PROTOCOL)


if __name__ == "__main__":
    answer_questions(_answer)
