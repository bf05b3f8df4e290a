# SPDX-License-Identifier: Apache-2.0
"""Text while it arrives: whole characters, nothing taken back, stop strings wherever token borders fall."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from tests.engine.searching_text import SearchingText
from wedlm.engine.text import TextStream
from wedlm.model import Tokenizer, load_tokenizer

REPLACEMENT = "\ufffd"
CORPUS = [
    "the cat sat on the mat",
    "naïve café 你好 世界 🙂🙃 “quoted” … – —",
    "e\u0301 İ ﷽ 👩‍👩‍👧 🇩🇪",
    "aaab abab\n\n",
]
# Weighted towards what breaks: several bytes a character, combining marks, joined emoji, and what the corpus merged.
TEXTS = st.text(max_size=25) | st.text(st.sampled_from("ab é你🙂\u0301\u200d👩🇩“…\n"), max_size=40)


def byte_level_tokenizer() -> Tokenizer:
    """All 256 bytes, merges that cut characters in two, and a special token."""
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    return Tokenizer(backend)


BYTE_LEVEL = byte_level_tokenizer()


class Pieces:
    """Token i is the i-th of the given byte strings: any token borders that a test wants."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")


@st.composite
def cut_texts(draw: st.DrawFn, alphabet: str = "ab🙂é") -> tuple[str, list[bytes]]:
    """A text and its bytes cut into tokens anywhere, empty tokens included."""
    text = draw(st.text(st.sampled_from(alphabet), max_size=12))
    raw = text.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    return text, [raw[i:j] for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


def stream(tokenizer, ids: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0) -> tuple[str, bool]:
    """(final text, whether a stop string ended it), as the engine drives it; what is stable is checked on the way."""
    text = TextStream(tokenizer, stop)
    shown, stopped = "", False
    for count, token in enumerate(ids, start=1):
        stopped = text.push(token, may_stop=count >= min_tokens)
        if stopped:  # the text is final: all of it may be shown
            break
        stable = text.text[: text.stable]
        assert stable.startswith(shown), "stable text was taken back"
        shown = stable
    if not stopped:
        text.finish()
    assert text.text.startswith(shown), "stable text was taken back"
    return text.text, stopped


def first_stop(text: str, stop: tuple[str, ...]) -> str:
    """The text that a reader watching character by character keeps: up to the first stop string to be complete."""
    for end in range(len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    arriving = TextStream(tokenizer)
    for token in ids:
        arriving.push(token)
        assert text.startswith(arriving.text[: arriving.stable])
        if REPLACEMENT not in text:
            assert REPLACEMENT not in arriving.text
    arriving.finish()
    assert arriving.text == tokenizer.decode(ids) == text
    arriving.finish()
    assert arriving.text == text, "finish is not idempotent"


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_text_arrives_whole(text):
    check_round_trip(BYTE_LEVEL, text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 3), max_size=25))
def test_any_ids_decode_as_at_once(ids):
    """Invalid bytes, special tokens between the bytes of a character, and ids that have no token."""
    assert stream(BYTE_LEVEL, ids) == (BYTE_LEVEL.decode(ids), False)


def test_merges_cut_characters():
    """Otherwise the two tests above would show nothing."""
    ids = BYTE_LEVEL.encode("🙂🇩🇪“…👩", add_special_tokens=False)
    assert any(BYTE_LEVEL.decode([i]).startswith(REPLACEMENT) for i in ids)
    assert any(len(BYTE_LEVEL.decode([i])) > 1 for i in range(BYTE_LEVEL.vocab_size))


@pytest.mark.demo_model
def test_demo_tokenizer():
    tokenizer = load_tokenizer("demo")

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def round_trip(text: str) -> None:
        # Its vocabulary lacks the bytes F1 to F4 and drops them.
        assume(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text)
        check_round_trip(tokenizer, text)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=25))
    def any_ids(ids: list[int]) -> None:
        assert stream(tokenizer, ids) == (tokenizer.decode(ids), False)

    round_trip()
    any_ids()


def test_unfinished_character_becomes_a_replacement_at_the_end_only():
    tokenizer = Pieces([b"a", b"\xf0\x9f", b"\x99"])
    text = TextStream(tokenizer)
    for token in range(3):
        text.push(token)
        assert text.text == "a"
    text.finish()
    assert text.text == "a\ufffd"


