# SPDX-License-Identifier: Apache-2.0
"""The trainer's data: packed sequences, numbered through all epochs, so that a run can resume from a number."""

import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wedlm.model.config import ModelConfig
from wedlm.model.demo import default_cache_dir
from wedlm.model.formats.tokenizer import Tokenizer
from wedlm.train.config import Source, TrainConfig
from wedlm.train.infill import with_gaps
from wedlm.train.packing import PackedSequence, Packs, Pieces, cut_documents, plan_epoch, random_order
from wedlm.train.prefetch import prefetch as prefetch
from wedlm.train.token_cache import Progress, TokenCache, build_cache

_KEPT_EPOCHS = 2  # a prefetching reader may be an epoch ahead
PADDING = -1


@dataclass(frozen=True, slots=True)
class SourceStats:
    """One file, as far as this data uses it. ``refused``: lines skipped in the whole file, by reason."""

    path: str
    repeat: float
    documents: int
    tokens: int
    trainable: int
    refused: dict[str, int]


@dataclass(frozen=True, slots=True)
class DataStats:
    """``cut_documents`` were longer than a sequence; ``dropped_pieces`` of them had nothing to learn.

    ``sequences`` and ``fill`` (the share of positions that hold a token) are those of epoch 0.
    """

    sources: tuple[SourceStats, ...]
    pieces: int
    cut_documents: int
    dropped_pieces: int
    dropped_tokens: int
    sequences: int
    fill: float


