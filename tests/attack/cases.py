# SPDX-License-Identifier: Apache-2.0
"""What a stranger may send, by kind: each case is a name and something to do to a running server, from several
connections where one would not show. Whether a case is refused or answered is left open; not that it harms nothing."""

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from tests.attack.victim import Victim
from tests.server.running import wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY_BYTES = 2**20 - 64  # the most that a server takes, without a few
ANSWERS = {200, 400, 403, 404, 405, 408, 413, 415, 429, 431, 503, 504}
Act = Callable[[Victim], None]


@dataclass(frozen=True)
class Case:
    """``quick`` ones are part of every test run."""

    kind: str
    name: str
    act: Act
    quick: bool = False


def all_cases(model: str) -> list[Case]:
    """In the order of their kinds. Those with random parts are the same in each run."""
    made = [*_bodies(model), *_heads(), *_connections(model), *_stops(model), *_sampling(model), *_answers(model)]
    made += [*_schemas(model), *_conversations(model), *_leavers(model), *_converted(model)]
    return made


KINDS = [
    "bodies",
    "heads",
    "connections",
    "stops",
    "sampling",
    "answers",
    "schemas",
    "conversations",
    "leavers",
    "converted",
]


def _converted(model: str) -> Iterator[Case]:
    """As large a body as there may be, by the other APIs, where each part of it costs something."""
    responses = f'{{"model":"{model}","max_output_tokens":2,"input":'.encode()
    messages = f'{{"model":"{model}","max_tokens":2,"messages":'.encode()
    echo = f'{{"model":"{model}","echo":true,"logprobs":1,"prompt":['.encode()
    text = b'{"role":"user","content":[{"type":"text","text":"x"}]},'
    shapes = {
        "empty items": ("/v1/responses", _filled(responses + b"[", b"{},", b"{}]}")),
        "references": ("/v1/responses", _filled(responses + b"[", b'{"id":"x"},', b'{"id":"x"}]}')),
        "messages": ("/v1/responses", _filled(responses + b"[", b'{"role":"user","content":"x"},', b'{"id":"x"}]}')),
        "calls": ("/v1/responses", _filled(responses + b"[", b'{"type":"function_call"},', b'{"id":"x"}]}')),
        "deep items": ("/v1/responses", _filled(responses, b"[", b"}")),
        "blocks": ("/v1/messages", _filled(messages + b"[", text, text[:-1] + b"]}")),
        "counted": ("/v1/messages/count_tokens", _filled(messages + b"[", text, text[:-1] + b"]}")),
        "deep input": ("/v1/messages", _filled(messages + b'[{"role":"user","content":', b'{"a":', b"}]}")),
        "ollama": ("/api/chat", _filled(messages + b"[", b'{"role":"user"},', b'{"role":"user"}]}')),
        "a long text": ("/tokenize", _filled(f'{{"model":"{model}","prompt":"'.encode(), b"x ", b'"}')),
        "strings of tokens": ("/tokenize", _filled(b'{"return_token_strs":true,"prompt":"', b"x ", b'"}')),
        "many ids": ("/detokenize", _filled(b'{"tokens":[', b"1,", b"1]}")),
        "echoes": (TEXT, _filled(echo, b'"x",', b'"x"]}')),
        "choices": (CHAT, _filled(messages + b'[],"guided_choice":[', b'"x",', b'"x"]}')),
        "EBNF": (CHAT, _filled(messages + text[:-1].join([b"[", b"]"]) + b',"guided_grammar":"root ::= ', b"(", b'"}')),
    }
    for name, (path, body) in shapes.items():
        yield Case("converted", name, _post(path, body), quick=name in ("references", "deep input"))


def ask(victim: Victim, path: str, body: bytes, timeout: float = 60.0) -> None:
    """The status must be one that the documentation has, and a refusal one sentence."""
    status, answer = victim.post(path, body, timeout)
    assert status in ANSWERS, (status, answer[:300])
    if status != 200:
        error = json.loads(answer)["error"]  # Ollama's is the sentence itself
        assert len(error if isinstance(error, str) else error["message"]) < 1000