STOPS = st.lists(st.text(st.sampled_from("ab🙂é"), min_size=1, max_size=4), max_size=4).map(tuple)


@pytest.mark.parametrize("examples", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_stop_strings_wherever_tokens_end(examples):
    """The text depends on its characters only, never on token borders, and nothing of a stop string was shown."""

    @settings(max_examples=examples, deadline=None)
    @given(cut_texts(), STOPS)
    def check(cut, stop):
        text, pieces = cut
        expected = first_stop(text, stop)
        assert stream(Pieces(pieces), list(range(len(pieces))), stop) == (expected, expected != text)

    check()


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(0, 8), st.integers(1, 3))
def test_stop_strings_of_a_byte_level_tokenizer(text, start, size):
    stop = (text[start : start + size] or "a", "zz")
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    expected = first_stop(text, stop)
    assert stream(BYTE_LEVEL, ids, stop) == (expected, expected != text)


@pytest.mark.parametrize("examples", [300, pytest.param(3000, marks=pytest.mark.long)])
def test_stop_strings_are_what_searching_finds(examples):
    """Token by token: text, what may be shown of it, and where it ended; bytes without a character included."""
    settings(max_examples=examples, deadline=None)(
        given(cut_texts("ab🙂é\ufffd"), STOPS, st.integers(0, 6))(check_against_searching)
    )()


def check_against_searching(cut, stop, min_tokens):
    _, pieces = cut
    fast, slow = TextStream(Pieces(pieces), stop), SearchingText(Pieces(pieces), stop)
    for count in range(len(pieces)):
        stopped = [one.push(count, may_stop=count + 1 >= min_tokens) for one in (fast, slow)]
        assert (fast.text, fast.ends, stopped[0]) == (slow.text, slow.ends, stopped[1])
        if stopped[0]:
            return
        assert fast.stable == slow.stable
    fast.finish()
    slow.finish()
    assert (fast.text, fast.stable) == (slow.text, slow.stable)


@settings(max_examples=300, deadline=None)
@given(cut_texts("ab🙂é"), STOPS)
def test_a_stop_string_may_stay(cut, stop):
    """The text is then the same and one of the strings, and what was shown of it before stays true."""
    _, pieces = cut
    kept, cut_off = TextStream(Pieces(pieces), stop, keep_stop=True), TextStream(Pieces(pieces), stop)
    shown = ""
    for count in range(len(pieces)):
        stopped = [one.push(count) for one in (kept, cut_off)]
        assert kept.text.startswith(shown)
        if stopped[0]:
            assert stopped[1]
            assert kept.text.removeprefix(cut_off.text) in stop
            return
        assert (kept.text, kept.stable) == (cut_off.text, cut_off.stable)
        shown = kept.text[: kept.stable]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab"), max_size=60), st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=12)))
def test_long_stop_strings_of_few_letters(text, stop):
    """Where beginnings overlap most, a character a token, and no stop counts: all that could be held back is met."""
    pieces = [character.encode() for character in text]
    fast, slow = TextStream(Pieces(pieces), stop), SearchingText(Pieces(pieces), stop)
    for token in range(len(pieces)):
        assert not fast.push(token, may_stop=False)
        slow.push(token, may_stop=False)
        assert fast.stable == slow.stable
    fast, slow = TextStream(Pieces([text.encode()]), stop), SearchingText(Pieces([text.encode()]), stop)
    assert (fast.push(0), fast.text) == (slow.push(0), slow.text)


def test_near_matches_cost_each_character_once():
    """16 stop strings of 250 characters that nearly come: no more work than one that begins otherwise."""
    stop = tuple("a" * 240 + letter * 10 for letter in "bcdefghijklmnopq")
    steps = 0
    text = TextStream(Pieces([b"aaaa"]), stop)
    assert text._stop is not None
    real = text._stop.after

    class Counted:
        begun, complete = text._stop.begun, text._stop.complete

        def after(self, state: int, character: str) -> int:
            nonlocal steps
            steps += 1
            return real(state, character)

    text._stop = Counted()
    for _ in range(1000):
        assert not text.push(0)
    assert steps == 4000
    assert text.stable == 4000 - 240


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["a", "a", "a", "b", "x"], ("aab",), "a"),  # a restart inside a failed match
        (["Hello", " ST", "OP", " more"], ("STOP",), "Hello "),
        (["Hello STOP more"], ("STOP",), "Hello "),  # begins and ends inside one token
        (["x END y STOP"], ("STOP", "END"), "x "),  # the order of the list does not matter
        (["abcd"], ("abcd", "c"), "ab"),  # c is complete before abcd, ...
        (["ab", "cd"], ("abcd", "c"), "ab"),  # ... wherever the token ends
        (["xab"], ("b", "ab"), "x"),  # complete together: the longer one goes
        (["STO", "NE"], ("STOP",), "STONE"),
        (["a", "STO"], ("STOP",), "aSTO"),  # the end came before the stop string was complete
        (["ST", "", "OP"], ("STOP",), ""),  # a token without text between
    ],
)
def test_stop_string_cases(pieces, stop, expected):
    encoded = [piece.encode() for piece in pieces]
    assert stream(Pieces(encoded), list(range(len(pieces))), stop)[0] == expected