class PackedData:
    """Documents of a cache in sequences of ``sequence_length``, in an order that depends only on the arguments.

    ``repeats``: how often each source is seen in an epoch. ``documents``: int [D'], those to use; default: all.
    ``infill_share`` and ``infill_length`` are as in ``TrainConfig``. ``pad_token_id`` is the end token, too. Sequences
    of epoch 0 come first, then those of epoch 1 and so on without end. Several threads may call its methods.
    """

    def __init__(
        self,
        cache: TokenCache,
        repeats: Sequence[float],
        sequence_length: int,
        seed: int,
        *,
        pad_token_id: int,
        documents: np.ndarray | None = None,
        infill_share: float = 0.0,
        infill_length: int = 32,
    ) -> None:
        if len(repeats) != len(cache.paths):
            raise ValueError(f"repeats has {len(repeats)} numbers; expected {len(cache.paths)}, one for each source")
        if not all(0 < repeat < float("inf") for repeat in repeats):
            raise ValueError(f"repeats are {list(repeats)}; expected numbers > 0")
        self.cache, self.repeats = cache, tuple(float(repeat) for repeat in repeats)
        self.sequence_length, self.seed, self.pad_token_id = sequence_length, seed, pad_token_id
        self.infill_share, self.infill_length = infill_share, infill_length
        self.documents = np.arange(cache.num_documents) if documents is None else np.sort(documents)
        if not len(self.documents):
            raise ValueError("there are no documents to train on; expected at least one")
        self._groups = np.asarray(cache.source[self.documents])
        self._repeats_D = np.asarray(self.repeats)[self._groups]
        pieces = cut_documents(cache.lengths[self.documents], sequence_length)
        kept = self._has_trainable(pieces)
        self._pieces = pieces.select(kept)
        self._dropped = pieces.select(~kept)
        self._lock = threading.Lock()
        self._plans: dict[int, Packs] = {}
        self._sequence_counts: list[int] = []
        if not len(self._pieces):
            raise ValueError("no document has a token to learn; expected replies or plain text")

    @property
    def fingerprint(self) -> str:
        """A digest of everything that the sequences depend on: equal fingerprints mean equal sequences."""
        settings = [self.cache.key, self.repeats, self.sequence_length, self.seed, self.pad_token_id]
        settings += [self.infill_share, self.infill_length] if self.infill_share else []
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(self.documents.astype("<i8").tobytes())
        return digest.hexdigest()

    def sequences_in_epoch(self, epoch: int) -> int:
        """The number of sequences; fractions of documents and their packing make epochs differ by a few."""
        while len(self._sequence_counts) <= epoch:
            self._plan(len(self._sequence_counts))
        return self._sequence_counts[epoch]

    def sequence(self, index: int) -> PackedSequence:
        """Sequence ``index`` >= 0, counted from the first sequence of epoch 0."""
        if index < 0:
            raise ValueError(f"the sequence's number is {index}; expected >= 0")
        epoch, within = 0, index
        while within >= self.sequences_in_epoch(epoch):
            within -= self.sequences_in_epoch(epoch)
            epoch += 1
        sequence = self._read(self._plan(epoch), within)
        if not self.infill_share:
            return sequence
        generator = np.random.default_rng((self.seed, index))
        return with_gaps(sequence, self.infill_share, self.infill_length, self.pad_token_id, generator)

    def stats(self) -> DataStats:
        """Figures of the data, before ``repeat``."""
        lengths, trainable = self.cache.lengths[self.documents], self.cache.num_trainable[self.documents]
        sources = []
        for source, path in enumerate(self.cache.paths):
            own = self._groups == source
            tokens, learned = int(lengths[own].sum()), int(trainable[own].sum())
            refused = self.cache.sources[source].refused
            sources.append(SourceStats(path, self.repeats[source], int(own.sum()), tokens, learned, refused))
        plan = self._plan(0)
        return DataStats(
            sources=tuple(sources),
            pieces=len(self._pieces),
            cut_documents=int((lengths > self.sequence_length).sum()),
            dropped_pieces=len(self._dropped),
            dropped_tokens=int(self._dropped.length.sum()),
            sequences=plan.num_sequences,
            fill=plan.fill,
        )

    def describe(self) -> list[str]:
        """The figures of ``stats`` as lines to show."""
        stats = self.stats()
        lines = []
        for one in stats.sources:
            refused = ", ".join(f"{count} {reason}" for reason, count in one.refused.items())
            lines.append(
                f"{Path(one.path).name}: {one.documents:,} documents, {one.tokens:,} tokens, "
                f"{one.trainable:,} to learn, repeat {one.repeat:g}"
                + (f"; lines skipped: {refused}" if refused else "")
            )
        lines.append(
            f"{stats.sequences:,} sequences of {self.sequence_length} an epoch, {stats.fill:.1%} full; "
            f"{stats.cut_documents:,} documents are longer and cut, {stats.dropped_pieces:,} pieces without a token to "
            "learn left out"
        )
        return lines

    def _plan(self, epoch: int) -> Packs:
        """The plan of an epoch; recently used ones are cached."""
        with self._lock:
            plan = self._plans.pop(epoch, None)
            if plan is None:
                plan = plan_epoch(self._pieces, self._repeats_D, self.sequence_length, self.seed, epoch, self._groups)
            self._plans[epoch] = plan  # now the latest
            while len(self._plans) > _KEPT_EPOCHS:
                del self._plans[next(iter(self._plans))]
            if epoch == len(self._sequence_counts):
                self._sequence_counts.append(plan.num_sequences)
            return plan

    def _read(self, plan: Packs, sequence: int) -> PackedSequence:
        length = self.sequence_length
        tokens = np.full(length, self.pad_token_id, dtype=np.int64)
        positions = np.zeros(length, dtype=np.int64)
        documents = np.full(length, PADDING, dtype=np.int64)
        trainable = np.zeros(length, dtype=np.bool_)
        at = 0
        for number, piece in enumerate(range(plan.offsets[sequence], plan.offsets[sequence + 1])):
            here, there = slice(at, at + int(plan.pieces.length[piece])), self._span(plan.pieces, piece)
            tokens[here] = self.cache.tokens[there]
            trainable[here] = self.cache.trainable[there]
            positions[here] = np.arange(here.stop - here.start)
            documents[here] = number
            at = here.stop
        return PackedSequence(tokens, positions, documents, trainable)

    def _span(self, pieces: Pieces, piece: int) -> slice:
        """The place of a piece in the cache."""
        start = int(self.cache.offsets[self.documents[pieces.document[piece]]] + pieces.start[piece])
        return slice(start, start + int(pieces.length[piece]))

    def _has_trainable(self, pieces: Pieces) -> np.ndarray:
        """Whether each piece has a token to learn: bool [P]."""
        has = self.cache.num_trainable[self.documents][pieces.document] > 0
        cut = self.cache.lengths[self.documents][pieces.document] > self.sequence_length
        for piece in np.flatnonzero(has & cut).tolist():
            has[piece] = self.cache.trainable[self._span(pieces, piece)].any()
        return has


