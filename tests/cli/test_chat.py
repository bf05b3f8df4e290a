# SPDX-License-Identifier: Apache-2.0
"""``wedlm chat`` through a pipe, ``wedlm demo``, and what terminals are shown."""

import os

import pytest
from typer.testing import Result

from tests.cli.command import FAST, expected, wedlm
from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, GenerationOutput, SamplingParams, machine
from wedlm.cli import demo, terminal


def chat(model: str, *lines: str, options: tuple[str, ...] = ()) -> Result:
    stdin = "".join(f"{line}\n" for line in lines)
    return wedlm("chat", "--model", model, "--max-tokens", "6", *FAST, *options, stdin=stdin)


def test_chat_remembers_and_clears(model):
    llm = LLM(model, device="cpu")
    messages: list[dict[str, str]] = [{"role": "system", "content": "s"}]
    wanted = []
    for question in ("Hello", "abc"):
        messages.append({"role": "user", "content": question})
        wanted.append(llm.chat(messages, SamplingParams(max_tokens=6))[0].text)
        messages.append({"role": "assistant", "content": wanted[-1]})
    result = chat(model, "Hello", "abc", "/clear", "Hello", "/exit", "never read", options=("--system", "s"))
    assert result.exit_code == 0
    assert result.stdout == "".join(text if text.endswith("\n") else f"{text}\n" for text in (*wanted, wanted[0]))
    assert "The conversation is empty." in result.stderr


def test_chat_commands(model):
    lines = ["/stats", "/help", "/set decoding verified", "/set entropy-threshold none", "/set temperature 0.7"]
    lines += [
        "/set next-token causal",
        "/set seed 3",
        "Hello",
        "/stats",
        "/set",
        "/set temperature hot",
        "/set colour red",
        "/set seed",
        "/no",
    ]
    result = chat(model, *lines)
    assert result.exit_code == 0
    wanted = SamplingParams(decoding="verified", temperature=0.7, seed=3, max_tokens=6)
    llm = LLM(model, device="cpu")
    (output,) = llm.chat([{"role": "user", "content": "Hello"}], wanted)
    assert result.stdout.rstrip("\n") == output.text.rstrip("\n")
    for line in (
        "There is no answer yet.",
        "/set NAME VALUE",
        "decoding = verified",
        "entropy_threshold = none",
        "temperature = 0.7",
        "next_token = causal",
        "error: temperature is 'hot'; expected a number, true, false or none",
        "error: colour is not an option; expected one of",
        "error: '/set seed' gives no value",
        "error: /no is not a command; /help lists the commands",
    ):
        assert line in result.stderr
    assert result.stderr.count("verified: 6 tokens") == 2


def test_chat_outlives_an_impossible_question(model):
    result = chat(model, "long " * 60, "Hello")
    assert "/clear begins a new one" in result.stderr
    assert result.exit_code == 0
    assert result.stdout.rstrip("\n") == expected(model, "Hello", chat=True, max_tokens=6).rstrip("\n")


def test_chat_refuses_what_is_no_text(model, monkeypatch):
    lines = iter(["bad \udcff", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    result = chat(model)
    assert result.exit_code == 0
    assert "error: the line is not valid UTF-8" in result.stderr


def test_chat_needs_a_template(ar_model):
    result = chat(ar_model, "Hello")
    assert result.exit_code == 2
    assert "has no chat template; expected an instruct model" in result.stderr


def test_terminals_get_no_control_characters(monkeypatch, capsys):
    monkeypatch.setattr(type(terminal.out), "is_terminal", True)
    terminal.write("a\x1b[2J\tb\n")
    assert capsys.readouterr().out == "a[2J\tb\n"
    monkeypatch.setattr(type(terminal.out), "is_terminal", False)
    terminal.write("a\x1b\r\tb\n", style="red")
    assert capsys.readouterr().out == "a\x1b\r\tb\n", "a file gets exactly the text"


@pytest.mark.parametrize("colours", [True, False])
def test_forwards_can_be_told_apart(monkeypatch, colours):
    monkeypatch.setattr(terminal, "has_colours", lambda: colours)
    text = terminal.by_step([("a b", 0), ("c", 1), ("d", 1), ("e", 7)])
    assert text.plain == ("a bcde" if colours else "a b|cd|e")
    styles = [text.get_style_at_offset(terminal.out, text.plain.index(letter)) for letter in "acde"]
    assert len({str(style) for style in styles}) == 2, "c, d and e: forward 7 has the colour of forward 1"


@pytest.mark.long
@pytest.mark.parametrize("adapted", [True, False])
def test_demo_says_which_checkpoint_it_is(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PROMPTS", ("Hello", "abc"))
    model = str(save_tiny(tmp_path, **({"block_size": 16} if adapted else {"model_type": "qwen3"})))
    result = wedlm("demo", "--model", model, *FAST)
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert ("(adapted to WeDLM)" in text) == adapted
    assert ("This is the original AR checkpoint" in text) == (not adapted)
    assert "are verified decoding's" in text
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[-1:] in (["yes"], ["no"])]
    assert [row[0] for row in rows] == ["autoregressive", "verified", "auto", "streaming"] * 2
    assert all(row[-1] == "yes" for row in rows if row[0] != "streaming"), "float32: verified is AR's text"
    together = result.stdout.split("All prompts together")[1].splitlines()[2:6]
    assert [line.split()[0] for line in together] == list(demo.MODES)
    assert together[0].split()[2] == "1.00"
    assert all(line.endswith("2 of 2") for line in map(str.rstrip, together[:3]))
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "Peak memory" in result.stderr


@pytest.mark.long
def test_demo_shows_medians_of_runs_in_turn(model, monkeypatch):
    asked = []

    class Watched:
        def __init__(self, llm):
            self.generate_stream = llm.generate_stream
            self.generate = lambda ids, params: [asked.append(params.decoding), *llm.generate(ids, params)][1:]

    llm = LLM(model, device="cpu")
    found = demo._ask(Watched(llm), llm.chat_prompt([{"role": "user", "content": "Hello"}]))
    assert asked == list(demo.MODES) * demo.RUNS
    asked.clear()
    monkeypatch.setattr(demo, "ENOUGH_S", 0.0)
    demo._ask(Watched(llm), llm.chat_prompt([{"role": "user", "content": "Hello"}]))
    assert asked == list(demo.MODES), "a slow machine makes one run"
    found["auto"].seconds = [0.1, 9.0, 0.2, 0.3, 0.1]
    assert found["auto"].median_s == 0.2


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (500.0, True)])
def test_a_busy_machine_is_said(monkeypatch, load, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert ("busy (load average 500.0" in (machine.busy_notice() or "")) == said


def test_demo_measures_the_tie_that_it_blames():
    def output(tokens: list[int], gap: float) -> GenerationOutput:
        top = [[(0, -0.5), (1, -0.5 - gap)] for _ in tokens]
        return GenerationOutput("", tokens, None, "length", top_logprobs=top)

    assert demo._gap(output([1, 2, 3], 0.25), output([1, 9, 3], 0)) == [0.25]
    assert demo._gap(output([1, 2], 0.25), output([1, 2], 0)) == []