def _together(acts: list[Act]) -> Act:
    def act(victim: Victim) -> None:
        with ThreadPoolExecutor(len(acts)) as pool:
            for done in [pool.submit(one, victim) for one in acts]:
                done.result()

    return act


def _post(path: str, body: bytes) -> Act:
    return lambda victim: ask(victim, path, body)


def _filled(head: bytes, item: bytes, tail: bytes) -> bytes:
    """As many items as a body holds."""
    return head + item * ((BODY_BYTES - len(head) - len(tail)) // len(item)) + tail


def _bodies(model: str) -> Iterator[Case]:
    prompt, chat = f'{{"model":"{model}","prompt":'.encode(), f'{{"model":"{model}","messages":'.encode()
    items = {"floats": b"1.5,", "booleans": b"true,", "nulls": b"null,", "lists": b"[],", "objects": b"{},"}
    items |= {
        "strings": b'"",',
        "lists of booleans": b"[true],",
        "integers": b"1,",
        "negative": b"-1,",
        "long": b"1" * 4000 + b",",
    }
    items |= {"lists of integers": b"[1],", "mixed": b'1,"",[],', "infinite": b"1e999,"}
    large: dict[str, tuple[str, bytes]] = {}
    for name, item in items.items():
        large[f"prompt of {name}"] = (TEXT, _filled(prompt + b"[", item, item.rstrip(b",") + b"]}"))
        content = chat + b'[{"role":"user","content":['
        large[f"content of {name}"] = (CHAT, _filled(content, item, item.rstrip(b",") + b"]}]}"))
    fields = ["messages", "stop", "stop_token_ids", "tools", "functions", "modalities", "logprobs", "model", "user"]
    for field in fields:
        start = f'{{"model":"{model}","prompt":"x","{field}":['.encode()
        large[f"{field} of floats"] = (
            CHAT if field in ("messages", "tools") else TEXT,
            _filled(start, b"1.5,", b"1]}"),
        )
    numbered = [b'"k%d":0' % i for i in range(80_000)]
    for name, start, end in [
        ("fields unknown", prompt + b'"x",', b"}"),
        ("logit_bias", prompt + b'"x","logit_bias":{', b"}}"),
        ("metadata", chat + b'[{"role":"user","content":"x"}],"metadata":{', b"}}"),
        ("fields of a message", chat + b'[{"role":"user","content":"x",', b"}]}"),
        ("fields of a part", chat + b'[{"role":"user","content":[{"type":"text","text":"x",', b"}]}]}"),
        ("fields of a tool", chat + b'[],"tools":[{"type":"function",', b"}]}"),
        (
            "fields of parameters",
            chat + b'[{"role":"user","content":"x"}],"tools":[{"type":"function","function":{"name":"f","parameters":{',
            b"}}}]}",
        ),
    ]:
        room, body = BODY_BYTES - len(start) - len(end), b",".join(numbered)
        large[name] = (TEXT if start.startswith(prompt) else CHAT, start + body[:room].rpartition(b",")[0] + end)
    for name, opening, closing in (("lists", b"[", b"]"), ("objects", b'{"a":', b"}")):
        for depth in (100, 199, 1000, 100_000):
            middle = opening * depth + b"1" + closing * depth
            large[f"{depth} {name} in each other"] = (TEXT, prompt + middle + b"}")
            large[f"{depth} open {name}"] = (TEXT, prompt + opening * depth)
    many = b'{"role":"user","content":"x"},'
    large["messages"] = (CHAT, _filled(chat + b"[", many, many.rstrip(b",") + b"]}"))
    large["messages with unknown fields"] = (CHAT, _filled(chat + b"[", b'{"role":"user","x":1,"y":2,"z":3},', b"{}]}"))
    large["a long prompt"] = (TEXT, _filled(prompt + b'"', b"word ", b'"}'))
    large["a long word"] = (TEXT, _filled(prompt + b'"', b"a", b'"}'))
    large["escapes"] = (TEXT, _filled(prompt + b'"', b"\\u00e9", b'"}'))
    large["64 prompts"] = (TEXT, prompt + b"[" + b",".join(b'"%b"' % (b"ab " * 5000) for _ in range(64)) + b"]}")
    large["a number of a million digits"] = (TEXT, _filled(prompt + b'"x","seed":', b"1", b"}"))
    large["a fraction of a million digits"] = (TEXT, _filled(prompt + b'"x","top_p":0.', b"1", b"}"))
    large["an exponent of a million digits"] = (TEXT, _filled(prompt + b'"x","top_p":1e', b"1", b"}"))
    large["no UTF-8"] = (TEXT, _filled(prompt + b'"', b"\xff", b'"}'))
    large["white space"] = (TEXT, b" " * BODY_BYTES)
    large["zeros"] = (TEXT, b"\0" * BODY_BYTES)
    quick = {"prompt of floats", "content of lists", "fields unknown", "a long word", "prompt of integers"}
    for name, (path, body) in large.items():
        yield Case("bodies", name, _post(path, body), quick=name in quick)
    for name in (
        "prompt of floats",
        "prompt of lists",
        "content of objects",
        "a long prompt",
        "64 prompts",
        "messages",
    ):
        yield Case("bodies", f"8 times {name}", _together([_post(*large[name])] * 8), quick=name == "prompt of floats")
    rng = random.Random(0)
    valid = json.dumps(
        {"model": model, "prompt": "abc", "max_tokens": 3, "stop": ["x"], "logit_bias": {"5": 1.0}}
    ).encode()
    for number in range(10):
        damaged = [bytes(_damage(rng, valid)) for _ in range(50)]
        yield Case("bodies", f"50 damaged ones, {number}", _together([_all_of(damaged[i::4]) for i in range(4)]))


def _damage(rng: random.Random, body: bytes) -> bytearray:
    """A few bytes or pieces replaced, doubled, swapped or left out."""
    damaged = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(damaged))
        end = min(len(damaged), start + rng.randint(1, 8))
        piece = rng.choice(
            [b"", bytes([rng.randrange(256)]), damaged[start:end] * 2, b"null", b"[", b"1e999", b'"\\ud800"']
        )
        damaged[start:end] = piece
        if not damaged:
            damaged = bytearray(b"{")
    return damaged


