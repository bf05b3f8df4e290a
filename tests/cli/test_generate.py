# SPDX-License-Identifier: Apache-2.0
"""``wedlm generate`` as a user meets it: what goes to standard output and error, and exit codes."""

import json
import re

import pytest

from tests.cli.command import expected, generate, records, wedlm
from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, SamplingParams


def said(result) -> str:
    """What standard error says after the line about the engine."""
    first, _, rest = result.stderr.partition("\n")
    assert first.startswith("cpu; weights: float32; activations: float32; cache: float32, ")
    return rest


def test_an_answer_goes_to_stdout_and_its_figures_to_stderr(model):
    result = generate(model, "Hello", "--max-tokens", "8")
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == expected(model, "Hello", chat=True, max_tokens=8)
    assert re.fullmatch(r"auto: 8 tokens / \d+ forwards = \d\.\d\d, p_cache 0\.\d\d, \d+ tok/s\n", said(result))


@pytest.mark.parametrize(("options", "chat"), [(["--chat"], True), (["--raw"], False), ([], True)])
def test_chat_and_raw(model, options, chat):
    (record,) = records(generate(model, "Hello", "--json", "--max-tokens", "8", *options))
    assert record["text"] == expected(model, "Hello", chat, max_tokens=8)


def test_a_checkpoint_that_sees_by_blocks(tmp_path):
    model = save_tiny(tmp_path, model_type="sdar", block_size=4, decoding=None)
    (record,) = records(generate(model, "Hello", "--json", "--max-tokens", "8"))
    assert record["stats"]["decoding"] == "block"
    static = ("--remasking-strategy", "low_confidence_static", "--denoising-steps", "1", "--block-length", "8")
    (record,) = records(generate(model, "Hello", "--json", "--max-tokens", "8", *static))
    assert record["stats"]["num_forwards"] <= 2
    result = generate(model, "Hello", "--decoding", "autoregressive")
    assert result.exit_code == 2
    assert "decoding is 'autoregressive' and the model sees by blocks of 4" in " ".join(result.stderr.split())


def test_without_a_template(ar_model):
    (record,) = records(generate(ar_model, "Hello", "--json", "--max-tokens", "8"))
    assert record["text"] == expected(ar_model, "Hello", chat=False, max_tokens=8)
    assert record["stats"]["decoding"] == "auto"
    result = generate(ar_model, "Hello", "--chat")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr


def test_a_gap_is_filled(model):
    words = ("The quick", "--suffix", " fox", "--json", "--ignore-eos")
    (record,) = records(generate(model, *words, "--gap", "5"))
    llm = LLM(model, device="cpu")
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    assert record["text"] == llm.infill("The quick", " fox", params)[0].text
    assert record["stats"]["decoding"] == "streaming"
    (record,) = records(generate(model, *words))
    assert len(record["token_ids"]) == 16
    result = generate(model, *words, "--chat")
    assert result.exit_code == 2
    assert "--suffix and --chat are both set; expected one of them" in result.stderr


def test_json_record(model):
    (record,) = records(
        generate(model, "Hello", "--json", "--max-tokens", "4", "--logprobs", "2", "--decoding", "block")
    )
    assert {"prompt", "text", "token_ids", "finish_reason", "stats", "logprobs", "top_logprobs"} <= set(record)
    assert record["prompt"] == "Hello"
    assert record["finish_reason"] == "length"
    assert len(record["token_ids"]) == len(record["logprobs"]) == record["stats"]["num_tokens"] == 4
    assert record["stats"]["decoding"] == "block"
    assert "error" not in record


