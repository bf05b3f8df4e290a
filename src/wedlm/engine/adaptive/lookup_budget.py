# SPDX-License-Identifier: Apache-2.0
"""Auto decoding: how many drafts from the text a window takes in the next step, in place of its own.

Each step shows whether they would be right, even if it takes none, because every find is compared with what came.
Nothing has to be tried out, and a request whose text never repeats itself only pays for the search.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from wedlm.algorithm.lookup import Proposal, TextLookup
from wedlm.algorithm.params import verified_rows
from wedlm.engine.adaptive.draft_budget import Rate
from wedlm.engine.adaptive.step_costs import StepCosts

# A draft's chance depends on how many tokens before it match, the accepted drafts among them.
_LENGTHS = (3, 4, 6, 8, 12, 16, 24, 32)  # where the next class of them begins
_PRIORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)  # by class, before anything was seen
_MEMORY, _OWN_MEMORY = 400.0, 50.0  # drafts after which an observation counts e times less, for all and for a request
_PATIENCE = 0.04  # gain below which a window keeps its own drafts
_COUNTS = frozenset((1, 2, 3, 5, 7, 11, 15))  # of drafts, that are weighed
_FEW, _LONGEST_PAUSE = 8, 7  # windows that are looked up in every step; steps without a search
_UNLIKELY = 0.02  # drafts that are reached more rarely are not weighed


def _rates() -> list[Rate]:
    return [Rate() for _ in _PRIORS]


@dataclass(slots=True)
class RequestLookup:
    """What the text of one request has shown."""

    lookup: TextLookup
    rates: list[Rate] = field(default_factory=_rates)
    _pause: int = 0  # steps that it does not look anything up, and how many it did not last time
    _last_pause: int = 0

    def rests(self, num_windows: int) -> bool:
        """Whether it skips the lookup in this step. Searches for many windows take the host as long as a step of a
        small model takes a GPU, so after a while without success the next search waits."""
        if num_windows <= _FEW or not self._pause:
            return False
        self._pause -= 1
        return True

    def note(self, taken: bool) -> None:
        """Note whether the window took anything of what was found for it."""
        self._last_pause = 0 if taken else min(2 * self._last_pause + 1, _LONGEST_PAUSE)
        self._pause = self._last_pause

    def find(self, count: int, ends: Sequence[int]) -> tuple[int, list[int]]:
        """(length of the match, at most ``count`` tokens that may follow it, none after an end token)."""
        length, source = self.lookup.find()
        if not length:
            return 0, []
        tokens = self.lookup.draft(source, count)
        for i, token in enumerate(tokens):
            if token in ends:
                return length, tokens[: i + 1]
        return length, tokens


@dataclass(slots=True)
class StepLoad:
    """The expected load of a step: rows and tokens in all, and for each window that has its own drafts.

    ``row_budget`` and ``max_drafts`` are the limits of such a window; ``beside`` are the seconds besides the forward's.
    """

    costs: StepCosts
    beside: float
    num_rows: float
    num_tokens: float
    window_rows: float
    window_tokens: float
    row_budget: int
    max_drafts: int

    def speed(self, more_rows: float, more_tokens: float) -> float:
        """Tokens a second with this many more rows and tokens."""
        return (self.num_tokens + more_tokens) / self.costs.of_step(self.num_rows + more_rows, self.beside)


class LookupBudget:
    """Chooses for each window of each step, and learns from each."""

    def __init__(self) -> None:
        self._rates = _rates()

    def choose(self, load: StepLoad, request: RequestLookup, length: int, most: int) -> int:
        """Choose how many drafts a window takes, at most ``most``, given that a match of ``length`` tokens found them.
        0 keeps its own drafts. ``load`` is updated."""
        best, chosen, change = load.speed(0, 0) * (1 + _PATIENCE), 0, (0.0, 0.0)
        expected, reached, seen, chance = 1.0, 1.0, -1, 0.0
        for count in range(1, most + 1):
            place = bisect_right(_LENGTHS, length + count - 1)
            if place != seen:
                seen, chance = place, request.rates[place].value(self._rates[place].value(_PRIORS[place]))
            reached *= chance
            if reached < _UNLIKELY:
                break
            expected += reached
            if count not in _COUNTS and count != most:
                continue
            rows = verified_rows(count, max(load.row_budget, count + 1), load.max_drafts)
            # Without masked rows the next step has no drafts of its own, and others only if the match goes on.
            lost = (load.window_tokens - 1) * (1 - reached * chance) if rows == count + 1 else 0.0
            if load.costs.padded:
                rows = max(load.row_budget, count + 1)
            more = rows - load.window_rows, expected - lost - load.window_tokens
            speed = load.speed(*more)
            if speed > best:
                best, chosen, change = speed, count, more
        load.num_rows, load.num_tokens = load.num_rows + change[0], load.num_tokens + change[1]
        return chosen

    def observe(self, request: RequestLookup, proposal: Proposal, text: list[int], emitted: list[int]) -> None:
        """Compare the text after which the step began with what the step made final."""
        grown = len(text) - proposal.known
        if grown and (grown > len(proposal.tokens) or proposal.tokens[grown - 1] != text[-1]):
            return
        for i, (draft, token) in enumerate(zip(proposal.tokens[grown:], emitted, strict=False)):
            place = bisect_right(_LENGTHS, proposal.length + grown + i)
            self._rates[place].add(draft == token, 1 - 1 / _MEMORY)
            request.rates[place].add(draft == token, 1 - 1 / _OWN_MEMORY)
            if draft != token:
                return
