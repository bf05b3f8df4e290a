# SPDX-License-Identifier: Apache-2.0
"""Calls are parsed: random ones in four forms, cut at every byte, are those of the whole text and those that were
written; and what untrusted text does to a call."""

import codecs
import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.reading_calls import NAMES, calls_in
from wedlm.server.readers import CallReader, Delta, PlainReader, ThinkReader
from wedlm.server.tool_forms import FORMS, form_of

characters = st.characters(codec="utf-8") | st.sampled_from("\"'\\{}[]()<>/,:=; \n\t\x00é")
texts = st.text(characters, max_size=12) | st.sampled_from(
    ["</tool_call>", "<tool_call>", '"}', "[TOOL_CALLS]", "]", ")", "\\", "<|python_tag|>", "'", '{"name": "add"}']
)
numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
identifiers = st.sampled_from(["x", "city", "a_1", "name", "arguments"])
plain = st.tuples(st.sampled_from(NAMES), st.dictionaries(texts | identifiers, values, max_size=4))
keyed = st.tuples(st.sampled_from(NAMES), st.dictionaries(identifiers, values, max_size=4))
before = st.sampled_from(["", "Let me see. ", "a < b [1] {", "\n "])


def as_object(call: tuple[str, dict], ascii_only: bool, key: str = "arguments") -> str:
    return json.dumps({"name": call[0], key: call[1]}, ensure_ascii=ascii_only)


def written(form: str, calls: list[tuple[str, dict]], ascii_only: bool) -> str:
    """As a model of that form writes them."""
    if form == "hermes":
        return "\n".join(f"<tool_call>\n{as_object(call, ascii_only)}\n</tool_call>" for call in calls)
    if form == "llama3":
        return "; ".join(as_object(call, ascii_only, "parameters") for call in calls)
    if form == "mistral":
        return f"[TOOL_CALLS] [{', '.join(as_object(call, ascii_only) for call in calls)}]"
    arguments = (", ".join(f"{k}={ascii(v) if ascii_only else repr(v)}" for k, v in call[1].items()) for call in calls)
    return "[" + ", ".join(f"{call[0]}({one})" for call, one in zip(calls, arguments, strict=True)) + "]"


def halves(text: str) -> Iterator[list[str]]:
    """The text as two pieces, cut at every byte: of a character that is cut, all comes with the second."""
    data = text.encode()
    for cut in range(1, len(data)):
        decoder = codecs.getincrementaldecoder("utf-8")()
        yield [decoder.decode(data[:cut]), decoder.decode(data[cut:], final=True)]


def check_random_calls(form: str, examples: int, all_cuts: bool, most: int = 3) -> tuple[int, int]:
    """Random answers of at most ``most`` calls each. How many calls there were, and how many ways to cut an answer were
    compared with the whole."""
    num_calls = num_cuts = 0

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(st.lists(keyed if form == "pythonic" else plain, min_size=1, max_size=most), before, st.booleans())
    def check(calls, lead, ascii_only):
        nonlocal num_calls, num_cuts
        num_calls += len(calls)
        if not FORMS[form].tags[0].startswith(("<tool", "[TOOL")):
            lead = "\n " if lead.isspace() else ""  # such calls are the whole answer
        text = lead + written(form, calls, ascii_only)
        content, found = whole = calls_in(form, [text])
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls
        assert content == (lead if lead.strip() else None)
        assert calls_in(form, list(text)) == whole
        if all_cuts:
            for pieces in halves(text):
                assert calls_in(form, pieces) == whole
                num_cuts += 1

    check()
    return num_calls, num_cuts


@pytest.mark.parametrize("form", FORMS)
def test_random_calls(form):
    check_random_calls(form, 60, all_cuts=False)
    check_random_calls(form, 5, all_cuts=True)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_1000_random_calls(form, record_property):
    """Each cut reads the whole answer, so an answer's time grows with the square of its length: most are one call."""
    alone, together = check_random_calls(form, 1000, True, most=1), check_random_calls(form, 100, True)
    num_calls, num_cuts = alone[0] + together[0], alone[1] + together[1]
    assert num_calls > 1100
    assert num_cuts > 100_000
    record_property(form, f"{num_calls:,} random calls, whole, by characters, cut at each of {num_cuts:,} bytes: equal")


