# SPDX-License-Identifier: Apache-2.0
"""Drafts looked up in the text (n-gram, or prompt-lookup, drafts): what followed the last tokens where they stood
before.

They need neither masked rows nor training, and verification treats them like any draft. ``TextLookup`` runs on the
host; ``propose`` puts its finds into windows on any device.
"""

from array import array
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from wedlm.algorithm.params import verified_rows
from wedlm.algorithm.verify import verified_width
from wedlm.algorithm.window import WindowState

SHORTEST = 2  # tokens that must match
_LONGEST, _MOST_CANDIDATES = 32, 16
_MOST_ADDED = 4096  # tokens that one call of ``find`` adds


class TextLookup:
    """Finds where the end of a growing text has stood before.

    Each pair of tokens knows where it stood last, and each of those places the one before it. A search walks back over
    at most ``candidates`` places and compares at most ``longest`` tokens at each, so its time is bounded for any text,
    and memory is linear in the text. Among equally long matches the latest wins. A match that continues like the text
    is kept: it grows with the text, and may lie further back than a search looks.

    The caller owns ``text`` and may only append to it.
    """

    def __init__(self, text: list[int], longest: int = _LONGEST, candidates: int = _MOST_CANDIDATES) -> None:
        self._text, self._longest, self._candidates = text, longest, candidates
        self._latest: dict[int, int] = {}  # by pair of tokens: where it ended last
        self._before = array("q", [0])  # by place: where the pair that ends there ended before; 0: nowhere
        self._source = self._length = 0  # the match: where it ended, and its tokens

    def find(self) -> tuple[int, int]:
        """(length, source): ``text[:source]`` ends with the last ``length`` tokens of the text. (0, 0) if fewer than
        ``SHORTEST`` tokens match, or if the text has grown by more than one call may add."""
        self._add()
        if len(self._before) <= len(self._text):
            return 0, 0
        if self._length < self._longest:
            self._search()
        return (self._length, self._source) if self._length >= SHORTEST else (0, 0)

    def draft(self, source: int, count: int) -> list[int]:
        """The ``count`` tokens after ``source``, a place from ``find``. Past the end of the text they repeat, as the
        text would if it continued in the same way."""
        tokens = self._text[source : source + count]
        period = len(self._text) - source
        while len(tokens) < count:
            tokens += tokens[len(tokens) - period :][: count - len(tokens)]
        return tokens

    def _add(self) -> None:
        text, latest, before = self._text, self._latest, self._before
        first = len(before)
        for end in range(first, min(len(text), first + _MOST_ADDED - 1) + 1):
            token = text[end - 1]
            if self._source and text[self._source] == token:
                self._source, self._length = self._source + 1, self._length + 1
            else:
                self._source = self._length = 0
            if end < SHORTEST:
                before.append(0)
                continue
            pair = text[end - 2] << 32 | token
            before.append(latest.get(pair, 0))
            latest[pair] = end

    def _search(self) -> None:
        end = place = len(self._text)
        for _ in range(self._candidates):
            place = self._before[place]
            if not place:
                return
            length = self._common(place, end)
            if length > self._length:
                self._source, self._length = place, length
                if length >= self._longest:
                    return

    def _common(self, place: int, end: int) -> int:
        """How many tokens before ``place`` equal those before ``end``, at most ``longest``."""
        text, most = self._text, min(self._longest, place)
        length = SHORTEST
        while length < most and text[place - 1 - length] == text[end - 1 - length]:
            length += 1
        return length


@dataclass(frozen=True, slots=True)
class Proposal:
    """``tokens`` that may follow the first ``known`` tokens of a text, found by a match of ``length`` tokens at their
    end.

    A step takes at most ``most`` of them as drafts.
    """

    known: int
    tokens: list[int]
    length: int
    most: int

    def drafts(self, num_tokens: int, last: int, max_positions: int) -> list[int]:
        """The drafts of a step for a text that may have grown to ``num_tokens`` since: the tokens after ``last``, the
        newest one, if ``last`` was proposed, up to the model's length."""
        grown = num_tokens - self.known
        if grown > len(self.tokens) or (grown and self.tokens[grown - 1] != last):
            return []
        return self.tokens[grown : grown + max(0, min(self.most, max_positions - num_tokens))]


@dataclass(frozen=True)
class Proposals:
    """One proposal for each of S windows: P columns of tokens, of which ``count`` are proposed; ``known`` and ``most``
    as in ``Proposal``."""

    tokens: Int[Tensor, "S P"]
    count: Int[Tensor, " S"]
    known: Int[Tensor, " S"]
    most: Int[Tensor, " S"]


def propose(
    state: WindowState,
    row_budget: Int[Tensor, " S"],
    max_drafts: Int[Tensor, " S"],
    max_positions: Int[Tensor, " S"],
    proposals: Proposals,
) -> WindowState:
    """Put proposals into verified windows in place of their own drafts, as ``Proposal.drafts`` says. A window whose
    anchor, the end of its text, fits no proposal stays as it is. If the limits leave rows besides the drafts, masked
    rows take them."""
    anchor, room = state.tokens[:, 0], max_positions - state.cached
    grown = state.cached + 1 - proposals.known
    last = proposals.tokens.shape[1] - 1
    before = proposals.tokens.gather(1, (grown - 1).clamp(0, last)[:, None])[:, 0]
    fits = (grown == 0) | ((grown > 0) & (grown <= proposals.count) & (before == anchor))
    count = torch.minimum(torch.minimum(proposals.count - grown, proposals.most), room - 1)
    count = torch.where(fits & (state.width > 0), count, 0).clamp(min=0)
    column = torch.arange(state.tokens.shape[1], device=count.device)
    drafts = proposals.tokens.gather(1, (grown[:, None] + column - 1).clamp(0, last))
    width = verified_width(count, row_budget, max_drafts, room)
    takes = count > 0
    filled = torch.where(takes[:, None], column <= count[:, None], state.filled)
    is_draft = (column > 0) & (column <= count[:, None])
    return WindowState(
        state.cached,
        torch.where(takes, width, state.width),
        torch.where(is_draft, drafts, state.tokens),
        filled,
        state.logprobs,
    )


def propose_one(
    state: WindowState, window: int, row_budget: int, max_drafts: int, max_positions: int, proposal: Proposal
) -> None:
    """``propose`` for one window of a state on the CPU, in place and without many small operations."""
    num_tokens = int(state.cached[window]) + 1
    drafts = proposal.drafts(num_tokens, int(state.tokens[window, 0]), max_positions)
    if not drafts or not int(state.width[window]):
        return
    end, room = 1 + len(drafts), max_positions - num_tokens + 1
    state.tokens[window, 1:end] = torch.tensor(drafts)
    state.filled[window, :end] = True
    state.filled[window, end:] = False
    state.width[window] = min(room, verified_rows(len(drafts), min(row_budget, room), max_drafts))