def _all_of(bodies: list[bytes]) -> Act:
    def act(victim: Victim) -> None:
        for body in bodies:
            ask(victim, TEXT, body)

    return act


def _each(path: str, bodies: list[bytes]) -> Act:
    def act(victim: Victim) -> None:
        for body in bodies:
            _patient(path, body, victim)

    return act


def _raw(data: bytes, wait: bool = True) -> Act:
    """Bytes as they are; whatever comes back is HTTP, or the end of the connection."""

    def act(victim: Victim) -> None:
        with victim.connect(20) as connection:
            try:
                connection.sendall(data)
                if wait:
                    answer = connection.recv(100)
                    assert not answer or answer.startswith(b"HTTP/1.1 "), answer
            except (ConnectionError, TimeoutError):
                pass

    return act


def _heads() -> Iterator[Case]:
    def request(*lines: bytes, first: bytes = b"GET /health HTTP/1.1") -> bytes:
        return b"\r\n".join([first, b"Host: localhost", *lines, b"", b""])

    heads = {
        "a long header": request(b"X-A: " + b"a" * 200_000),
        "many headers": request(*[b"X-%d: a" % i for i in range(20_000)]),
        "a long address": request(first=b"GET /" + b"a" * 200_000 + b" HTTP/1.1"),
        "a long query": request(first=b"GET /health?" + b"a=b&" * 3000 + b" HTTP/1.1"),
        "a long method": request(first=b"G" * 10_000 + b" / HTTP/1.1"),
        "no version": request(first=b"GET /"),
        "version 0.9": request(first=b"GET / HTTP/0.9"),
        "version 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
        "two hosts": request(b"Host: other"),
        "another host": b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        "another origin": request(b"Origin: http://evil.example", first=b"GET /v1/models HTTP/1.1"),
        "two lengths": request(b"Content-Length: 1", b"Content-Length: 2", first=b"POST /v1/completions HTTP/1.1"),
        "length and chunks": request(
            b"Content-Length: 5", b"Transfer-Encoding: chunked", first=b"POST /v1/completions HTTP/1.1"
        )
        + b"0\r\n\r\n",
        "a negative length": request(b"Content-Length: -1", first=b"POST /v1/completions HTTP/1.1"),
        "a length of 10^18": request(b"Content-Length: 1" + b"0" * 18, first=b"POST /v1/completions HTTP/1.1"),
        "a length of 10^5000": request(b"Content-Length: 1" + b"0" * 5000, first=b"POST /v1/completions HTTP/1.1"),
        "folded": request(b"X-A: a", b" b"),
        "zeros": b"\0" * 100_000,
        "line feeds": b"\n" * 100_000,
        "control characters": request(b"X-A: a\x01b"),
        "an upgrade": request(
            b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: eA=="
        ),
        "h2c": request(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
        "expect": request(b"Expect: 100-continue", b"Content-Length: 10", first=b"POST /v1/completions HTTP/1.1"),
        "an id with control characters": request(b"X-Request-Id: \x1b[31m" + b"x" * 1000),
        "a key of 15,000 characters": request(
            b"Authorization: Bearer " + b"k" * 15_000, first=b"GET /v1/models HTTP/1.1"
        ),
        "percent signs": request(first=b"GET /" + b"%ff%00%0d%0a" * 500 + b" HTTP/1.1"),
        "trace": request(first=b"TRACE / HTTP/1.1"),
        "connect": request(first=b"CONNECT evil.example:443 HTTP/1.1"),
        "a foreign address": request(first=b"GET http://evil.example/ HTTP/1.1"),
        "a range": request(
            b"Range: bytes=" + b",".join(b"%d-%d" % (i, i) for i in range(1000)), first=b"GET / HTTP/1.1"
        ),
        "a gzip body": request(b"Content-Encoding: gzip", b"Content-Length: 4", first=b"POST /v1/completions HTTP/1.1")
        + b"\x1f\x8b\x08\x00",
        "a form": request(
            b"Content-Type: application/x-www-form-urlencoded",
            b"Content-Length: 100000",
            first=b"POST /v1/completions HTTP/1.1",
        )
        + b"a=b&" * 25_000,
        "multipart": request(
            b"Content-Type: multipart/form-data; boundary=x",
            b"Content-Length: 90000",
            first=b"POST /v1/completions HTTP/1.1",
        )
        + b"--x\r\n\r\n\r\n" * 10_000,
    }
    for name, data in heads.items():
        yield Case("heads", name, _raw(data, wait=True), quick=name in ("many headers", "TLS", "another host"))
    pipelined = request() * 300
    yield Case("heads", "300 requests at once", _raw(pipelined), quick=True)
    yield Case("heads", "8 connections of 3,000 requests", _together([_raw(request() * 3000)] * 8))


def _connections(model: str) -> Iterator[Case]:
    body = json.dumps(
        {"model": model, "prompt": "abc", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    ).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    def hold(count: int, data: bytes, seconds: float = 1.0, drip: bytes = b"") -> Act:
        def act(victim: Victim) -> None:
            connections = []
            try:
                for _ in range(count):
                    connections.append(victim.connect())
                    connections[-1].sendall(data)
                for _ in range(int(seconds / 0.1)):
                    time.sleep(0.1)
                    for connection in connections if drip else ():
                        connection.sendall(drip)
            except OSError:  # refused
                pass
            finally:
                for connection in connections:
                    connection.close()

        return act

    def chunked(size: int) -> bytes:
        chunk = b"%x\r\n%b\r\n" % (size, b" " * size)
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * (BODY_BYTES // size) + b"0\r\n\r\n"

    def reset(victim: Victim) -> None:
        for _ in range(300):
            connection = victim.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.close()

    stream = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    acts = {
        "200 silent": hold(200, b""),
        "200 half heads": hold(200, b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: "),
        "100 heads in drops": hold(100, b"GET /health HTTP/1.1\r\nHost: a\r\nX-A: ", drip=b"a"),
        "100 bodies in drops": hold(100, head + b"Content-Length: 1000\r\n\r\n{", drip=b" "),
        "1,200 silent": hold(1200, b""),
        "32 streams that are not read": hold(32, stream, seconds=3),
        "300 resets": reset,
        "chunks of 1 byte": _raw(chunked(1)),
        "8 times chunks of 1 byte": _together([_raw(chunked(1))] * 8),
        "chunks of 300 bytes": _raw(chunked(300)),
        "64 large bodies": _together([_raw(head + b"Content-Length: 900000\r\n\r\n" + b"x" * 900_000)] * 64),
        "a body of 8 MB": _raw(head + b"Content-Length: 8000000\r\n\r\n" + b"x" * 8_000_000),
    }
    for name, act in acts.items():
        yield Case("connections", name, act, quick=name in ("200 half heads", "chunks of 1 byte", "300 resets"))


def _generation(model: str, **options: Any) -> bytes:
    return json.dumps({"model": model, "prompt": "abc", "ignore_eos": True, **options}).encode()


def _stops(model: str) -> Iterator[Case]:
    sets = {
        "near matches": ["a" * 240 + chr(98 + i) * 16 for i in range(16)],
        "one letter": [chr(97 + i) * 256 for i in range(16)],
        "alternating": ["ab" * 120 + str(i) for i in range(16)],
        "accents": ["é" * 250 + chr(97 + i) for i in range(16)],
        "surrogate pairs": ["\U0001f600" * 255 + chr(97 + i) for i in range(16)],
        "prefixes of each other": ["a" * (i + 200) + "b" for i in range(16)],
    }
    for name, stop in sets.items():
        for stream in (False, True):
            body = _generation(
                model, prompt="a" * 200, n=32, max_tokens=300, stop=stop, stream=stream, logit_bias={"64": 100}
            )
            quick = name == "near matches" and stream
            yield Case("stops", f"{name}{', streamed' if stream else ''}", _post(TEXT, body), quick)


def _sampling(model: str) -> Iterator[Case]:
    extremes: dict[str, list[Any]] = {
        "temperature": [0, 1e-30, 1e-300, 1, 1e29, 1e30, 1e308, -1, None],
        "top_p": [1e-300, 1e-9, 0.5, 1, 0],
        "top_k": [-1, 0, 1, 2**31, 2**63, 10**30],
        "max_tokens": [1, 7, 2**31, 2**63, 10**30, 0],
        "min_tokens": [0, 5, 2**63],
        "n": [1, 3, 64, 65, 2**31],
        "seed": [0, -(2**63), 2**63 - 1, 2**64],
        "presence_penalty": [-2, 2, 1e-300],
        "frequency_penalty": [-2, 2, 3],
        "decoding": ["auto", "streaming", "verified", "block", "autoregressive", "magic"],
        "wedlm_window_size": [1, 2, 16, 2**31 - 1, 10**20],
        "wedlm_entropy_threshold": [None, 0, 1e-300, 1e30, 1e308],
        "wedlm_pos_penalty_factor": [0, 1e30, -1e30],
        "wedlm_next_token": [None, "masked", "causal", "magic"],
        "wedlm_draft_entropy": [0, 1e30],
        "wedlm_lookup_drafts": [None, 0, 1, 2**31 - 1, -1],
        "logprobs": [None, 0, 20, 21],
        "stop_token_ids": [[], [5], [10**9], list(range(64))],
        "logit_bias": [{}, {"5": 100}, {str(i): -100 for i in range(90)}],
        "stream": [True, False],
        "wedlm_trace": [True, None],
    }
    rng = random.Random(1)
    for number in range(40):
        bodies = []
        for _ in range(25):
            names = rng.sample(list(extremes), rng.randint(1, 6))
            options = {name: rng.choice(extremes[name]) for name in names}
            bodies.append(_generation(model, **{"max_tokens": 20, **options}))
        yield Case("sampling", f"25 mixes, {number}", _together([_all_of(bodies[i::5]) for i in range(5)]), number < 1)


def _answers(model: str) -> Iterator[Case]:
    alternatives = {"logprobs": 20, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
    cases = {
        "32 choices of 1,000 tokens with 20 alternatives": (TEXT, {"n": 32, "max_tokens": 1000, **alternatives}),
        "12 choices of 1,000 tokens with 20 alternatives": (TEXT, {"n": 12, "max_tokens": 1000, **alternatives}),
        "32 choices of 380 tokens with 20 alternatives": (TEXT, {"n": 32, "max_tokens": 380, **alternatives}),
        "the same, streamed": (TEXT, {"n": 32, "max_tokens": 380, "stream": True, **alternatives}),
        "32 choices of 380 tokens in a chat": (CHAT, {"n": 32, "max_tokens": 380, **chat}),
        "the same chat, streamed": (CHAT, {"n": 32, "max_tokens": 380, "stream": True, **chat}),
        "32 texts of 1,000 tokens": (TEXT, {"n": 32, "max_tokens": 1000}),
        "64 streams of 500 tokens with windows": (
            TEXT,
            {"n": 64, "max_tokens": 500, "stream": True, "wedlm_trace": True},
        ),
    }
    for name, (path, options) in cases.items():
        body = json.dumps({"model": model, **({"prompt": "abc"} if path == TEXT else {}), **options}).encode()
        yield Case("answers", name, partial(_patient, path, body), quick=name.startswith("32 choices of 1,000"))


def _patient(path: str, body: bytes, victim: Victim) -> None:
    ask(victim, path, body, timeout=300)


def _own_schemas() -> dict[str, Any]:
    loop = {"$defs": {"a": {"allOf": [{"anyOf": [{"$ref": "#/$defs/a"}]}] * 6}}, "oneOf": [{"$ref": "#/$defs/a"}] * 2}
    return {
        "multiples": {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941)]},
        "references in a circle": loop,
        "2,000 constants": {"oneOf": [{"const": i} for i in range(2000)]},
        "a large range": {"type": "string", "minLength": 10_000, "maxLength": 2**31},
        "a wide object": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}},
        "a pattern": {"type": "string", "pattern": "^(a|a|b)*(.*.*.*.*.*)*q$"},
    }


def nested(model: str, number: int) -> bytes:
    """A request for a schema of references in a circle, another one for each number."""
    schema = {**_own_schemas()["references in a circle"], "title": str(number)}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "x"}], "response_format": form}
    ).encode()


