# SPDX-License-Identifier: Apache-2.0
"""Reading training files: every form that is taken, every fault that is named."""

import gzip
import json
import lzma
import re
from collections import Counter

import pytest

from tests.train.chat_data import chat, write_lines
from wedlm.train.sources import Sample, SampleError, in_batches, read_samples

GOOD = chat("q", "a")


def read(path, skip_bad=False, refused=None):
    return list(read_samples(path, skip_bad=skip_bad, refused=refused))


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.xz"])
def test_three_forms_in_three_packings(tmp_path, name):
    extra = {"messages": chat("hé", "ho", system=""), "id": 7}
    path = write_lines(tmp_path / name, GOOD, "", "   ", extra, {"text": "two\nlines 🙂\u2028", "source": "s"})
    first, second, third = read(path)
    assert first.messages == tuple(GOOD)
    assert (first.text, first.line, first.origin) == (None, 1, f"{path}:1")
    assert second.messages == tuple(extra["messages"])
    assert second.line == 4
    assert (third.text, third.messages, third.line) == ("two\nlines 🙂\u2028", None, 5)


def test_messages_keep_role_and_content_alone(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", [{**message, "weight": 1} for message in GOOD])
    assert read(path)[0].messages == tuple(GOOD)


def test_windows_line_ends_and_no_last_line_feed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode())
    assert [sample.line for sample in read(path)] == [1, 3]


BAD = [
    (b"{", "not JSON", "not valid JSON"),
    (b"\xef\xbb\xbf[]", "not JSON", "BOM"),
    (b"[" * 100_000, "not JSON", "not valid JSON"),
    (b'{"text": "\xff"}', "not UTF-8", "byte 11 is not UTF-8"),
    (3, "wrong type", "a JSON number"),
    ("null", "wrong type", "a JSON null"),
    ("true", "wrong type", "a JSON boolean"),
    ('"text"', "wrong type", "a JSON string"),
    ({}, "wrong keys", "its keys are none"),
    ({"prompt": "x"}, "wrong keys", "its keys are 'prompt'"),
    ({"text": "x", "messages": GOOD}, "wrong keys", "expected one of 'messages' and 'text'"),
    ({"text": 3}, "wrong type", "'text' is a JSON number; expected a string"),
    ({"text": " \n"}, "empty", "'text' is empty"),
    ({"text": "a\ud800b"}, "lone surrogate", r"'text' has half a surrogate pair (\ud800)"),
    ({"messages": {"role": "user"}}, "wrong type", "'messages' is a JSON object; expected an array"),
    ([], "empty", "no messages"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "unfinished": 1},
        "wrong type",
        "'unfinished' is a JSON number; expected true or false",
    ),
    (["hi"], "wrong type", "message 1 is a JSON string"),
    ([{"content": "x"}], "no role", "message 1 has no 'role'"),
    ([{"role": "user"}], "no content", "message 1 has no 'content'"),
    ([GOOD[0], {"role": "bot", "content": "x"}], "unknown role", "message 2 has role 'bot'; expected one of system"),
    ([{"role": ["user"], "content": "x"}], "unknown role", "message 1 has role"),
    ([{"role": "user", "content": None}], "wrong type", "message 1: 'content' is a JSON null; expected a string"),
    ([{"role": "user", "content": ["x"]}], "wrong type", "message 1: 'content' is a JSON array; expected a string"),
    (chat("q", ""), "empty", "message 2: 'content' is empty"),
    (chat("q", "\udc00"), "lone surrogate", r"message 2: 'content' has half a surrogate pair (\udc00)"),
    (chat("q"), "no reply", "no message of the assistant"),
    (GOOD[1:], "no prompt", "message 1 is the assistant's"),
]


@pytest.mark.parametrize(("line", "kind", "words"), BAD, ids=[f"{i}-{kind}" for i, (_, kind, _) in enumerate(BAD)])
def test_a_malformed_line_is_named_or_counted(tmp_path, line, kind, words):
    path = write_lines(tmp_path / "x.jsonl.gz", GOOD, "", line, GOOD)
    with pytest.raises(SampleError, match=re.escape(words)) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert "; expected " in str(caught.value)
    assert caught.value.kind == kind
    refused = Counter()
    assert [sample.line for sample in read(path, skip_bad=True, refused=refused)] == [1, 4]
    assert refused == {kind: 1}


def test_samples_before_a_bad_line_are_given_out(tmp_path):
    samples = read_samples(write_lines(tmp_path / "x.jsonl", GOOD, "{"), skip_bad=False)
    assert next(samples).line == 1
    with pytest.raises(ValueError, match="line 2"):
        next(samples)


@pytest.mark.parametrize("lines", [[], ["", " "], ["{"]])
def test_nothing_usable(tmp_path, lines):
    with pytest.raises(ValueError, match=r"x\.jsonl has no usable sample; expected at least one line"):
        read(write_lines(tmp_path / "x.jsonl", *lines), skip_bad=True)


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not packed", "nothing"])
def test_damaged_archives(tmp_path, ending, pack, damage):
    raw = "".join(json.dumps(chat(f"question {i * 7919}", f"answer {i * 104729}")) + "\n" for i in range(5000)).encode()
    packed = bytearray(pack(raw))
    packed[len(packed) // 2] ^= 0xFF
    content = {"cut": pack(raw)[:-20], "flipped": bytes(packed), "not packed": raw, "nothing": b""}[damage]
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(content)
    words = "no usable sample" if damage == "nothing" and ending == ".gz" else "damaged or cut short after line"
    for skip_bad in (False, True):
        # A flipped byte may become another letter, which only the archive's checksum at the end tells.
        with pytest.raises(ValueError, match=words if skip_bad or damage != "flipped" else "line"):
            read(path, skip_bad=skip_bad)


def test_what_is_no_data_file(tmp_path):
    (tmp_path / "directory.jsonl").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    for name, words in [
        ("missing.jsonl", "does not exist"),
        ("directory.jsonl", "is not a file"),
        ("x.parquet", "is of an unknown kind"),
    ]:
        with pytest.raises(ValueError, match=rf"{name} {words}; expected a file that ends in \.jsonl"):
            read(tmp_path / name, skip_bad=True)


def test_batches_end_where_they_are_large_enough():
    messages = tuple(chat("ab", "c"))
    samples = [
        Sample("f", 1, text="abc"),
        Sample("f", 2, messages=messages),
        *(Sample("f", line, text="a") for line in (3, 4, 5)),
    ]
    assert [sample.characters for sample in samples] == [3, 3, 1, 1, 1]

    def lines(characters, given=samples):
        return [[sample.line for sample in batch] for batch in in_batches(given, characters)]

    assert lines(1) == [[1], [2], [3], [4], [5]]
    assert lines(4) == [[1, 2], [3, 4, 5]]
    assert lines(9) == lines(10) == [[1, 2, 3, 4, 5]]
    assert lines(9, []) == []


def test_a_fault_comes_after_the_samples_before_it():
    def faulty():
        yield from [Sample("f", 1, text="a"), Sample("f", 2, text="b")]
        raise ValueError("cut short")

    batches = in_batches(faulty(), 100)
    assert [sample.line for sample in next(batches)] == [1, 2]
    with pytest.raises(ValueError, match="cut short"):
        next(batches)