def split_validation(cache: TokenCache, amount: int | float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(documents to train on, documents held out), int64 each. ``amount`` is a number of documents, or a share below 1,
    which means at least one document unless it is 0.

    Documents of one sample stay together, so a few more than requested may be held out. Raises ValueError if nothing
    remains to train on.
    """
    wanted = amount if isinstance(amount, int) else max(amount > 0, round(amount * cache.num_documents))
    if amount < 0 or (isinstance(amount, float) and amount >= 1):
        raise ValueError(f"validation_documents is {amount}; expected a number of documents, or a share >= 0 and < 1")
    is_first = np.ones(cache.num_documents, dtype=bool)
    is_first[1:] = (np.diff(cache.source) != 0) | (np.diff(cache.line) != 0)
    sample_of = np.cumsum(is_first) - 1
    order = random_order(int(is_first.sum()), seed)
    before = np.cumsum(np.bincount(sample_of)[order]) - np.bincount(sample_of)[order]
    held_out = np.isin(sample_of, order[before < wanted])
    if held_out.all():
        raise ValueError(
            f"validation_documents is {amount}; expected fewer than the {cache.num_documents} documents of train_data, "
            f"such as {max(1, cache.num_documents // 10)} of them, or 0"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def load_data(
    config: TrainConfig,
    tokenizer: Tokenizer,
    model_config: ModelConfig,
    mask_token_id: int,
    progress: Progress | None = None,
) -> tuple[PackedData, PackedData | None]:
    """Training data and, if requested, validation data. Raises ValueError for data that this model cannot learn."""
    eos = _end_token(tokenizer, model_config)

    def read(sources: Sequence[Source]) -> TokenCache:
        result = build_cache(
            [source.path for source in sources],
            tokenizer,
            config.cache_dir or default_cache_dir() / "tokens",
            eos_token_id=eos,
            num_end_tokens=config.num_learnable_im_end,
            last_message=config.trainable_messages == "last",
            skip_bad=config.skip_bad,
            progress=progress,
        )
        _check_tokens(result.cache, config, model_config, mask_token_id)
        return result.cache

    def packed(cache: TokenCache, repeats: Sequence[float], documents: np.ndarray) -> PackedData:
        return PackedData(
            cache, repeats, config.max_seq_length, config.seed, pad_token_id=eos, documents=documents,
            infill_share=config.infill_share, infill_length=config.infill_length,
        )  # fmt: skip

    cache = read(config.train_data)
    train, held_out = split_validation(cache, config.validation_documents, config.seed)
    data = packed(cache, [source.repeat for source in config.train_data], train)
    if config.validation_data:
        cache = read(config.validation_data)
        held_out = np.arange(cache.num_documents)
    if not len(held_out):
        return data, None
    return data, packed(cache, [1.0] * len(cache.paths), held_out)


def _check_tokens(cache: TokenCache, config: TrainConfig, model_config: ModelConfig, mask_token_id: int) -> None:
    if cache.largest_token_id >= model_config.vocab_size:
        raise ValueError(
            f"the data uses token {cache.largest_token_id}; expected ids below the model's {model_config.vocab_size}"
        )
    if config.objective == "wedlm":
        cache.check_mask_token_id(mask_token_id)


def _end_token(tokenizer: Tokenizer, model_config: ModelConfig) -> int:
    """The tokenizer's end token if generation stops at it, else the first token at which it stops."""
    own = tokenizer.token_id(tokenizer.special_tokens.get("eos_token", ""))
    if own is not None and own in (model_config.eos_token_ids or (own,)):
        return own
    if not model_config.eos_token_ids:
        raise ValueError("neither the model's config nor its tokenizer names an end token; expected eos_token_id")
    return model_config.eos_token_ids[0]
