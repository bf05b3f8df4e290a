# SPDX-License-Identifier: Apache-2.0
"""Read the number that an answer to an arithmetic question ends in, as a person would.

``final_readings`` looks, in this order, at what follows "####", at the last box, at what follows the last "answer is",
and at the last line with a number. A number may stand in LaTeX or Markdown, with money, units, separators of thousands,
as a fraction or a percentage, and with any of Unicode's minus signs and digits.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

Readings = tuple[Fraction, ...]

# Longer ones are not answers, and Python refuses to read numbers of thousands of digits.
_MOST_DIGITS, _MOST_EXPONENT = 60, 100
# A person does not look further, and a text made of marks must not cost the square of its length.
_MOST_PLACES, _MOST_CHARACTERS = 100, 1000
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"(?<!\\)[{}]")
_MARK = re.compile(r"(?<!#)####(?!#)")
_ANSWER = re.compile(
    r"\b(?:answer|réponse|respuesta|antwort|risposta|resposta|result)\b[*_`\s]*"
    r"(?:to (?:the|this) (?:question|problem)\s*)?"
    r"(?:is|=|:|would be|should be|will be|est|es|ist|è|é)[*_`\s:]*|答案\s*(?:是|为|為|:)?\s*",
    re.IGNORECASE,
)
# What may stand between "the answer is" and its number.
_NEAR = re.compile(r"(?:\W|_|text|approximately|about|roughly|exactly|therefore|that|just|only|x)*\Z", re.IGNORECASE)
_ENUMERATION = re.compile(r"\W*\d+\s*(?:[.):]|-(?=\s))\s*(?!\d)\S")
_SENTENCE_END = re.compile(r"[.!?。](?=\s|\Z)|\n")
_SPACED = re.compile(r"(?<=\d) (?=\d{3}(?:\D|\Z))")  # "10 000", where one number is expected
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f", "\u2009"),  # spaces that may separate thousands
        **dict.fromkeys("\u200b\u2060\ufeff", ""),
        **dict.fromkeys("\u00d7\u2715\u22c5\u00b7", "*"),
        **dict.fromkeys("\u2044\u2215", "/"),
        **dict(zip("\uff0c\uff0e\uff05\uff04\uff1a\u2019\u2248", ",.%$:'=", strict=True)),
        "\r": "",
    }
)
_PART = r"\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))"
_LATEX: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[!]|\\(?:left|right|displaystyle|bf|it)(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;: ]|~(?=\d)"), "\u2009"),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(rf"\\[dtc]?frac{_PART}{_PART}"), r"\2\1/\3\4"),
    (re.compile(r"\\(?:text|textbf|mathbf|mathrm|mathit|mbox|textit|emph|underline|bm)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\(?:approx|simeq|implies|Rightarrow)(?![A-Za-z])"), "="),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°"), " "),
    (re.compile(r"(?<=[A-Za-z)}])\s*[\^_]\s*\{?-?\w{1,9}\}?(?![\w*])"), " "),  # exponents of units, indices
)
_MIXED = re.compile(r"(?<=\d)(?=\\[dtc]?frac)")

_NUMBER = re.compile(
    r"""
    (?<![A-Za-z\d^])(?<!\^\{)
    (?P<sign>(?<![\w)\]}%$.])-|(?<!\w)negative\s+)?
    (?P<money>(?:US|CA|A|C|NZ|HK|S)?[$£€¥₹]{1,3}\s?|(?:USD|EUR|GBP|Rs\.?|RM)\s?)?
    (?P<inner_sign>(?<=[$£€¥₹])-)?
    (?:
        (?P<dots>\d{1,3}(?:\.\d{3})+,\d{1,2}(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d|\.\d))     # 1.234,56 and 1.234.567
      | (?P<groups>\d{1,3}(?:[,\u2009'_]\d{3})+(?:\.\d+)?(?![\d_]|,\d)
          | \d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?![\d,]))                                 # 1,234.5 and 1,23,456
      | (?P<comma>(?<!\d,)\d+,\d{1,2}(?![\d,]))                                          # 10,5
      | (?P<plain>\d+(?:\.\d+)?|(?<!\d)\.\d+)
    )
    (?:
        \s*/\s?(?P<bottom>\d+)(?!\d|\.\d|\s?/)                                            # 10/2
      | (?:\s+|\s*-)(?P<over>\d+)/(?P<under>\d+)(?![\d/])                                # 1 1/2
      | :(?P<minutes>\d{2}(?::\d{2})?)(?!\d)                                             # 10:00
      | \s*[*x]\s*10\s*\^\s*\{?\s*(?P<power>[-+]?\d{1,3})\s*\}?
      | [eE](?P<exponent>[-+]?\d{1,3})(?![A-Za-z\d])
      | \s*(?:\^|\*\*(?=\d))\s*\{?\s*(?P<own_power>\d{1,3})\s*\}?
    )?
    (?:\s?(?P<percent>%|per\s?cent\b)|(?P<letter>[kKmMbB])(?![A-Za-z])
      | \s*(?P<word>hundred|thousand|million|billion|trillion)\b)?
    """,
    re.VERBOSE,
)
_WORDS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_LETTERS = {"k": 10**3, "m": 10**6, "b": 10**9}


def same_number(text: str, expected: str) -> bool:
    """Whether a person who reads ``text`` and ``expected`` (answers to one question) finds the same final number."""
    wanted = final_readings(expected)
    return bool(wanted) and wanted[0] in final_readings(text)


def final_readings(text: str) -> Readings:
    """What the final number of ``text`` can mean: usually one value; two for percentages (25 and 1/4) and for "2
    million" (2,000,000 and 2), with the likelier one first; none if there is no number.

    If there are several "####" the first counts, since a base model may continue with questions of its own; one that
    begins a heading (#### Step 1) does not count. Text before ``</think>`` is not the answer.
    """
    text = text.rpartition("</think>")[2]
    marked = _after_mark(text)
    if marked:
        return marked
    box = last_box(text)
    if box is not None and (found := _one(_plain(box))):
        return found
    text = _plain(text)
    return _after_words(text) or _in_last_line(text)


def last_box(text: str) -> str | None:
    """What is inside the last \\boxed{...} whose braces close, or None."""
    boxes = {opening.end() for opening in _BOX.finditer(text)}
    opened: list[int] = []
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in boxes:
            last = max(last or (0, 0), (start, brace.start()))
    return text[slice(*last)] if last else None


def _after_mark(text: str) -> Readings:
    for mark in itertools.islice(_MARK.finditer(text), _MOST_PLACES):
        rest = text[mark.end() : mark.end() + _MOST_CHARACTERS]
        line, _, rest = rest.partition("\n")
        if not line.strip():
            line = rest.lstrip().partition("\n")[0]
        box = last_box(line)
        if box is not None and (found := _one(_plain(box))):
            return found
        line = _plain(line)
        words = _ANSWER.match(line.lstrip(" *_`:")) or re.match(r"[^=\d]*=", line)
        is_answer = words is not None or _begins_with_number(line)
        if is_answer and not _ENUMERATION.match(line) and (found := _one(line)):
            return found
    return ()


def _begins_with_number(line: str) -> bool:
    match = _NUMBER.search(line)
    return match is not None and not re.search(r"\w", line[: match.start()])


def _after_words(text: str) -> Readings:
    """The number after the last "the answer is", or the last number of that sentence."""
    text = _SPACED.sub("\u2009", text)
    for words in list(_ANSWER.finditer(text))[: -_MOST_PLACES - 1 : -1]:
        rest = text[words.end() : words.end() + _MOST_CHARACTERS]
        if not (sentence := rest[: _end(rest)]).strip(" *_`$:"):
            rest = rest.lstrip(" *_`$:\n")
            sentence = rest[: _end(rest)]
        if "=" in sentence and (found := _one(sentence)):
            return found
        numbers = list(_numbers(sentence))
        if numbers:
            start, readings = numbers[0]
            return readings if _NEAR.match(sentence[:start]) else numbers[-1][1]
    return ()


def _end(text: str) -> int:
    end = _SENTENCE_END.search(text)
    return end.start() if end else len(text)


def _in_last_line(text: str) -> Readings:
    for line in reversed(text.split("\n")):
        numbers = list(_numbers(line))
        if not numbers:
            continue
        bold = [found for part in _BOLD.findall(line) if (found := _one(part)) and _begins_with_number(part)]
        return bold[-1] if bold and not _ENUMERATION.match(line) else numbers[-1][1]
    return ()


def _one(text: str) -> Readings:
    """The number of a text that is the answer: the first one after its last "=", or the first of all."""
    text = re.sub(r"^([^\w-]*-)\s+(?=[$£€¥₹\d.])", r"\1", text)  # "- 5" is no item of a list here
    for part in reversed(_SPACED.sub("\u2009", text).split("=")):
        for _, readings in _numbers(part):
            return readings
    return ()


def _plain(text: str) -> str:
    """Write LaTeX and Unicode's variants in plain ASCII."""
    text = text.translate(_CHARACTERS)
    if not text.isascii():
        text = "".join(map(_ascii, text))
    text = _MIXED.sub(" ", text)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _ascii(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.category(character) == "No":
        fraction = unicodedata.normalize("NFKD", character)
        return " " + fraction.replace("\u2044", "/") if "\u2044" in fraction else " "  # ½; the 2 of m² is no number
    return character


def _numbers(text: str) -> Iterator[tuple[int, Readings]]:
    """(where it begins, what it can mean) for each number in plain text."""
    position = 0
    while (match := _NUMBER.search(text, position)) is not None:
        position = match.end()
        over, under = match["over"], match["under"]
        if over is not None and (
            not int(under[:_MOST_DIGITS]) or int(over[:_MOST_DIGITS]) >= int(under[:_MOST_DIGITS])
        ):
            match = _NUMBER.match(text[: match.start("over")].rstrip(" -"), match.start())
            assert match is not None
            position = match.end()
        readings = _value(match)
        if readings:
            yield match.start(), readings


def _value(match: re.Match[str]) -> Readings:
    digits = _digits(match)
    number = None if digits is None or len(match[0]) > _MOST_DIGITS else _with_suffix(digits, match)
    if number is None:
        return ()
    if match["letter"] and match["money"]:
        number *= _LETTERS[match["letter"].lower()]
    if match["sign"] or match["inner_sign"]:
        number = -number
    if match["percent"]:
        return number, number / 100
    if match["word"]:
        return number * _WORDS[match["word"]], number
    return (number,)


def _with_suffix(number: Fraction, match: re.Match[str]) -> Fraction | None:
    """The number with the denominator, second part or power that follows; None if that makes it something other than a
    number."""
    exponent = int(match["power"] or match["exponent"] or match["own_power"] or 0)
    if abs(exponent) > _MOST_EXPONENT or (match["minutes"] or "00") != "00":  # a time or a ratio
        return None
    if match["own_power"]:
        return Fraction(number**exponent)
    if match["over"]:
        number += Fraction(int(match["over"]), int(match["under"]))
    bottom = int(match["bottom"] or 1)
    return number * Fraction(10) ** exponent / bottom if bottom else None


def _digits(match: re.Match[str]) -> Fraction | None:
    if match["dots"]:
        digits = match["dots"].replace(".", "").replace(",", ".")
    elif match["groups"]:
        digits = re.sub(r"[,\u2009'_]", "", match["groups"])
    elif match["comma"]:
        digits = match["comma"].replace(",", ".")
    else:
        digits = match["plain"]
    return Fraction(digits) if len(digits) <= _MOST_DIGITS else None
