# SPDX-License-Identifier: Apache-2.0
"""``wedlm serve`` as a process: it answers, says so in JSON lines, and ends well on a signal."""

import json
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.server.running import wait_until
from wedlm import cli_serve
from wedlm.cli_serve import serve, server_config

app = typer.Typer()
app.command()(serve)


def test_a_process(directory):
    import httpx2

    code = "import typer; from wedlm.cli_serve import serve; typer.run(serve)"
    words = ["--model", str(directory), "--port", "0", "--device", "cpu", "--threads", "1", "--api-key", "secret-key"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")))
    reader.start()
    try:
        pattern = re.compile(r"running on (http://127\.0\.0\.1:\d+)")
        wait_until(lambda: process.poll() is not None or bool(pattern.search("".join(lines))), seconds=60)
        url = pattern.search("".join(lines))[1]
        headers = {"Authorization": "Bearer secret-key"}
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        (model,) = httpx2.get(f"{url}/v1/models", headers=headers).json()["data"]
        assert model["id"] == directory.name  # and not the path
        body = {"model": model["id"], "prompt": "abc", "max_tokens": 4, "seed": 0}
        assert (
            httpx2.post(f"{url}/v1/completions", json=body, headers=headers).json()["usage"]["completion_tokens"] == 4
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert [line["status"] for line in logged if line["message"] == "request"] == [401, 200, 200]
    assert "secret-key" not in "".join(lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "port is 70000"),
        (["--max-queue", "-1"], "max_queue is -1"),
        (["--request-timeout", "0"], "request_timeout_s is 0"),
        (["--log-level", "loud"], "log_level is 'loud'"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--threads", "0"], "threads is 0"),
    ],
)
def test_wrong_options(words, message):
    result = CliRunner().invoke(app, words)
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
    monkeypatch.setattr(cli_serve, "run", lambda llm, *_: served.append(llm.engine.config))
    result = CliRunner().invoke(app, ["--model", str(directory), "--device", "cpu", *words])
    assert result.exit_code == 0, result.stderr
    assert [(config.capture_chunks, config.chunk_step_ratio) for config in served] == [expected]


def test_eight_bits(directory, monkeypatch):
    served = []
    monkeypatch.setattr(cli_serve, "run", lambda llm, *_: served.append(llm))
    words = ["--model", str(directory), "--device", "cpu", "--quantization"]
    assert CliRunner().invoke(app, [*words, "int8"]).exit_code == 0
    assert served[0].model.model.layers[0].mlp.down_proj.weight.dtype == torch.int8
    result = CliRunner().invoke(app, [*words, "fp4"])
    assert (result.exit_code, len(served)) == (2, 1)
    assert "quantization is 'fp4'; expected int8 or fp8, or nothing" in result.stderr


def test_a_wrong_option_of_the_engine(directory):
    result = CliRunner().invoke(app, ["--model", str(directory), "--device", "cpu", "--chunk-step-ratio", "1"])
    assert result.exit_code == 2
    assert "chunk_step_ratio is 1.0; expected a number > 1, or inf" in " ".join(result.stderr.split())


def test_keys_of_the_environment_and_the_options():
    options = {
        "model": "./some/checkpoint/",
        "model_name": None,
        "host": "127.0.0.1",
        "port": 1,
        "api_key": ["a"],
        "cors_origin": None,
        "max_queue": 1,
        "max_choices": 1,
        "max_body_bytes": 1,
        "request_timeout": 1.0,
        "body_timeout": 1.0,
        "shutdown_timeout": 1.0,
    }
    config = server_config(options, "b")
    assert config.api_keys == ("a", "b")
    assert config.model_name == "checkpoint"
    assert server_config({**options, "api_key": None}, None).api_keys == ()
