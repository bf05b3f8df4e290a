# SPDX-License-Identifier: Apache-2.0
"""Training data as tokens on disk: made once for each content, tokenizer and options, then read through memory maps."""

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from wedlm.model.formats.temporary import temporary_folder
from wedlm.model.formats.tokenizer import Tokenizer
from wedlm.train.encode import DEFAULT_END_TOKENS, EncodedSample, encode_batch
from wedlm.train.sources import SampleError, check_source_path, in_batches, read_samples

FORMAT = 1
_BUFFER_TOKENS = 1 << 20  # tokens that a builder holds before it writes them
BATCH_CHARACTERS = 1 << 21  # of samples that are tokenised together: enough for many cores, some 200 MB in memory
_TOKENS, _TRAINABLE, _DOCUMENTS, _USES, _META = "tokens.bin", "trainable.bin", "documents.bin", "uses.bin", "meta.json"
_END, _SOURCE, _LINE, _NUM_TRAINABLE = range(4)  # columns of documents.bin

Progress = Callable[[str, int, int], None]  # file, lines read of it, tokens so far


# Raised with each change of encode.py that changes a document's tokens. 2: control tokens in plain text are text.
_ENCODING = 2


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """What one file contained. ``refused`` counts skipped lines by reason; there are more ``documents`` than
    ``samples`` if a template makes several of one."""

    samples: int
    documents: int
    tokens: int
    trainable: int
    refused: dict[str, int]


