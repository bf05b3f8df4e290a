# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve`` as a process: it answers, says so in JSON lines, and ends well on a signal."""

import json
import signal
import socket
import subprocess
import sys

import pytest

from tests.cli.command import wedlm
from tests.engine.tiny_llm import save_tiny
from tests.server.processes import process_of
from tests.server.running import wait_until
from wedlm.cli.options import EngineOptions
from wedlm.cli.serve import (
    HttpOptions,
    LimitOptions,
    ServedOptions,
    check_adapters,
    served_adapters,
    served_models,
    server_config,
)
from wedlm.server.run import AddressError, bound_sockets


def test_a_process(directory):
    import httpx2

    with process_of(directory, "--api-key", "secret-key") as (process, url, lines):
        headers = {"Authorization": "Bearer secret-key"}
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        (model,) = httpx2.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert model["id"] == directory.name  # and not the path
        body = {"model": model["id"], "prompt": "abc", "max_tokens": 4, "seed": 0}
        answer = httpx2.post(f"{url}/v1/completions", json=body, headers=headers).json()
        assert answer["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert [line["status"] for line in logged if line["message"] == "request"] == [401, 200, 200]
    assert any(line["message"] == f"running on {url}" for line in logged)
    assert "secret-key" not in "".join(lines)


@pytest.mark.parametrize(
    "stop",
    [
        [signal.SIGTERM],
        pytest.param([signal.SIGINT] * 2, marks=pytest.mark.long),
        pytest.param([signal.SIGTERM, signal.SIGINT], marks=pytest.mark.long),
    ],
)
def test_an_end_in_the_middle_of_an_answer_leaves_no_traceback(tmp_path, stop):
    import httpx2

    directory = save_tiny(tmp_path / "long", max_position_embeddings=60000)
    body = {"model": "long", "prompt": "abc", "max_tokens": 50000, "ignore_eos": True, "stream": True}
    with (
        process_of(directory, "--shutdown-timeout", "1" if len(stop) == 1 else "600") as (process, url, lines),
        httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer,
    ):
        pieces = answer.iter_lines()
        next(pieces)
        for number, one in enumerate(stop, start=1):
            process.send_signal(one)
            wait_until(lambda n=number: n > 1 or "shutting down; 1 seq" in "".join(lines), seconds=30)
        assert "shutting_down" in "".join(pieces)
        assert process.wait(30) == 0
    assert "raceback" not in "".join(lines)
    assert json.loads(lines[-1])["message"].startswith("Finished server process")


def test_a_port_in_use_is_one_sentence(directory):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "wedlm", "serve", "--model", str(directory), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"error: port {port} of '127.0.0.1' cannot be used: address already in use; expected" in done.stderr
    assert "serving" not in done.stderr


def test_every_address_of_a_host_has_a_socket_of_its_own():
    with bound_sockets("", 0) as sockets:
        families = {one.family for one in sockets}
        assert socket.AF_INET in families
        assert len(families) == len(sockets)
    assert all(one.fileno() == -1 for one in sockets)
    with (
        pytest.raises(AddressError, match="port 1 of 'no such host' cannot be used"),
        bound_sockets("no such host", 1),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "port is 70000"),
        (["--root-path", "llm/"], "root_path is 'llm/'"),
        (["--ssl-keyfile", "key.pem"], "ssl_keyfile is 'key.pem' without ssl_certfile"),
        (["--ssl-certfile", "/nowhere.pem"], "are /nowhere.pem, which cannot be used: [Errno 2]"),
        (["--otlp-traces-endpoint", "here"], "otlp_traces_endpoint is 'here'"),
        (["--max-queue", "-1"], "max_queue is -1"),
        (["--request-timeout", "0"], "request_timeout_s is 0"),
        (["--log-level", "loud"], "log_level is 'loud'"),
        (["--model", "/nowhere/at/all", "--port", "0"], "/nowhere/at/all"),
        (["--threads", "0", "--port", "0"], "threads is 0"),
    ],
)
def test_wrong_options(words, message):
    result = wedlm("serve", *words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (True, float("inf"))),  # on a CPU, which captures nothing
        (["--capture-chunks", "--chunk-step-ratio", "1.5"], (True, 1.5)),
        (["--no-capture-chunks", "--chunk-step-ratio", "inf"], (False, float("inf"))),
    ],
)
def test_options_of_prompt_chunks(directory, monkeypatch, words, expected):
    served = []
    monkeypatch.setattr(
        "wedlm.cli.serve.run", lambda models, *_: served.extend(llm.engine.config.options for llm in models.values())
    )
    result = wedlm("serve", "--model", str(directory), "--port", "0", "--device", "cpu", *words)
    assert result.exit_code == 0, result.stderr
    assert [(config.capture_chunks, config.chunk_step_ratio) for config in served] == [expected]


