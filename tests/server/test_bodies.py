# SPDX-License-Identifier: Apache-2.0
"""Large bodies are parsed in a process of its own, to the same requests and refusals as in this one."""

import os
import signal
from typing import Any

import pytest

from wedlm.server.bodies import Parser, parse
from wedlm.server.errors import ApiError
from wedlm.server.protocol import ChatRequest, CompletionRequest

TOOL = b'{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"a":{"const":1.5}}}}}'
HELLO, PARTS = b'{"role":"user","content":"y"},', b'{"role":"user","content":[{"type":"text","text":"\\u00e9"}]}'
BODIES = {
    "text": (CompletionRequest, b'{"model":"m","prompt":"x","temperature":0.5,"wedlm_entropy_threshold":null}'),
    "many strings": (CompletionRequest, b'{"model":"m","prompt":[' + b'"ab",' * 900 + b'"c"]}'),
    "many ids": (CompletionRequest, b'{"model":"m","prompt":[' + b"12345," * 100_000 + b"1]}"),
    "chat": (ChatRequest, b'{"model":"m","messages":[' + HELLO * 4000 + PARTS + b'],"tools":[' + TOOL + b"]}"),
    "half a surrogate": (CompletionRequest, b'{"model":"m","prompt":"\\ud800"}'),
    "no JSON": (CompletionRequest, b'{"model"'),
    "no object": (CompletionRequest, b"[]"),
    "wrong": (CompletionRequest, b'{"model":"m","prompt":[' + b"1.5," * 100_000 + b"1]}"),
    "too many": (ChatRequest, b'{"model":"m","messages":[' + HELLO * 4096 + b"{}]}"),
    "unknown": (ChatRequest, b'{"model":"m","messages":[],"\\ud800":1}'),
}  # fmt: skip


@pytest.fixture(scope="module")
def parser():
    one = Parser()
    yield one
    one.close()


def outcome(read: Any, raw: bytes, model: Any) -> Any:
    """The request, or the answer that refuses it."""
    try:
        return read(raw, model)
    except ApiError as error:
        return error.status, error.body, error.headers


@pytest.mark.parametrize("name", BODIES)
def test_as_in_this_process(parser, name):
    model, raw = BODIES[name]
    expected = outcome(parse, raw, model)
    found = outcome(parser.parse, raw, model)
    assert found == expected
    if isinstance(found, model):  # which fields were given decides, too
        assert found.model_fields_set == expected.model_fields_set


def test_a_killed_process_is_replaced(parser):
    model, raw = BODIES["text"]
    for killed in (False, True):
        process = parser.start()
        os.kill(process.pid, signal.SIGKILL)
        if killed:
            process._process.wait()
        assert parser.parse(raw, model) == parse(raw, model)
        assert parser.start() is not process


def test_the_end(parser):
    """Also of what it is doing."""
    one = Parser()
    process = one.start()
    one.close()
    with pytest.raises(RuntimeError, match="ended twice"):
        one.parse(*reversed(BODIES["text"]))
    assert not process.alive
    assert one._process is None
