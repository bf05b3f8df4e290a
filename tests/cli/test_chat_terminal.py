# SPDX-License-Identifier: Apache-2.0
"""``wedlm chat`` in a terminal: pastes, keys that are typed meanwhile, Ctrl-C, history, words."""

import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import FAST, WEDLM, expected
from tests.cli.pty_session import Terminal, terminal
from tests.engine.tiny_llm import save_tiny
from wedlm.cli import terminal as shared
from wedlm.cli.line_input import _MOST, _shorten

DONE = r"tokens / \d+ forwards"
PROMPT = r"\n>"


def chat(model: str, *words: str) -> list[str]:
    return [*WEDLM, "chat", "--model", model, "--max-tokens", "6", "--temperature", "0", *FAST, *words]


@pytest.fixture
def talk(model: str, tmp_path: Path) -> Iterator[Terminal]:
    with terminal(chat(model), XDG_STATE_HOME=str(tmp_path)) as one:
        one.wait_for(PROMPT)
        yield one


def answer(model: str, text: str) -> str:
    """As it is shown, without spaces: words wrap."""
    return "".join(expected(model, text, chat=True, max_tokens=6, temperature=0).split())


@pytest.mark.long
def test_a_paste_is_one_message(model, talk):
    talk.type("see: \x1b[200~first line\nsecond line\x1b[201~")
    talk.wait_for("second line")
    assert DONE not in talk.shown
    talk.type("\r")
    end = talk.wait_for(DONE)
    assert answer(model, "see: first line\nsecond line") in "".join(talk.shown[:end].split())
    talk.type("/exit\r")
    assert talk.process.wait(60) == 0
    assert talk.shown.count(" forwards = ") == 1


@pytest.mark.long
def test_alt_enter_begins_a_line(model, talk):
    talk.type("one\x1b\rtwo\r")
    end = talk.wait_for(DONE)
    assert answer(model, "one\ntwo") in "".join(talk.shown[:end].split())


@pytest.mark.long
def test_keys_typed_during_an_answer_do_not_show(tmp_path):
    """They wait for the prompt. Ctrl-C stops the answer as ever, and the terminal drops what was typed before it."""
    model = str(save_tiny(tmp_path / "long", max_position_embeddings=60000))
    words = ["--max-tokens", "50000", "--decoding", "autoregressive", *FAST]
    with terminal([*WEDLM, "chat", "--no-history", "--model", model, *words]) as talk:
        talk.wait_for(PROMPT)
        talk.type("abc abc abc\r")
        start = talk.wait_for(r"abc abc abc\s+\S")
        talk.type("zqzqzq")
        talk.wait_for(r"(?s).{80}", len(talk.shown))
        talk.type("\x03")
        stopped = talk.wait_for("stopped; autoregressive: ", start)
        assert "zqzqzq" not in talk.shown[start:stopped]
        assert "^C" not in talk.shown[start:stopped]
        talk.wait_for(PROMPT, stopped)
        talk.type("/set ignore_eos true\r/set max_tokens 150\r")
        end = talk.wait_for("max_tokens = 150", stopped)
        talk.wait_for(PROMPT, end)
        talk.type("abc\r")
        start = talk.wait_for(r"(?s)abc\s+\S.{20}", end)
        talk.type("zqzqzq")
        end = talk.wait_for("autoregressive: 150 tokens", start)
        assert "zqzqzq" not in talk.shown[start:end]
        talk.wait_for(r">[\s\x08]*zqzqzq", end)


def test_ctrl_c_warns_before_it_leaves(talk):
    talk.type("half a line\x03")
    talk.type("\x03")
    warned = talk.wait_for("To leave, press Ctrl-C again")
    talk.type("/stats\r")
    talk.wait_for("There is no answer yet.", warned)
    talk.type("\x03")
    talk.wait_for("To leave, press Ctrl-C again", warned)
    assert talk.process.poll() is None
    talk.type("\x03")
    assert talk.process.wait(60) == 0


@pytest.mark.long
def test_ctrl_d_leaves(talk):
    talk.type("\x04")
    assert talk.process.wait(60) == 0