def test_a_possible_beginning_is_held_back_and_let_go():
    text = TextStream(Pieces([b"x", b"S", b"T", b"A", b"ST"]), ("STOP", "TAX"))
    shown = []
    for token in range(5):
        text.push(token)
        shown.append(text.text[: text.stable])
    assert shown == ["x", "x", "x", "xS", "xSTA"]  # after "xSTA", TA may begin TAX; after "xSTAST", ST may begin STOP


def test_stop_string_before_an_unfinished_character():
    """A token may end a stop string and begin a character: the stop must not wait for a token that may never come."""
    text = TextStream(Pieces([b"ok STOP\xe2"]), ("STOP",))
    assert text.push(0)
    assert text.text == "ok "


@pytest.mark.parametrize(
    ("min_tokens", "expected", "stopped"),
    [
        (0, "a", True),
        (3, "a", True),  # complete with the last token that must be there: exactly min_tokens tokens
        (4, "aENDb", True),  # the first END is protected and stays for good
        (5, "aENDb", True),  # the second begins where it is protected and ends where it is not
        (6, "aENDbENDc", False),
    ],
)
def test_min_tokens(min_tokens, expected, stopped):
    """A stop string that is complete before min_tokens tokens is part of the text and is never matched later."""
    pieces = Pieces([b"a", b"EN", b"D", b"bEN", b"D", b"c"])
    assert stream(pieces, list(range(6)), ("END",), min_tokens) == (expected, stopped)


def sentencepiece_like(pieces: list[str]) -> Backend:
    """Tokens as in Llama 2: "▁" for a space, bytes as <0xE2>, and the text's first space dropped."""
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Backend(BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["▁", "▁the", "cat", "s", "🙂", "é", "\n"]), max_size=12), st.data())
def test_spaces_and_bytes_of_a_sentencepiece_tokenizer(words, data):
    """The space before a word hangs on its left neighbour; a character may come as several byte tokens."""
    pieces: list[str] = []
    for word in words:
        as_bytes = data.draw(st.booleans()) and not word.startswith("▁")
        pieces += [f"<0x{byte:02X}>" for byte in word.encode()] if as_bytes else [word]
    backend = sentencepiece_like(pieces)
    ids = [backend.token_to_id(piece) for piece in pieces]
    assert stream(backend, ids) == (backend.decode(ids), False)
    assert backend.decode(ids) == "".join(words).replace("▁", " ").removeprefix(" ")


def sentencepiece_tokenizer() -> Tokenizer:
    """Words that begin with U+2581, as SentencePiece's models have them."""
    vocab = {"<unk>": 0, "\u2581is": 1, "\u2581Par": 2, "is": 3, "<0xE2>": 4, "</s>": 5}
    backend = Backend(BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend)


@pytest.mark.parametrize(("prompt", "text"), [([1], " Paris"), ([1, 2, 3], " Paris"), ([5], "Paris"), ([], "Paris")])
def test_the_space_between_a_prompt_and_its_text_is_the_texts(prompt, text):
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.drops_first_space
    assert not BYTE_LEVEL.drops_first_space
    arriving = TextStream(tokenizer, (), prompt[-1:])
    for token in (2, 3):
        arriving.push(token)
    assert arriving.text == text


def test_special_tokens_are_found_by_their_text():
    assert BYTE_LEVEL.special_token_id("<|end|>") == BYTE_LEVEL.token_id("<|end|>")
    assert BYTE_LEVEL.special_token_id("a") is None
    assert BYTE_LEVEL.special_token_id("no such token") is None
