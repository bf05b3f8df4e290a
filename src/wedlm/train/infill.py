# SPDX-License-Identifier: Apache-2.0
"""Documents with a gap, rearranged as decoding has them when it fills the gap between two texts.

The known tokens come first, prefix and suffix, then the middle; all keep their positions. Nothing else changes: the
streams, the noise and the masks of training go by the order of the tokens, so clean rows of the suffix see the prefix,
and blocks of the middle see both and the part of the middle before them.
"""

import dataclasses

import numpy as np

from wedlm.train.packing import PackedSequence


def with_gaps(
    sequence: PackedSequence, share: float, longest: int, end_token_id: int, generator: np.random.Generator
) -> PackedSequence:
    """The sequence with a gap in ``share`` of its documents, of the same length.

    A middle has 1 to ``longest`` tokens that should be learnt, in one run. At most as many end tokens, to be learnt,
    too, follow it, so that the model meets gaps wider than their content; the document ends that much earlier. The
    suffix is not learnt. Documents without a token to learn between two others stay as they are.
    """
    tokens, positions, trainable = (part.copy() for part in (sequence.tokens, sequence.positions, sequence.trainable))
    for document in range(int(sequence.documents.max()) + 1):
        here = np.flatnonzero(sequence.documents == document)
        chosen = generator.random() < share
        first, length = int(here[0]), len(here)
        learnt = sequence.trainable[here]
        starts = 1 + np.flatnonzero(learnt[1:-1])
        if not chosen or not len(starts):
            continue
        start = int(generator.choice(starts))
        end = min(start + int(generator.integers(1, longest + 1)), length - 1)
        stays = np.flatnonzero(~learnt[start:end])
        end = start + int(stays[0]) if len(stays) else end
        ends = min(int(generator.integers(0, end - start + 1)), length - 1 - end)
        suffix = np.arange(end, length - ends)
        middle = np.arange(start, end)
        order = np.concatenate((np.arange(start), suffix, middle))
        filler = np.arange(end, end + ends)
        inside = slice(first, first + length)
        tokens[inside] = np.concatenate((sequence.tokens[first + order], np.full(ends, end_token_id)))
        positions[inside] = np.concatenate((np.arange(start), suffix + ends, middle, filler))
        trainable[inside] = np.concatenate(
            (learnt[:start], np.zeros(len(suffix), dtype=np.bool_), np.ones(len(middle) + ends, dtype=np.bool_))
        )
    return dataclasses.replace(sequence, tokens=tokens, positions=positions, trainable=trainable)
