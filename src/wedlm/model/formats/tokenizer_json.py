# SPDX-License-Identifier: Apache-2.0
"""``tokenizer.json`` is a kind of program, so it is checked before it sees a text.

Its steps can make text longer (a replacement of one letter by a thousand, four times over) and contain regular
expressions. This module bounds what each step can make of a character. The library's own expressions stop after ten
million retries, with a panic that ``running`` turns into a ValueError.
"""

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from wedlm.model.errors import CheckpointError, is_panic, reading

# The largest, of vocabularies of 260,000 tokens, have 35 MB.
_MAX_BYTES = 2**28
# Unicode's own compatibility forms make at most 18 characters of one; no honest step comes near it.
_MAX_GROWTH, _MAX_TEMPLATE = 64, 64
_PROBE_COUNTS, _PROBE_SECONDS = (20, 40, 80, 160, 320), 0.1
_PROBES = ("a", " ", "\n", "1", "<", "é", "你", "aA1 ", "'s ", "\t \n", "<|a|>")


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in ``path``. Raises CheckpointError."""
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; expected at most {_MAX_BYTES}")
    data = path.read_bytes()
    try:
        _check_steps(json.loads(data))
        backend = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # The Rust library raises plain Exception.
        raise CheckpointError(f"{path} is not a readable tokenizer: {error}") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise CheckpointError(f"{path} makes the tokenizers library fail: {error}") from error
    with reading(path), running():
        _probe(backend)
    return backend


def _probe(backend: tokenizers.Tokenizer) -> None:
    """Raises ValueError for a tokenizer whose expressions take much longer for a text twice as long."""
    backend.no_truncation()
    for probe in _PROBES:
        for count in _PROBE_COUNTS:
            start = time.thread_time()
            backend.encode(probe * count)
            if time.thread_time() - start > _PROBE_SECONDS:
                raise ValueError(f"the tokenizer takes {time.thread_time() - start:.2g} s for {probe * count!r:.40}...")


@contextmanager
def running() -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is not an Exception, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(f"the tokenizer fails on this text: {error}") from error


def _check_steps(values: Any) -> None:
    """Raises ValueError for steps that multiply text."""
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = _growth(values.get(part))
        if growth > _MAX_GROWTH:
            raise ValueError(f"its {part} can make {growth:.3g} characters of one; expected at most {_MAX_GROWTH}")
    length = _template_length(values.get("post_processor"))
    if length > _MAX_TEMPLATE:
        raise ValueError(f"its post_processor adds {length} pieces to a text; expected at most {_MAX_TEMPLATE}")


def _growth(step: Any) -> float:
    """The largest number of characters that a step makes of one, for steps that a file can define."""
    if not isinstance(step, dict):
        return 1.0
    growth = 1.0
    for name in ("normalizers", "pretokenizers", "decoders"):
        steps = step.get(name)
        for one in steps if isinstance(steps, list) else []:
            growth *= _growth(one)
    if step.get("type") == "Replace":
        pattern, content = step.get("pattern"), step.get("content")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        added = len(content) if isinstance(content, str) else 0
        # An expression can match the empty text between two characters.
        growth *= max(1.0, added / max(1, len(literal)) if isinstance(literal, str) else 1.0 + added)
    elif step.get("type") == "Prepend":
        growth *= 1.0 + len(str(step.get("prepend") or ""))
    elif step.get("type") == "Precompiled":
        growth *= _longest_of_charsmap(step.get("precompiled_charsmap"))
    return growth


def _longest_of_charsmap(encoded: Any) -> float:
    """The longest replacement in SentencePiece's table: the size of a trie, the trie, and the texts it leads to, each
    ended by a zero byte."""
    if not isinstance(encoded, str):
        return 1.0
    data = base64.b64decode(encoded)
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return float(max(map(len, texts.split(b"\0")), default=1) or 1)


def _template_length(step: Any) -> int:
    if not isinstance(step, dict):
        return 0
    steps = step.get("processors")
    length = sum(_template_length(one) for one in steps) if isinstance(steps, list) else 0
    if step.get("type") != "TemplateProcessing":
        return length
    pieces = [len(step[name]) for name in ("single", "pair") if isinstance(step.get(name), list)]
    special = step.get("special_tokens")
    added = [len(one.get("ids") or ()) for one in special.values()] if isinstance(special, dict) else []
    return length + max(pieces, default=0) * max([1, *added])