@pytest.mark.parametrize("words", [[], ["--allow-control-tokens"]])
def test_control_tokens(directory, monkeypatch, words):
    served = []
    monkeypatch.setattr("wedlm.cli.serve.run", lambda models, *_: served.extend(models.values()))
    assert wedlm("serve", "--model", str(directory), "--port", "0", "--device", "cpu", *words).exit_code == 0
    assert [llm.allow_control_tokens for llm in served] == [bool(words)]


def test_eight_bits(directory, monkeypatch):
    served = []
    monkeypatch.setattr("wedlm.cli.serve.run", lambda models, *_: served.extend(models.values()))
    words = ["serve", "--model", str(directory), "--port", "0", "--device", "cpu", "--quantization"]
    assert wedlm(*words, "int8").exit_code == 0
    assert "weights: int8;" in served[0].describe()
    result = wedlm(*words, "fp4")
    assert (result.exit_code, len(served)) == (2, 1)
    assert "quantization is 'fp4'; expected one of auto, none, int8, fp8" in result.stderr


def test_a_wrong_option_of_the_engine(directory):
    words = ["--model", str(directory), "--port", "0", "--device", "cpu", "--chunk-step-ratio", "1"]
    result = wedlm("serve", *words)
    assert result.exit_code == 2
    assert "chunk_step_ratio is 1.0; expected a number > 1, or inf" in " ".join(result.stderr.split())


def test_keys_of_the_environment_and_the_options():
    limits = LimitOptions()
    assert server_config(HttpOptions(api_key=["a"]), limits, "b").api_keys == ("a", "b")
    assert server_config(HttpOptions(), limits, None).api_keys == ()


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (None, None, {"demo": "demo"}),
        (["./some/checkpoint/"], None, {"checkpoint": "./some/checkpoint/"}),
        (["./some/checkpoint"], "mine", {"mine": "./some/checkpoint"}),
        (["a=demo", "org/b=./x=y.gguf"], None, {"a": "demo", "org/b": "./x=y.gguf"}),
        (["a=x", "./a"], None, "two models are called 'a'"),
        (["demo", "demo"], None, "two models are called 'demo'"),
        (["x", "y"], "mine", "two models are called 'mine'"),
        (["a=x"], "mine", "model_name is 'mine' with --model a=x"),
        (["=x"], None, "model is '=x'"),
        (["x="], None, "model is 'x='"),
        (["x"], "", "model is 'x'"),
    ],
)
def test_names_of_models(words, name, expected):
    options = ServedOptions(model=words, model_name=name)
    if isinstance(expected, dict):
        assert served_models(options, EngineOptions()) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            served_models(options, EngineOptions())


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert served_models(ServedOptions(model=[f"{tmp_path}/a=b"]), EngineOptions()) == {"a=b": f"{tmp_path}/a=b"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, {})),
        (["DIR"], ("DIR", {})),
        (["demo-masked", "a=x", "b=y"], ("demo-masked", {"a": "x", "b": "y"})),
        (["a=x", "a=y"], "two adapters are called 'a'; expected different names"),
        (["x", "y"], "adapter is 'x' and 'y', both without a name; expected NAME=DIR for one"),
        (["=x"], "adapter is '=x'; expected DIR, or NAME=DIR"),
        (["a="], "adapter is 'a='; expected DIR, or NAME=DIR"),
    ],
)
def test_names_of_adapters(words, expected):
    if isinstance(expected, tuple):
        assert served_adapters(words) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            served_adapters(words)


def test_names_of_adapters_beside_those_of_models():
    check_adapters({"a": "x"}, {"model": "demo"})
    with pytest.raises(ValueError, match="a model and an adapter are called 'a'"):
        check_adapters({"a": "x"}, {"a": "demo"})
    with pytest.raises(ValueError, match="adapters by name are given with 2 models; expected one model with them"):
        check_adapters({"a": "x"}, {"b": "demo", "c": "demo"})


def test_what_belongs_to_one_model():
    with pytest.raises(ValueError, match="adapter is 'x' with 2 models"):
        served_models(ServedOptions(model=["a", "b"]), EngineOptions(adapter="x"))