@pytest.mark.parametrize("how", ["stdin", "dash", "file"])
def test_prompt_sources(model, how, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("\ufeffnaïve\r\nsecond line\r\n".encode())
    data = (tmp_path / "prompt.txt").read_bytes()
    words = {"stdin": [], "dash": ["--file", "-"], "file": ["--file", str(tmp_path / "prompt.txt")]}[how]
    (record,) = records(generate(model, "--json", "--max-tokens", "2", *words, stdin=data))
    assert record["prompt"] == "naïve\nsecond line"


def test_lines_are_decoded_together_and_come_in_order(model):
    stdin = "Hello\n\nabc\u2028abc\nx\n"
    found = records(generate(model, "--lines", "--json", "--max-tokens", "9", "--max-num-seqs", "2", stdin=stdin))
    assert [record["prompt"] for record in found] == ["Hello", "abc\u2028abc", "x"]
    for record in found:
        assert record["text"] == expected(model, record["prompt"], chat=True, max_tokens=9)
    result = generate(model, "--lines", "--max-tokens", "3", stdin=stdin)
    assert result.stdout.startswith("> Hello\n")
    assert "3 prompts, 9 tokens" in result.stderr
    assert "p_cache" in result.stderr


def test_a_refused_line_leaves_the_others(model):
    result = generate(model, "--lines", "--json", "--max-tokens", "3", stdin="Hello\n" + "long " * 60 + "\nx\n")
    assert result.exit_code == 1
    first, second, third = (json.loads(line) for line in result.stdout.splitlines())
    assert first["finish_reason"] == third["finish_reason"] == "length"
    assert second["finish_reason"] == "error"
    assert "expected at most 127" in second["error"]
    assert said(result).startswith("warning: prompt 1 was refused: the prompt has")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--temperature", "-1"], "temperature is -1.0; expected a number >= 0"),
        (["x", "--entropy-threshold", "low"], "entropy_threshold is 'low'; expected a number >= 0, none or auto"),
        (["x", "--decoding", "magic"], "decoding is 'magic'; expected one of auto, streaming, verified"),
        (["x", "--threads", "0"], "threads is 0; expected at least 1"),
        (["x", "--dtype", "int4"], "dtype is 'int4'; expected auto"),
        (["x", "--quantization", "int4"], "quantization is 'int4'; expected one of auto, none, int8, fp8"),
        (["x", "--device", "toaster"], "device is 'toaster', which torch cannot use here"),
        (["x", "--model", "./absent"], "absent does not exist; expected a checkpoint"),
        (["x", "--file", "y"], "both a prompt and --file are given"),
        (["--file", "absent.txt"], "--file is absent.txt, where there is no file"),
        ([], "the prompt is empty"),
        (["bad \udcff"], "the prompt is not valid UTF-8"),
        (["long " * 60], "expected at most 127"),
    ],
)
def test_errors_are_one_sentence(model, words, message):
    result = generate(model, *words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    sentence = said(result) if result.stderr.startswith("cpu; ") else result.stderr
    assert sentence.startswith("error: ")
    assert message in sentence
    assert sentence.count("\n") == 1


def test_undecodable_input_is_an_error(model):
    result = generate(model, stdin=b"ab\xff")
    assert (result.exit_code, result.stderr.strip()) == (
        2,
        "error: standard input is not valid UTF-8 at byte 2; expected text in that encoding",
    )


def test_the_demo_models_absence_is_one_sentence(monkeypatch):
    monkeypatch.setenv("WEDLM_DEMO_GGUF", "absent.gguf")
    result = wedlm("generate", "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: WEDLM_DEMO_GGUF is 'absent.gguf', where there is no file")


def test_debug_shows_the_traceback(model):
    result = generate(model, "x", "--temperature", "-1", "--debug")
    assert isinstance(result.exception, ValueError)


def test_a_bug_of_ours_keeps_its_traceback(model, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("internal")

    monkeypatch.setattr("wedlm.cli.generate.run_generate", broken)
    assert isinstance(generate(model, "x").exception, RuntimeError)


def test_warnings_are_one_line(tmp_path):
    model = str(save_tiny(tmp_path, block_size=4))
    result = generate(model, "--lines", "--json", "--max-tokens", "2", "--decoding", "streaming", stdin="a\nb\n")
    assert result.exit_code == 0
    assert [line[:40] for line in said(result).splitlines()] == ["warning: the window of 16 is wider than "]


@pytest.mark.demo_model
def test_generate_with_the_demo_model():
    options = ["--json", "--max-tokens", "8", "--decoding", "autoregressive", "--threads", "1"]
    (record,) = records(wedlm("generate", "What is the capital of France?", *options))
    assert "Paris" in record["text"]
    assert record["stats"]["tokens_per_forward"] == record["stats"]["p_cache"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "spark", "--file", "f", "--output", "o"], "--workers is 'spark'; expected ray"),
        (["--workers", "ray", "--file", "f"], "--output is missing beside --workers; expected a file"),
        (["--workers", "ray", "--output", "o"], "--file is missing beside --workers; expected a file"),
        (["--workers", "ray", "--file", "f", "--output", "o", "--num-workers", "0"], "--num-workers is 0; expected at"),
        (["--workers", "ray", "--file", "f", "--output", "o", "--suffix", "x"], "--suffix is set beside --workers"),
        (["--output", "o"], "--output is set without --workers; expected --workers ray beside it"),
        (["--num-workers", "2"], "--num-workers is set without --workers"),
    ],
)
def test_batch_options_that_cannot_be(words, message):
    result = wedlm("generate", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
