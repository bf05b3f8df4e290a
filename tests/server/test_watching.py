# SPDX-License-Identifier: Apache-2.0
"""What an operator sees: warnings, logs, metrics; and what an outsider does not."""

import json
import logging

import pytest

from tests.engine.tiny_llm import save_tiny
from tests.server.asking import TEXT, check_error
from tests.server.running import figures, serving, wait_until
from wedlm import LLM
from wedlm.server.logs import JsonFormatter


@pytest.mark.parametrize("stream", [False, True])
def test_a_window_wider_than_the_noise_block(tmp_path, caplog, stream):
    """A header and the log say so; the answer is as asked for."""
    caplog.set_level(logging.INFO, logger="wedlm.server")
    with serving(LLM(save_tiny(tmp_path, block_size=8), device="cpu")) as running:
        body = {"prompt": "abc", "max_tokens": 4, "stream": stream}
        for size, decoding, warns in ((8, "streaming", 0), (9, "verified", 0), (9, "streaming", 1), (None, "block", 1)):
            answer = running.post(TEXT, {**body, "decoding": decoding, "wedlm_window_size": size})
            assert answer.status_code == 200
            assert bool(warns) == ("X-Wedlm-Warning" in answer.headers)
        sentence = "the window of 16 is wider than the noise block of 8"
        assert answer.headers["X-Wedlm-Warning"].startswith(sentence)
    logged = [json.loads(JsonFormatter().format(record)) for record in caplog.records if record.message == "request"]
    assert [("warning" in line) for line in logged] == [False, False, True, True]
    assert logged[-1]["warning"].startswith(sentence)


def test_request_ids_and_logs(running, caplog):
    caplog.set_level(logging.INFO, logger="wedlm.server")
    answer = running.post(
        TEXT, {"prompt": "secret prompt", "max_tokens": 3, "ignore_eos": True}, **{"X-Request-Id": "my-id.1"}
    )
    assert answer.headers["X-Request-Id"] == "my-id.1"
    made = running.http.get("/nothing", headers={"X-Request-Id": 'x"\ty'}).headers["X-Request-Id"]
    assert made.startswith("req-")
    wait_until(lambda: len(caplog.records) >= 2)
    lines = [JsonFormatter().format(record) for record in caplog.records]
    first, second = (json.loads(line) for line in lines[:2])
    assert (first["request_id"], first["status"], first["tokens"], first["finish"]) == ("my-id.1", 200, 3, ["length"])
    assert first["path"] == TEXT
    assert (second["request_id"], second["status"]) == (made, 404)
    assert "secret prompt" not in "".join(lines)


def test_the_engine_knows_which_answers_are_read_as_they_come(running, monkeypatch):
    engine = running.model.llm.engine
    seen: list[bool] = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: seen.extend(r.streamed for r in engine.requests.values()) or step())
    for stream in (True, False):
        seen.clear()
        assert running.post(TEXT, {"prompt": "abc", "max_tokens": 4, "stream": stream}).status_code == 200
        running.settled()
        assert set(seen) == {stream}


def test_a_bug_of_ours_tells_nothing(running, monkeypatch, caplog):
    monkeypatch.setattr(running.model, "_room", lambda prompt: 1 / 0)
    body = {"messages": [{"role": "user", "content": "x"}]}
    answer = running.post("/v1/chat/completions", body, **{"X-Request-Id": "bug"})
    assert check_error(answer, 500)["code"] == "internal_error"
    assert "division" not in answer.text
    assert answer.headers["X-Request-Id"] == "bug"
    wait_until(lambda: "ZeroDivisionError" in caplog.text)


def test_metrics(llm):
    body = {"prompt": "abc" * 20, "max_tokens": 10, "temperature": 0, "decoding": "verified"}
    with serving(llm) as running:
        for _ in range(2):
            running.post(TEXT, body)
        values = figures(running)
        stats = running.post(TEXT, body).json()["usage"]
    ours = {
        name.removesuffix('{model_name="tiny"}').removeprefix("wedlm_"): value
        for name, value in values.items()
        if name.endswith('{model_name="tiny"}')
    }
    assert ours["generated_tokens_total"] == 20
    assert ours["prompt_tokens_total"] == 120
    assert ours["prompt_tokens_reused_total"] == 48  # three pages of 16, the second time
    assert ours["forwards_total"] == 2 * stats["forwards"]
    assert ours["rows_total"] == 2 * stats["rows"]
    assert ours["tokens_per_forward_sum"] == pytest.approx(2 * stats["tokens_per_forward"])
    assert ours["p_cache_sum"] == pytest.approx(2 * stats["p_cache"])
    assert ours["time_to_first_token_seconds_count"] == ours["queue_seconds_count"] == 2
    assert 0 <= ours["queue_seconds_sum"] < ours["time_to_first_token_seconds_sum"]
    assert ours["preemptions_total"] == 0
    assert ours["engine_up"] == 1
    assert values['wedlm_sequences_finished_total{model_name="tiny",reason="length"}'] == 2
    assert values['wedlm_http_requests_total{path="/v1/completions",status="200"}'] == 2
    assert values["process_resident_memory_bytes"] > 1e7
    assert values["process_open_fds"] > 3
    assert {"process_cpu_seconds_total", "process_start_time_seconds", "process_max_fds"} <= set(values)