@pytest.mark.long
def test_history(model, tmp_path):
    """The arrow brings earlier messages back, also of an earlier conversation; the file is its owner's."""
    file = tmp_path / "wedlm" / "chat_history"
    with terminal(chat(model), XDG_STATE_HOME=str(tmp_path)) as talk:
        talk.wait_for(PROMPT)
        talk.type("remember\r")
        end = talk.wait_for(DONE)
        talk.wait_for(PROMPT, end)
        talk.type("\x1b[A\r")
        talk.wait_for(DONE, end)
        talk.type("/exit\r")
        talk.process.wait(60)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with terminal(chat(model), XDG_STATE_HOME=str(tmp_path)) as talk:
        talk.wait_for(PROMPT)
        talk.type("\x1b[A\x1b[A\r")
        end = talk.wait_for(DONE)
        assert answer(model, "remember") in "".join(talk.shown[:end].split())
    before = file.read_bytes()
    with terminal(chat(model, "--no-history"), XDG_STATE_HOME=str(tmp_path)) as talk:
        talk.wait_for(PROMPT)
        talk.type("secret\r")
        talk.wait_for(DONE)
    assert file.read_bytes() == before


@pytest.mark.long
def test_a_history_that_cannot_be_kept_is_said(model, tmp_path):
    (tmp_path / "wedlm").write_text("a file where the folder would be")
    with terminal(chat(model), columns=200, XDG_STATE_HOME=str(tmp_path)) as talk:
        talk.wait_for("Messages are kept for this conversation alone: .* cannot be written")
        talk.wait_for(PROMPT)
        talk.type("x\r")
        talk.wait_for(DONE)


def test_the_history_has_a_bound(tmp_path):
    from prompt_toolkit.history import FileHistory

    file = tmp_path / "history"
    history = FileHistory(file)
    for number in range(_MOST + 5):
        history.store_string(f"{number}\nof several lines")
    _shorten(file)
    newest_first = list(FileHistory(file).load_history_strings())
    assert len(newest_first) == _MOST
    assert newest_first[0].startswith(f"{_MOST + 4}\n")
    assert newest_first[-1].startswith("5\n")


def shown_on(monkeypatch, capsys, width: int, pieces: list[str]) -> str:
    monkeypatch.setattr(type(shared.out), "is_terminal", True)
    monkeypatch.setattr(type(shared.out), "width", width)
    text = shared.WrappedText()
    for piece in pieces:
        text.write(piece)
    text.end()
    return capsys.readouterr().out


def test_a_word_without_end_shows_as_it_comes(monkeypatch, capsys):
    monkeypatch.setattr(type(shared.out), "is_terminal", True)
    monkeypatch.setattr(type(shared.out), "width", 10)
    text = shared.WrappedText()
    text.write("a ")
    for count in range(1, 28):
        text.write("x")
        shown = capsys.readouterr().out
        assert shown == {1: "a", 11: "\n" + "x" * 11}.get(count, "x" if count > 11 else "")
    text.write(" b")
    text.end()
    assert capsys.readouterr().out == " b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three four", "one two\nthree four"),
        ("one two thr four", "one two\nthr four"),
        ("exactly10! next", "exactly10!\nnext"),
        ("a word_longer_than_a_line b", "a\nword_longer_than_a_line b"),
        ("    if x:\n        y", "    if x:\n        y"),
        ("kept\n\n  kept", "kept\n\n  kept"),
        ("\u65e5\u672c\u8a9e\u306e\u6587\u7ae0", "\u65e5\u672c\u8a9e\u306e\u6587\n\u7ae0"),
        ("a\x1b[2Jb\tc", "a[2Jb    c"),
    ],
)
def test_words_wrap(monkeypatch, capsys, text, shown):
    for size in (1, 2, 5, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert shown_on(monkeypatch, capsys, 10, pieces) == shown


def test_no_word_is_cut(monkeypatch, capsys):
    """Random texts in random pieces: every word is whole, no line too long, nothing is lost."""
    generator = random.Random(1)
    for _ in range(300):
        words = ["".join(generator.choices("abc.\u00e9\u2026", k=generator.randint(1, 9))) for _ in range(40)]
        text = "".join(word + generator.choice((" ", "  ", "\n", "\n\n")) for word in words)
        width, pieces = generator.randint(9, 30), []
        while rest := text[sum(map(len, pieces)) :]:
            pieces.append(rest[: generator.randint(1, 12)])
        lines = shown_on(monkeypatch, capsys, width, pieces).split("\n")
        assert max(map(len, lines)) <= width
        assert " ".join(lines).split() == words


def test_a_file_gets_exactly_the_text(monkeypatch, capsys):
    monkeypatch.setattr(type(shared.out), "is_terminal", False)
    text = shared.WrappedText()
    for piece in ("a  long", " \tline\n  of ", "words"):
        text.write(piece)
    text.end()
    assert capsys.readouterr().out == "a  long \tline\n  of words"
