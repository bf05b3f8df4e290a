# SPDX-License-Identifier: Apache-2.0
"""Read training text from JSON lines: each line is read, checked and yielded before the next is looked at."""

import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

ROLES = ("system", "user", "assistant")
_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz")
_SHAPES = 'an array of {"role", "content"}, {"messages": [...]} or {"text": "..."}'


class SampleError(ValueError):
    """A sample that cannot be trained on; ``kind`` is the short reason under which ``skip_bad`` counts it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation (``messages``: dictionaries of role and content) or a plain ``text``; the other one is None.

    ``unfinished``: the last reply continues past the end of the sample, so no end is learned.
    """

    path: str
    line: int  # from 1
    messages: tuple[dict[str, str], ...] | None = None
    text: str | None = None
    unfinished: bool = False

    @property
    def characters(self) -> int:
        return len(self.text or "") + sum(len(message["content"]) for message in self.messages or ())

    @property
    def origin(self) -> str:
        """ "file:line", for messages."""
        return f"{self.path}:{self.line}"


def read_samples(path: str | Path, *, skip_bad: bool, refused: Counter[str] | None = None) -> Iterator[Sample]:
    """The samples of a ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.xz`` file in its order; empty lines are skipped.

    A line is an array of messages, an object with ``messages`` (and perhaps ``unfinished``) or one with ``text``. A
    malformed line raises SampleError (a ValueError) with file and line, or, with ``skip_bad``, adds one to its kind in
    ``refused``. A file that is missing, damaged or without a usable sample raises ValueError in either case.
    """
    path = Path(path)
    found = False
    for line, raw in numbered_lines(path):
        if not raw.strip():
            continue
        try:
            sample = _parse(path, line, raw)
        except SampleError as error:
            if not skip_bad:
                raise
            if refused is not None:
                refused[error.kind] += 1
            continue
        found = True
        yield sample
    if not found:
        raise ValueError(f"{path} has no usable sample; expected at least one line that is {_SHAPES}")


def in_batches(samples: Iterable[Sample], characters: int) -> Iterator[list[Sample]]:
    """Lists of samples in their order, each ending with the one that brings it to ``characters``; the last is shorter.

    A ValueError from ``samples`` comes after a list of those read before it, because their own faults should be
    reported first.
    """
    batch: list[Sample] = []
    size = 0
    fault: ValueError | None = None
    try:
        for sample in samples:
            batch.append(sample)
            size += sample.characters
            if size >= characters:
                yield batch
                batch, size = [], 0
    except ValueError as error:
        fault = error
    if batch:
        yield batch
    if fault is not None:
        raise fault


def check_source_path(path: Path) -> None:
    """Raises ValueError unless ``path`` is a file of a kind that ``read_samples`` reads."""
    fault = None
    if not path.exists():
        fault = "does not exist"
    elif not path.is_file():
        fault = "is not a file"
    elif not path.name.endswith(_ENDINGS):
        fault = "is of an unknown kind"
    if fault is not None:
        raise ValueError(f"{path} {fault}; expected a file that ends in {', '.join(_ENDINGS)}")


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return cast(IO[bytes], lzma.open(path, "rb")) if path.suffix == ".xz" else path.open("rb")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file of JSON lines, with their numbers from 1. Raises ValueError."""
    check_source_path(path)
    line = 0
    try:
        with _open(path) as file:
            for line, raw in enumerate(file, start=1):
                yield line, raw
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is damaged or cut short after line {line} ({error}); expected a whole file"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} could not be read after line {line}: {error}") from error


def _parse(path: Path, line: int, raw: bytes) -> Sample:
    where = f"{path} line {line}"
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SampleError("not UTF-8", f"{where}: byte {error.start + 1} is not UTF-8; expected UTF-8 JSON") from error
    except (ValueError, RecursionError) as error:
        raise SampleError("not JSON", f"{where}: not valid JSON ({error}); expected {_SHAPES}") from error
    if isinstance(value, dict):
        return _from_object(path, line, where, value)
    if isinstance(value, list):
        return Sample(str(path), line, messages=_messages(where, value))
    raise SampleError("wrong type", f"{where}: a JSON {_type_name(value)}; expected {_SHAPES}")


def _from_object(path: Path, line: int, where: str, value: dict[str, Any]) -> Sample:
    present = [name for name in ("messages", "text") if name in value]
    if len(present) != 1:
        keys = ", ".join(repr(key)[:40] for key in list(value)[:8]) or "none"
        raise SampleError("wrong keys", f"{where}: its keys are {keys}; expected one of 'messages' and 'text'")
    if present == ["messages"]:
        if not isinstance(value["messages"], list):
            kind = _type_name(value["messages"])
            raise SampleError("wrong type", f"{where}: 'messages' is a JSON {kind}; expected an array of messages")
        unfinished = value.get("unfinished", False)
        if not isinstance(unfinished, bool):
            kind = _type_name(unfinished)
            raise SampleError("wrong type", f"{where}: 'unfinished' is a JSON {kind}; expected true or false")
        return Sample(str(path), line, messages=_messages(where, value["messages"]), unfinished=unfinished)
    text = _string(f"{where}: 'text'", value["text"])
    if not text.strip():
        raise SampleError("empty", f"{where}: 'text' is empty; expected text")
    return Sample(str(path), line, text=text)


def _messages(where: str, values: list[Any]) -> tuple[dict[str, str], ...]:
    """The messages with only their role and content. Raises SampleError."""
    if not values:
        raise SampleError("empty", f"{where}: no messages; expected at least one of the user and one of the assistant")
    messages = tuple(_message(f"{where}: message {number}", value) for number, value in enumerate(values, start=1))
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant":
        raise SampleError(
            "no prompt", f"{where}: message 1 is the assistant's; expected the user's or the system's first"
        )
    if "assistant" not in roles:
        raise SampleError("no reply", f"{where}: no message of the assistant; expected at least one reply to learn")
    return messages


def _message(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise SampleError(
            "wrong type", f"{where} is a JSON {_type_name(value)}; expected an object with role and content"
        )
    missing = [name for name in ("role", "content") if name not in value]
    if missing:
        raise SampleError(f"no {missing[0]}", f"{where} has no {missing[0]!r}; expected role and content")
    role = value["role"]
    if role not in ROLES:
        raise SampleError("unknown role", f"{where} has role {str(role)[:40]!r}; expected one of {', '.join(ROLES)}")
    content = _string(f"{where}: 'content'", value["content"])
    # An empty system message is how chat files switch a template's default one off.
    if not content.strip() and role != "system":
        raise SampleError("empty", f"{where}: 'content' is empty; expected text")
    return {"role": role, "content": content}


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SampleError("wrong type", f"{where} is a JSON {_type_name(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        raise SampleError(
            "lone surrogate", f"{where} has half a surrogate pair ({code}); expected whole characters"
        ) from error
    return value


def _type_name(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return names.get(type(value), "object")