def _schemas(model: str) -> Iterator[Case]:
    schemas = _own_schemas()
    if find_spec("tests.attack.schemas") is not None:  # all kinds of them
        from tests.attack import schemas as more

        found = {name: options["json_schema"] for name, options in more.hostile().items() if "json_schema" in options}
        schemas |= {f"{name} ": schema for name, schema in found.items()}
    for name, schema in schemas.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        if not isinstance(schema, dict):
            continue
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "response_format": form}
        ).encode()
        yield Case("schemas", name, partial(_patient, CHAT, body), quick=name == "2,000 constants")
        if name in _own_schemas():
            yield Case("schemas", f"6 times {name}", _together([partial(_patient, CHAT, body)] * 6))
    many = [nested(model, number) for number in range(480)]
    yield Case(
        "schemas", "12 times 40 references in a circle", _together([_each(CHAT, many[i::12]) for i in range(12)])
    )


def _conversations(model: str) -> Iterator[Case]:
    parameters = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(60)}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(128)]
    hello = {"role": "user", "content": "x"}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    deep = {**call, "function": {"name": "f", "arguments": '{"a":' * 900 + "1" + "}" * 900}}
    conversations: dict[str, dict[str, Any]] = {
        "4,096 messages": {"messages": [{"role": "user", "content": "y" * 200}] * 4096},
        "20,000 parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "y"}] * 20_000}]},
        "128 tools": {"messages": [hello], "tools": tools},
        "128 tools, one of which is called": {"messages": [hello], "tools": tools, "tool_choice": "required"},
        "a call of broken arguments": {"messages": [hello, {"role": "assistant", "tool_calls": [call]}, hello]},
        "a call of deep arguments": {"messages": [hello, {"role": "assistant", "tool_calls": [deep] * 100}, hello]},
        "template words": {"messages": [{"role": "user", "content": "{{ x }}{% for i in range(10**9) %}" * 1000}]},
        "control tokens": {"messages": [{"role": "user", "content": "<|end|><|user|>" * 20_000}]},
        "a megabyte": {"messages": [{"role": "user", "content": "z" * 1_000_000}]},
        "combining characters": {"messages": [{"role": "user", "content": "e\u0301\u0323" * 60_000}]},
        "names": {"messages": [{**hello, "name": "n" * 500_000}]},
    }
    for name, options in conversations.items():
        body = json.dumps({"model": model, "max_tokens": 5, **options}, ensure_ascii=False).encode()
        quick = name in ("4,096 messages", "128 tools")
        yield Case("conversations", name, _post(CHAT, body), quick)
    body = json.dumps({"model": model, "max_tokens": 5, **conversations["a megabyte"]}).encode()
    yield Case("conversations", "16 times a megabyte", _together([_post(CHAT, body)] * 16))


