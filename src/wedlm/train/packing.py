# SPDX-License-Identifier: Apache-2.0
"""Pack documents into sequences of equal length: decide, from lengths alone, which pieces go into which sequence."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

OPEN_SEQUENCES = 512  # sequences that are filled side by side; more leave less padding
_SHUFFLE_PIECES, _SHUFFLE_SEQUENCES, _PHASES = 1, 2, 3  # purposes of random keys


@dataclass(frozen=True, slots=True, eq=False)
class PackedSequence:
    """One sequence of L positions: arrays [L]. Padding, if there is any, comes last.

    tokens int64 (padding: the pad id); positions int64, from 0 in each document (padding: 0), and ascending unless it
    has a gap (``infill.py``); documents int64, 0, 1, 2… in this sequence (padding: -1); trainable bool (padding:
    False).
    """

    tokens: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    trainable: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Spans of documents, at most a sequence long: int64 [P] each, in the order of the documents."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def select(self, which: np.ndarray) -> "Pieces":
        """Those of a boolean mask or an array of indices."""
        return Pieces(self.document[which], self.start[which], self.length[which])

    def __len__(self) -> int:
        return len(self.document)


@dataclass(frozen=True, slots=True, eq=False)
class Packs:
    """Sequences of an epoch: sequence r holds pieces offsets[r] to offsets[r + 1] - 1; ``offsets`` is int64 [N + 1]."""

    pieces: Pieces
    offsets: np.ndarray
    sequence_length: int

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def fill(self) -> float:
        """The share of the sequences' positions that hold a token."""
        positions = self.num_sequences * self.sequence_length
        return float(self.pieces.length.sum()) / positions if positions else 0.0


def cut_documents(lengths: np.ndarray, sequence_length: int) -> Pieces:
    """Cut every document (given by its number of tokens) into pieces of ``sequence_length``, the last one shorter;
    nothing is lost."""
    if sequence_length < 2:
        raise ValueError(f"sequence_length is {sequence_length}; expected at least 2")
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // sequence_length)
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document), dtype=np.int64) - first) * sequence_length
    return Pieces(document, start, np.minimum(lengths[document] - start, sequence_length))


def plan_epoch(
    pieces: Pieces,
    repeats: np.ndarray,
    sequence_length: int,
    seed: int,
    epoch: int,
    groups: np.ndarray | None = None,
) -> Packs:
    """The sequences of one epoch, the same for the same arguments on every machine.

    ``repeats`` float [D]: how often each document is seen in an epoch. A fraction is a share of the documents, a
    different one in every epoch, until all had their turn; shares are drawn within documents of the same ``groups``
    entry (int [D], by default all in one group). Order and neighbours are shuffled; a piece is never cut.
    """
    copies = copies_in_epoch(np.asarray(repeats, dtype=np.float64), seed, epoch, groups)
    chosen = np.repeat(np.arange(len(pieces), dtype=np.int64), copies[pieces.document])
    chosen = chosen[np.argsort(_keys(len(chosen), seed, epoch, _SHUFFLE_PIECES), kind="stable")]
    ordered = pieces.select(chosen)
    sequence_of, num_sequences = _best_fit(ordered.length, sequence_length)
    # Sequences of long pieces are full at once and others at the end: shuffled, so that a run's batches are alike.
    rank = np.empty(num_sequences, dtype=np.int64)
    rank[np.argsort(_keys(num_sequences, seed, epoch, _SHUFFLE_SEQUENCES), kind="stable")] = np.arange(num_sequences)
    sequence_of = rank[sequence_of]
    offsets = np.zeros(num_sequences + 1, dtype=np.int64)
    np.cumsum(np.bincount(sequence_of, minlength=num_sequences), out=offsets[1:])
    return Packs(ordered.select(np.argsort(sequence_of, kind="stable")), offsets, sequence_length)


def copies_in_epoch(repeats: np.ndarray, seed: int, epoch: int, groups: np.ndarray | None = None) -> np.ndarray:
    """How often each document is seen in this epoch: int64 [D]. Over many epochs the average is exactly ``repeats``."""
    if not (np.isfinite(repeats).all() and (repeats >= 0).all()):
        raise ValueError(f"repeat is {repeats.min()}; expected a finite number >= 0")
    phases = _phases(np.zeros(len(repeats), dtype=np.int64) if groups is None else groups, seed)
    # A document's count up to an epoch is a rounded-down line, and its phase says when the line reaches an integer.
    return (np.floor((epoch + 1) * repeats + phases) - np.floor(epoch * repeats + phases)).astype(np.int64)


def random_order(count: int, seed: int) -> np.ndarray:
    """A permutation of 0..count-1 that depends only on ``count`` and ``seed``."""
    return np.argsort(_keys(count, seed), kind="stable")


def _phases(groups: np.ndarray, seed: int) -> np.ndarray:
    """Evenly spaced in (0, 1) within each group, dealt at random."""
    shuffled = np.argsort(_keys(len(groups), seed, _PHASES), kind="stable")
    by_group = shuffled[np.argsort(groups[shuffled], kind="stable")]
    _, starts, sizes = np.unique(groups[by_group], return_index=True, return_counts=True)
    within = np.arange(len(groups)) - np.repeat(starts, sizes)
    phases = np.empty(len(groups))
    phases[by_group] = (within + 0.5) / np.repeat(sizes, sizes)
    return phases


def _best_fit(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, int]:
    """The sequence of each piece, and how many sequences there are.

    A piece goes to the open sequence with the least room that suffices, or to a new one; of more than OPEN_SEQUENCES
    open sequences the fullest is closed.
    """
    sequence_of: list[int] = []
    num_sequences = 0
    open_sequences: list[int] = []  # room and sequence as one integer, sorted
    shift = 40
    for length in lengths.tolist():
        at = bisect_left(open_sequences, length << shift)
        if at < len(open_sequences):
            entry = open_sequences.pop(at)
            room, sequence = entry >> shift, entry & ((1 << shift) - 1)
        else:
            room, sequence = sequence_length, num_sequences
            num_sequences += 1
        sequence_of.append(sequence)
        if room > length:
            insort(open_sequences, (room - length) << shift | sequence)
            if len(open_sequences) > OPEN_SEQUENCES:
                del open_sequences[0]
    return np.array(sequence_of, dtype=np.int64), num_sequences


def _keys(count: int, *words: int) -> np.ndarray:
    """Pseudo-random uint64 [count] from integers: SplitMix64's mixing, written out so that no release can change it."""
    with np.errstate(over="ignore"):
        state = np.uint64(0)
        for word in words:
            state = _mix(np.asarray([state ^ np.uint64(word & 0xFFFFFFFFFFFFFFFF)], dtype=np.uint64))[0]
        return _mix(np.arange(count, dtype=np.uint64) ^ state)


def _mix(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
