# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and readers that leave: what was generated is kept, the exit code tells."""

import json
import signal
import sys

import pytest

from tests.cli.command import FAST, WEDLM
from tests.engine.tiny_llm import save_tiny
from wedlm.cli import terminal


def long_answer(model: str, *words: str) -> list[str]:
    options = ["--max-tokens", "50000", "--ignore-eos", "--decoding", "autoregressive", *FAST]
    return [*WEDLM, "generate", "--model", model, *options, *words]


def test_ctrl_c_keeps_what_was_generated(ar_model, start):
    process = start(long_answer(ar_model, "Hello"))
    assert process.stdout is not None
    first = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(first) == 5
    assert rest.endswith("\n")
    assert err.splitlines()[1].startswith("stopped; autoregressive: ")  # behind what runs
    assert "Traceback" not in err


@pytest.mark.long
def test_ctrl_c_keeps_what_a_batch_generated(ar_model, tmp_path, start):
    """Both prompts run together, so both have text when the first one, still unfinished, is stopped."""
    (tmp_path / "prompts").write_text("Hello\nabc\n")
    code = (  # says when the engine is at work: the first record appears only at its end
        "import sys, wedlm.cli, wedlm.engine.engine as e\n"
        "step, e.Engine.count = e.Engine.step, 0\n"
        "def told(self):\n"
        "    e.Engine.count += 1\n"
        "    if e.Engine.count == 20: print('working', file=sys.stderr, flush=True)\n"
        "    return step(self)\n"
        "e.Engine.step = told\n"
        "wedlm.cli.main()"
    )
    options = ["--lines", "--json", "--max-tokens", "50000", "--ignore-eos", "--file", str(tmp_path / "prompts"), *FAST]
    process = start([sys.executable, "-c", code, "generate", "--model", ar_model, *options])
    assert process.stderr is not None
    assert process.stderr.readline().startswith("cpu; ")
    assert process.stderr.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [record["prompt"] for record in found] == ["Hello", "abc"]
    assert all(record["finish_reason"] == "abort" and record["token_ids"] for record in found)
    assert all(record["stats"]["num_tokens"] == len(record["token_ids"]) for record in found)


def test_the_reader_of_the_output_may_leave(ar_model, start):
    process = start(long_answer(ar_model, "Hello"))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=20) == 1
    assert "Traceback" not in process.stderr.read()


def test_a_second_ctrl_c_is_not_held_back():
    with terminal.Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_chat_stops_the_answer_alone(tmp_path, start):
    model = str(save_tiny(tmp_path, max_position_embeddings=60000))
    command = [*WEDLM, "chat", "--model", model, "--max-tokens", "50000", "--decoding", "autoregressive", *FAST]
    process = start(command, bufsize=1)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("abc abc abc\n")
    process.stdout.read(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate("/set max_tokens 2\nx\n", timeout=20)
    assert process.returncode == 0, err
    assert "stopped; autoregressive: " in err
    assert "autoregressive: 2 tokens / 2 forwards = 1.00" in err