@pytest.mark.parametrize("form", FORMS)
def test_any_text_is_read_the_same_however_it_is_cut(form):
    """Also what is no call: pieces of calls, in any order, lose nothing and depend on no cut."""
    parts = [
        *FORMS[form].tags,
        "</tool_call>",
        '{"name": ',
        '"add"',
        '"arguments": ',
        "{}",
        "}",
        "[",
        "]",
        "add",
        "(",
        ")",
    ]
    pieces = st.lists(st.sampled_from([*parts, " ", "\n", ",", ";", "x", '"', "=1", "[ARGS]"]), max_size=14)

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(pieces)
    def check(given_pieces):
        text = "".join(given_pieces)
        whole = calls_in(form, [text])
        assert calls_in(form, list(text)) == whole
        assert calls_in(form, given_pieces) == whole
        if not whole[1]:
            assert whole[0] == text

    check()


def hermes(inner: str) -> str:
    return f"<tool_call>\n{inner}\n</tool_call>"


def adding(arguments: str) -> str:
    return hermes('{"name": "add", "arguments": ' + arguments + "}")


READ = [
    ("hermes", "Just text, a < b", "Just text, a < b", []),
    ("hermes", adding('{"a": 1}'), None, [("add", '{"a": 1}')]),
    ("hermes", 'I add.<tool_call>{"name": "add"}</tool_call>\n', "I add.", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": {}}', None, [("add", "{}")]),  # an end token for the tag
    ("hermes", '<tool_call>{"name": "add"}</tool_', None, [("add", "{}")]),  # cut in the tag
    ("hermes", hermes('{"name": "mul"}'), hermes('{"name": "mul"}'), []),
    ("hermes", "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    ("hermes", "<tool_call>[1]", "<tool_call>[1]", []),
    ("hermes", "ends in <tool_", "ends in <tool_", []),
    ("hermes", hermes('{"name": "add"}') + "\n" + hermes('{"name": "a"}'), None, [("add", "{}"), ("a", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "add"}<tool_call>{"name": "a"}',
        None,
        [("add", "{}"), ("a", "{}")],
    ),  # no closing tag
    ("hermes", adding(r'{"a": "\ud83d"}'), None, [("add", '{"a": "\ufffd"}')]),
    ("hermes", adding(r'{"a": "\ud83dx\ude00"}'), None, [("add", '{"a": "\ufffdx\ufffd"}')]),
    ("hermes", adding(r'{"a": "\ud83d\ude00"}'), None, [("add", r'{"a": "\ud83d\ude00"}')]),
    ("hermes", hermes('{"name": "add", "parameters": {"a": 1}}'), None, [("add", '{"a": 1}')]),
    ("hermes", hermes('{"arguments": {"a": 1}, "name": "add"}'), None, [("add", '{"a": 1}')]),
    ("hermes", adding(r'"{\"a\": 1}"'), None, [("add", '{"a": 1}')]),  # encoded twice
    ("hermes", adding('""'), None, [("add", "{}")]),
    ("hermes", adding("null"), None, [("add", "{}")]),
    ("hermes", adding('{"a": 1e400}'), None, [("add", '{"a": 1e400}')]),  # JSON, if no float
    ("hermes", adding('{"a": "</tool_call>"}'), None, [("add", '{"a": "</tool_call>"}')]),
    ("hermes", adding('{"a": "x\ny"}'), None, [("add", r'{"a": "x\u000ay"}')]),  # a control character
    ("hermes", hermes('{"type": "function", "function": {"name": "a", "arguments": "{}"}}'), None, [("a", "{}")]),
    ("llama3", '{"name": "add", "parameters": {"a": 1}}', None, [("add", '{"a": 1}')]),
    ("llama3", '<|python_tag|>{"name": "add"}; {"name": "a"}', None, [("add", "{}"), ("a", "{}")]),
    ("llama3", '{"city": "Paris"}', '{"city": "Paris"}', []),
    ("llama3", 'See {"name": "add"}', 'See {"name": "add"}', []),
    ("mistral", '[{"name": "add", "arguments": {}}]', None, [("add", "{}")]),  # the tag is a control token
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1}', None, [("add", '{"a": 1}')]),
    ("mistral", 'add{"a": 1}[TOOL_CALLS]a{}', None, [("add", '{"a": 1}'), ("a", "{}")]),
    ("mistral", "[1, 2]", "[1, 2]", []),
    (
        "pythonic",
        "[add(a='it\\'s', b=(1, None,)), a()]",
        None,
        [("add", '{"a": "it\'s", "b": [1, null]}'), ("a", "{}")],
    ),
    ("pythonic", "[add(1)]", "[add(1)]", []),
    ("pythonic", "[x](http://x)", "[x](http://x)", []),
]


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"), READ, ids=[f"{form} {text[:25]}" for form, text, *_ in READ]
)
def test_what_is_read(form, text, content, calls):
    for pieces in ([text], list(text)):
        assert calls_in(form, pieces) == (content, calls)
    if len(calls) > 1:
        assert len(calls_in(form, [text], parallel=False)[1]) == 1


@pytest.mark.parametrize(
    "bad", ["NaN", "-Infinity", "[1,]", "01", '"\\x"', "{'a': 1}", "[" * 60 + "]" * 60, "9" * 5000, "tru"]
)
def test_what_is_no_json_is_content(bad):
    text = adding(f'{{"a": {bad}}}')
    assert calls_in("hermes", [text]) == calls_in("hermes", list(text)) == (text, [])


def test_nested_beginnings_take_time_in_proportion():
    """A text that is JSON from each of many beginnings, none of which ends: each character is read a few times."""
    import sys

    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_name == "_string"
        return None

    unit = '<tool_call>{":":",","'
    sys.setprofile(trace)
    try:
        text = unit * 400
        content, calls = calls_in("hermes", [text])
    finally:
        sys.setprofile(None)
    assert (content, calls) == (text, [])
    assert count < 5 * len(text)


class Counted(str):
    """Counts the characters of whatever is cut out of it, or joined to it."""

    made = 0

    def _new(self, text: str) -> "Counted":
        Counted.made += len(text)
        return Counted(text)

    def __getitem__(self, part):
        return self._new(super().__getitem__(part))

    def __add__(self, other):
        return self._new(super().__add__(other))

    def __radd__(self, other):
        return self._new(str.__add__(other, self))

    def lstrip(self, *characters):
        return self._new(super().lstrip(*characters))

    def rstrip(self, *characters):
        return self._new(super().rstrip(*characters))


READERS = {
    **{form: lambda form=form: CallReader(FORMS[form], NAMES, True) for form in FORMS},
    "reasoning": lambda: ThinkReader(PlainReader(), True),
    "before reasoning": lambda: ThinkReader(PlainReader(), False),
}


@pytest.mark.parametrize("size", [1, 4, 10**6])
@pytest.mark.parametrize(
    "unit", [" ", "x <tool_call>", "[TOOL_CALLS]!", '<tool_call>{"name": "a"}</tool_call>', "</think"]
)
@pytest.mark.parametrize("reader", READERS)
def test_any_text_takes_time_in_proportion(reader, unit, size):
    """Beginnings that fail, white space without end and whole calls, however the text is cut."""
    text = unit * (4000 // len(unit))
    one = READERS[reader]()
    Counted.made = 0
    for start in range(0, len(text), size):
        one.push(Counted(text[start : start + size]))
    one.finish("stop")
    assert Counted.made < 40 * len(text)


def test_many_calls_take_time_in_proportion():
    """An answer is put together of its pieces: each call is looked at a few times."""

    class Call(dict):
        read = 0

        def __getitem__(self, name):
            Call.read += 1
            return super().__getitem__(name)

    whole = Delta()
    for index in range(500):
        whole.add(Delta(calls=[Call(index=index, function={"name": "a", "arguments": "{"})]))
        whole.add(Delta(calls=[{"index": index, "function": {"arguments": "}"}}]))
    assert [(call["index"], call["function"]["arguments"]) for call in whole.calls] == [(i, "{}") for i in range(500)]
    assert Call.read < 10 * 500


def test_the_form_of_a_template():
    for source, name in [
        (None, "hermes"),
        ("plain", "hermes"),
        ("... <tool_call></tool_call> ...", "hermes"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name}', "llama3"),
        ("You SHOULD use [func_name1(params_name1=params_value1)]", "pythonic"),
    ]:
        assert form_of(source).name == name