class TokenCache:
    """Tokens of D documents. Arrays are read-only memory maps; document d has tokens offsets[d]..offsets[d+1]-1.

    tokens uint32 [T], trainable bool [T], offsets int64 [D+1]; per document int64 [D]: source (index into ``paths``),
    line (in that file, from 1), num_trainable. Raises ValueError if the directory is not a complete cache.
    """

    def __init__(self, directory: Path, paths: Sequence[str]) -> None:
        self.directory, self.paths = directory, tuple(paths)
        meta = _read_meta(directory)
        self.key: str = meta["key"]
        self.sources: tuple[SourceCounts, ...] = tuple(meta["sources"])
        num_tokens, num_documents = (sum(getattr(s, name) for s in self.sources) for name in ("tokens", "documents"))
        self.tokens = _mapped(directory / _TOKENS, "<u4", (num_tokens,))
        self.trainable = _mapped(directory / _TRAINABLE, "|b1", (num_tokens,))
        table = _mapped(directory / _DOCUMENTS, "<i8", (num_documents, 4))
        self._uses = _mapped(directory / _USES, "<i8", (meta["vocab_size"],))
        self.offsets = np.concatenate((np.zeros(1, np.int64), table[:, _END]))
        self.source, self.line, self.num_trainable = table[:, _SOURCE], table[:, _LINE], table[:, _NUM_TRAINABLE]
        if len(self.paths) != len(self.sources) or self.offsets[-1] != num_tokens or (np.diff(self.offsets) <= 0).any():
            raise ValueError(f"{directory} is damaged: {_DOCUMENTS} does not fit {_META}; expected a whole cache")

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 [D]."""
        return np.diff(self.offsets)

    @property
    def largest_token_id(self) -> int:
        return int(np.flatnonzero(self._uses)[-1])

    def check_mask_token_id(self, mask_token_id: int) -> None:
        """Raises ValueError naming file and line if the data uses this id, which the model could not distinguish from a
        mask."""
        uses = int(self._uses[mask_token_id]) if 0 <= mask_token_id < len(self._uses) else 0
        if not uses:
            return
        document = int(np.searchsorted(self.offsets, self._first_use(mask_token_id), side="right")) - 1
        raise ValueError(
            f"mask_token_id is {mask_token_id}, which {uses} tokens of the training data use, first in "
            f"{self.paths[self.source[document]]} line {self.line[document]}; expected an id that the data never uses"
        )

    def _first_use(self, token_id: int) -> int:
        for start in range(0, len(self.tokens), _BUFFER_TOKENS):
            found = np.flatnonzero(self.tokens[start : start + _BUFFER_TOKENS] == token_id)
            if len(found):
                return start + int(found[0])
        raise ValueError(f"{self.directory} is damaged: {_USES} counts token {token_id}, which {_TOKENS} does not hold")


@dataclass(frozen=True)
class CacheResult:
    """``built``: whether this call tokenised the data. ``message``: one line about what happened."""

    cache: TokenCache
    built: bool
    message: str


def build_cache(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    eos_token_id: int,
    num_end_tokens: int = DEFAULT_END_TOKENS,
    last_message: bool = False,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> CacheResult:
    """The cache of these files under ``directory``: the existing one with the same key, or a new one.

    The key is made of the files' contents and their order, the tokenizer, its chat template and the options. A cache
    exists completely or not at all; if there are several processes, one builds it and the others wait; a damaged one is
    built again. Raises ValueError if something cannot be read (``read_samples``), encoded (``encode``) or written.
    """
    recipe = _Recipe(
        tuple(str(path) for path in paths), tokenizer, eos_token_id, num_end_tokens, last_message, skip_bad
    )
    fingerprint = recipe.fingerprint()
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:32]
    directory = Path(directory)
    home = directory / key
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f".{key}.lock"):
            damage = ""
            if home.exists():
                try:
                    return CacheResult(TokenCache(home, recipe.paths), False, f"tokens reused from {home}")
                except ValueError as error:
                    damage = f"{error}; built again: "
                    shutil.rmtree(home)
            with temporary_folder(directory) as building:
                whole = building / "whole"
                _build(whole, key, fingerprint, recipe, progress)
                whole.rename(home)
    except OSError as error:
        raise ValueError(
            f"the token cache cannot be kept in {directory} ({error}); expected a place with room"
        ) from error
    return CacheResult(TokenCache(home, recipe.paths), True, f"{damage}tokens written to {home}")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A digest of everything that decides which tokens a text or a conversation becomes."""
    parts = [_ENCODING, tokenizer.backend.to_str(), tokenizer.chat_templates, tokenizer.special_tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Recipe:
    """What a cache is made from."""

    paths: tuple[str, ...]
    tokenizer: Tokenizer
    eos_token_id: int
    num_end_tokens: int
    last_message: bool
    skip_bad: bool

    def fingerprint(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "files": [_digest(Path(path)) for path in self.paths],
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "eos_token_id": self.eos_token_id,
            "num_end_tokens": self.num_end_tokens,
            **({"last_message": True} if self.last_message else {}),  # other caches keep their keys
            "skip_bad": self.skip_bad,
        }

    def samples(self, path: str, refused: Counter[str]) -> Iterator[tuple[int, list[EncodedSample]]]:
        """Each usable sample of a file, as its line and its documents."""
        for batch in in_batches(read_samples(path, skip_bad=self.skip_bad, refused=refused), BATCH_CHARACTERS):
            encoded = encode_batch(
                batch,
                self.tokenizer,
                num_end_tokens=self.num_end_tokens,
                eos_token_id=self.eos_token_id,
                last_message=self.last_message,
            )
            for sample, documents in zip(batch, encoded, strict=True):
                if not isinstance(documents, ValueError):
                    yield sample.line, documents
                elif self.skip_bad and isinstance(documents, SampleError):
                    refused[documents.kind] += 1
                else:
                    raise documents


class _Writer:
    """Appends documents to the files of a new cache, holding at most a buffer of them."""

    def __init__(self, directory: Path, vocab_size: int, files: Mapping[str, BinaryIO]) -> None:
        self.directory, self.files = directory, files
        self.uses = np.zeros(vocab_size, dtype=np.int64)
        self.num_tokens = 0
        self._documents: list[EncodedSample] = []
        self._rows: list[tuple[int, int, int, int]] = []
        self._buffered = 0

    def add(self, source: int, line: int, document: EncodedSample) -> None:
        self.num_tokens += len(document.tokens)
        self._rows.append((self.num_tokens, source, line, int(document.trainable.sum())))
        self._documents.append(document)
        self._buffered += len(document.tokens)
        if self._buffered >= _BUFFER_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self._documents:
            return
        tokens = np.concatenate([document.tokens for document in self._documents])
        self.uses += np.bincount(tokens, minlength=len(self.uses))
        self.files[_TOKENS].write(tokens.astype("<u4").tobytes())
        self.files[_TRAINABLE].write(np.concatenate([document.trainable for document in self._documents]).tobytes())
        self.files[_DOCUMENTS].write(np.array(self._rows, dtype="<i8").tobytes())
        self._documents, self._rows, self._buffered = [], [], 0


def _build(
    directory: Path, key: str, fingerprint: Mapping[str, Any], recipe: _Recipe, progress: Progress | None
) -> None:
    directory.mkdir()
    if not recipe.skip_bad:  # reading is quick: a malformed line is told before an hour of tokenising, not after it
        for path in recipe.paths:
            for _ in read_samples(path, skip_bad=False):
                pass
    with ExitStack() as stack:
        names = (_TOKENS, _TRAINABLE, _DOCUMENTS)
        files = {name: stack.enter_context((directory / name).open("wb")) for name in names}
        writer = _Writer(directory, recipe.tokenizer.vocab_size, files)
        counts = [_add_source(writer, source, path, recipe, progress) for source, path in enumerate(recipe.paths)]
        writer.flush()
    (directory / _USES).write_bytes(writer.uses.astype("<i8").tobytes())
    meta = {"key": key, "made_from": fingerprint, "vocab_size": len(writer.uses), "sources": list(map(asdict, counts))}
    (directory / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _add_source(writer: _Writer, source: int, path: str, recipe: _Recipe, progress: Progress | None) -> SourceCounts:
    refused: Counter[str] = Counter()
    samples = documents = trainable = 0
    before = writer.num_tokens
    for line, encoded in recipe.samples(path, refused):
        for document in encoded:
            writer.add(source, line, document)
            trainable += int(document.trainable.sum())
        samples += 1
        documents += len(encoded)
        if progress is not None:
            progress(path, line, writer.num_tokens)
    if not samples:
        raise ValueError(
            f"{path} has no usable sample (refused: {dict(sorted(refused.items()))}); expected at least one"
        )
    return SourceCounts(samples, documents, writer.num_tokens - before, trainable, dict(sorted(refused.items())))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases when its process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(path: Path) -> str:
    check_source_path(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} could not be read: {error}") from error


def _read_meta(directory: Path) -> dict[str, Any]:
    try:
        meta = json.loads((directory / _META).read_text(encoding="utf-8"))
        meta["sources"] = [SourceCounts(**counts) for counts in meta["sources"]]
        return {name: meta[name] for name in ("key", "vocab_size", "sources")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{directory} is damaged: {_META} is unreadable ({error}); expected a whole cache") from error


def _mapped(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else -1
    if size != expected or not size:
        raise ValueError(f"{path} is damaged: {max(size, 0)} bytes; expected {expected}")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)