def leave(path: str, body: bytes, seconds: float) -> Act:
    """Send a request, and go."""

    def act(victim: Victim) -> None:
        with victim.connect() as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(seconds)

    return act


def _leavers(model: str) -> Iterator[Case]:
    """Each leaves while something else is at work on its request."""
    long_prompt = _filled(f'{{"model":"{model}","prompt":"'.encode(), b"word ", b'"}')
    numbers = _filled(f'{{"model":"{model}","prompt":['.encode(), b"1,", b"1]}")
    prompts = json.dumps({"model": model, "prompt": [[number] * 2000 for number in range(64)]}).encode()
    hello = {"model": model, "messages": [{"role": "user", "content": "y" * 200}]}
    forms = {
        name: {**hello, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        for name, schema in _own_schemas().items()
    }
    cases = {
        "tokens": (TEXT, long_prompt),
        "validation": (TEXT, numbers),
        "template": (CHAT, json.dumps({**hello, "messages": hello["messages"] * 4000}).encode()),
        "queue and generation": (TEXT, _generation(model, n=64, max_tokens=1900)),
        "the keys of prompts": (TEXT, prompts),
        "a stream": (TEXT, _generation(model, n=64, max_tokens=1900, stream=True)),
        "log-probabilities": (TEXT, _generation(model, n=12, max_tokens=1000, logprobs=20)),
        **{f"schema: {name}": (CHAT, json.dumps(form).encode()) for name, form in forms.items()},
    }
    for name, (path, body) in cases.items():
        for seconds in (0.0, 0.2):
            acts = [leave(path, body, seconds)] * 4
            quick = seconds == 0.2 and name in ("tokens", "queue and generation")
            yield Case("leavers", f"{name}, after {seconds} s", _together(acts), quick)
    yield Case("leavers", "while the answer is written", partial(_leave_the_answer, model))


def _leave_the_answer(model: str, victim: Victim) -> None:
    """Once the last token is there; writing the log-probabilities takes longer than a second."""
    body = _generation(model, n=12, max_tokens=1000, logprobs=20)
    with victim.connect(60) as connection:
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: victim.metrics()["sequences_open"] >= 12, seconds=20)
        wait_until(lambda: victim.metrics()["sequences_open"] <= 1, seconds=60)
