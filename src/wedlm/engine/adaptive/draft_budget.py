# SPDX-License-Identifier: Apache-2.0
"""Auto decoding: how many rows a verified window gets in the next step, given what steps cost and how drafts fare.

Every choice gives AR's text, so load never changes an answer; it changes only when the answer comes. The choice was
simulated before it was built: tests/engine/test_draft_budget.py, docs/log.md.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from wedlm.algorithm.params import drafts_of, verified_rows
from wedlm.engine.adaptive.step_costs import StepCosts


class Budget(NamedTuple):
    """What a step allows a window: a number of rows, and a number of drafts among them."""

    rows: int
    drafts: int

    @classmethod
    def of(cls, rows: int) -> "Budget":
        """The budget with as many drafts as ``rows`` rows sustain."""
        return cls(rows, drafts_of(rows))


# (k + 1)(k + 2) rows have k drafts in every step, (k + 1)² in most of them.
ROW_BUDGETS = (1, 4, 6, 9, 12, 16, 20, 25, 30, 36, 42, 49, 56, 64)
_BUDGETS = tuple(map(Budget.of, ROW_BUDGETS))
# More drafts than the rows sustain come in every other step: one makes them, the next verifies them. That pays where
# the first few rows are nearly free and others are not, as on a CPU.
_BUDGETS_BY_TURNS = tuple(sorted({*_BUDGETS, Budget(4, 2), Budget(5, 2), Budget(5, 3), Budget(8, 3)}))
_MEMORY = 100.0  # steps after which an observation counts e times less
_HOPE = 0.85  # assumed rate of a draft never seen yet, relative to its predecessor's
_PATIENCE = 0.02  # gain below which a budget is kept
_CALM = 8  # steps between two looks at the choice,
_OTHER_LOAD = 1.25  # unless the number of windows has changed by this factor
_PROBE_STEPS = 3  # steps of a probe: the first has no drafts yet
_SHORTEST, _LONGEST = 32, 512  # steps between probes; doubled whenever one finds nothing


@dataclass(slots=True)
class Rate:
    """A decaying share of successes."""

    successes: float = 0.0
    trials: float = 0.0

    def add(self, success: bool, keep: float, weight: float = 1.0) -> None:
        self.successes, self.trials = self.successes * keep + success * weight, self.trials * keep + weight

    def fade(self, most: float) -> None:
        """Let all observations count as at most ``most`` trials."""
        if self.trials > most:
            self.successes, self.trials = self.successes * most / self.trials, most

    def value(self, prior: float) -> float:
        """The share, pulled towards ``prior`` by two imagined trials."""
        return (self.successes + 2 * prior) / (self.trials + 2)


@lru_cache(maxsize=4096)
def longest_draft(num_rows: int, num_drafts: int, num_accepted: int, most: int) -> int:
    """The most drafts that a step of ``num_rows`` rows can leave to the next one, which takes at most ``most``.

    It divides rows as ``verify`` does: the last groups get those left over, and a group's first row guesses AR's own
    token.
    """
    size, large = divmod(num_rows - 1 - num_drafts, num_drafts + 1)
    return max(0, min(most, size + (num_accepted >= num_drafts + 1 - large) - 1))


def expected_step(budget: Budget, accepts: tuple[float, ...], offers: tuple[float, ...]) -> tuple[float, float]:
    """(tokens, rows) of a step in the long run, for drafts that are accepted and offered (certain enough to be drafted)
    at these rates by depth, given their predecessors."""
    return _expected_step(budget, accepts[: budget.drafts], offers[: budget.drafts])


@lru_cache(maxsize=4096)
def _expected_step(budget: Budget, accepts: tuple[float, ...], offers: tuple[float, ...]) -> tuple[float, float]:
    """Takes microseconds, since the engine waits for it: a look at the choice computes one for each budget."""
    row_budget, most = budget
    offered = np.zeros((most + 1, most + 1))  # chance of each number of drafts, by how many are possible
    possible = np.zeros((most + 1, most + 1))  # chance of each number of possible drafts, by how many a step has
    tokens, rows = np.empty(most + 1), np.empty(most + 1)  # of a step, by its number of drafts
    for drafts in range(most + 1):
        offered[drafts, : drafts + 1] = _accepted(drafts, offers)
        num_rows, chances = verified_rows(drafts, row_budget, most), _accepted(drafts, accepts)
        for accepted, chance in enumerate(chances):
            possible[drafts, longest_draft(num_rows, drafts, accepted, most)] += chance
        tokens[drafts], rows[drafts] = 1 + sum(i * p for i, p in enumerate(chances)), num_rows
    # Of 64 steps, in each of which half of the chance stays, because numbers of drafts may alternate.
    share = np.linalg.matrix_power((possible @ offered + np.eye(most + 1)) / 2, 64)[0]
    return float(share @ tokens), float(share @ rows)


def _accepted(count: int, rates: tuple[float, ...]) -> list[float]:
    """The probabilities that the first 0, 1, … count of a chain hold."""
    chances, so_far = [], 1.0
    for rate in rates[:count]:
        chances.append(so_far * (1 - rate))
        so_far *= rate
    return [*chances, so_far]


@dataclass
class DraftBudget:
    """Chooses the budget of each step."""

    costs: StepCosts
    budget: Budget = field(default_factory=lambda: Budget.of(16))
    _accepts: list[Rate] = field(default_factory=lambda: [Rate() for _ in range(8)])
    _offers: list[Rate] = field(default_factory=lambda: [Rate() for _ in range(8)])
    # Seconds beside the forward's, by number of windows, then by row budget: of steps without masked rows, and of steps
    # with some. What rows cost beyond the table (attention, choice) is learnt with the budget that ran. Below 0 where
    # the table is too high, because the machine was busy when it was measured.
    _beside: tuple[dict[int, dict[int, float]], ...] = field(default_factory=lambda: ({}, {}))
    _since: int = 0  # steps since the last probe, or left of this one if negative
    _interval: int = _SHORTEST
    _calm: int = 0  # steps until the choice is looked at again
    _chosen_for: int = 0  # windows
    _rates_then: tuple[tuple[float, ...], ...] | None = None  # when the choice was last looked at

    def candidates(self, most: int) -> list[Budget]:
        """All budgets that may be chosen for windows of at most ``most`` rows; AR comes first."""
        known = _BUDGETS if self.costs.padded else _BUDGETS_BY_TURNS
        return [one for one in known if one.rows <= most and one.drafts <= drafts_of(most)]

    def can_pay(self, num_windows: int, most: int) -> list[Budget]:
        """The candidates that are faster than AR if all drafts are right, and AR."""
        alone, *others = self.candidates(most)
        perfect = (1.0,) * 8, (1.0,) * 8
        speed = self._speed(alone, num_windows)
        return [alone, *(b for b in others if self._speed(b, num_windows, *perfect) > speed)]

    def choose(self, num_windows: int, most: int) -> Budget:
        """Choose what the next step allows each of its ``num_windows`` windows, at most ``most`` rows."""
        self._since += 1
        if self._since < 0:
            return self.within(most)
        fewer, more = sorted((num_windows, self._chosen_for))
        if self._calm > 0 and self.budget.rows <= most and more < _OTHER_LOAD * fewer:
            self._calm -= 1
            return self._maybe_probe(num_windows, most)
        self._calm, self._chosen_for = _CALM, num_windows
        rates = self._rates_then = self.rates()
        speeds = {b: self._speed(b, num_windows, *rates) for b in self.candidates(most)}
        best = max(speeds, key=lambda b: speeds[b])
        keep = self.budget in speeds and speeds[best] < speeds[self.budget] * (1 + _PATIENCE)
        if not keep and best != self.budget:
            if best.rows > 1 and self.budget.rows == 1:
                self._interval = _SHORTEST
            self.budget = best
            self._since = 0
        return self._maybe_probe(num_windows, most)

    def within(self, most: int) -> Budget:
        """The present budget, or what ``most`` rows allow if that is less."""
        return self.budget if self.budget.rows <= most else Budget.of(most)

    def _maybe_probe(self, num_windows: int, most: int) -> Budget:
        """Try drafts now and then, because AR alone learns nothing about them. If even perfect drafts would not pay
        off, try rarely: the costs may have been measured while the machine was busy."""
        if self.budget.rows > 1 or self._since < self._interval:
            return self.budget
        self._since = 0
        candidates = self.candidates(most)
        probe = next((b for b in (Budget(4, 2), Budget.of(6)) if b in candidates), None)
        is_early = self._interval < _LONGEST
        self._interval = min(2 * self._interval, _LONGEST)
        if probe is None or (is_early and len(self.can_pay(num_windows, most)) == 1):
            return self.budget
        for rate in (*self._accepts, *self._offers):
            rate.fade(num_windows)
        self._since, self._calm, self.budget = -_PROBE_STEPS, 0, probe
        return probe

    def observe(self, num_drafts: int, num_accepted: int, longest: int, num_windows: int, count: int = 1) -> None:
        """Record what became of the drafts of one window in a step, or of ``count`` windows with the same outcome.
        ``longest`` is the number of drafts that were possible."""
        keep_one = 1 - 1 / (_MEMORY * max(1, num_windows))
        keep = keep_one**count
        weight = (1 - keep) / (1 - keep_one)  # of ``count`` trials, the earlier ones decayed
        for depth, rate in enumerate(self._accepts[: min(num_drafts, num_accepted + 1)]):
            rate.add(depth < num_accepted, keep, weight)
        for depth, rate in enumerate(self._offers[: min(longest, num_drafts + 1)]):
            rate.add(depth < num_drafts, keep, weight)

    def observe_time(self, num_windows: int, num_rows: int, seconds: float, row_budget: int) -> None:
        """Record how long a step of windows alone took, from result to result. ``row_budget`` laid out its windows; the
        present budget is a later one, and a step of another counted as AR's would make AR look dear for good."""
        ran, forward = row_budget if num_rows > num_windows else 1, self.costs(num_rows)
        by_windows = self._beside[ran > 1]
        seen = by_windows.get(num_windows, {})
        before = seen[ran] if ran in seen else self.seconds_beside(num_windows, ran) if by_windows else 0.0
        # A pause of the machine, or a capture, is not a cost of the step.
        most = before + (abs(before) + 1e-3 if ran in seen else forward)
        share = 0.1 if ran in seen else 0.5 if by_windows else 1.0
        by_windows.setdefault(num_windows, {})[ran] = before + share * (min(seconds - forward, most) - before)

    def expected(self) -> tuple[float, float]:
        """(tokens, rows) of a step with the present budget."""
        return expected_step(self.budget, *(self._rates_then or self.rates()))

    def seconds_beside(self, num_windows: int, row_budget: int) -> float:
        """The seconds of a step besides its forward, as observed with the number of windows nearest to this one, and
        among those with the nearest row budget. Unseen batch sizes count as free, so that they get tried once."""
        seen = self._beside[row_budget > 1] or (self._beside[0] if row_budget > 1 else {})
        if not seen:
            return 0.0
        by_budget = seen[min(seen, key=lambda number: abs(number - num_windows))]
        return by_budget[min(by_budget, key=lambda rows: abs(rows - row_budget))]

    def rates(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(accepted, offered) by depth, rounded so that equal situations are computed once."""
        accepts, offers = [], []
        prior = 0.7
        for rate in self._accepts:
            accepts.append(round(rate.value(prior), 2))
            prior = accepts[-1] * _HOPE
        prior = 0.9
        for rate in self._offers:
            offers.append(round(rate.value(prior), 2))
            prior = offers[-1]
        return tuple(accepts), tuple(offers)

    def _speed(
        self, budget: Budget, num_windows: int, accepts: tuple[float, ...] = (), offers: tuple[float, ...] = ()
    ) -> float:
        """Tokens a second for one window."""
        tokens, rows = expected_step(budget, accepts, offers)
        rows = budget.rows if self.costs.padded else rows
        return tokens / self.costs.of_step(num_windows * rows, self.seconds_beside(num_windows, budget.rows))
