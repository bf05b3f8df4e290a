# SPDX-License-Identifier: Apache-2.0
"""Auto streaming: how many positions a window covers, from what steps cost and what windows of each width kept.

Unlike auto decoding's choices this one changes the text: what a window fills depends on what it covers. So it is never
chosen for a request that did not ask for it.
"""

import math
from dataclasses import dataclass, field

from wedlm.engine.adaptive.draft_budget import Rate, StepCosts

WIDTHS = (2, 4, 6, 8, 12, 16, 24, 32)
_GAIN = 0.5  # what is assumed of a width that nobody has tried lately: tokens a step go with this power of it
_FIRST = 1.2  # tokens a step before anything is known
_MEMORY = 200.0  # steps after which an observation counts e times less
_FORGOTTEN = 0.5  # such a number of steps is no longer known
_STEPS = 8  # between two decisions: a window needs some steps to settle
_PATIENCE = 0.03  # gain below which a width is kept


@dataclass
class AutoWindow:
    """Chooses the width of all windows of auto streaming, step by step."""

    costs: StepCosts
    width: int = 16
    _kept: dict[int, Rate] = field(default_factory=dict)  # tokens of a window's step, by width
    _left: int = 0  # steps until the choice is looked at again

    def choose(self, num_windows: int, most: int) -> int:
        """The width that the next step leaves to its windows, at most ``most``, for ``num_windows`` of them."""
        self._left -= 1
        if self._left <= 0 or self.width > most:
            self._left = _STEPS
            speeds = {width: self._speed(width, num_windows) for width in (*(w for w in WIDTHS if w < most), most)}
            best = max(speeds, key=lambda width: speeds[width])
            if self.width not in speeds or speeds[best] > speeds[self.width] * (1 + _PATIENCE):
                self.width = best
        return self.width

    def observe(self, width: int, num_tokens: int, num_windows: int) -> None:
        """What one window of this width kept in a step."""
        keep = 1 - 1 / (_MEMORY * max(1, num_windows))
        for rate in self._kept.values():
            rate.successes, rate.trials = rate.successes * keep, rate.trials * keep
        rate = self._kept.setdefault(width, Rate())
        rate.successes, rate.trials = rate.successes + num_tokens, rate.trials + 1

    def _tokens(self, width: int) -> float:
        """Tokens a step: as seen lately; between two widths seen, in between; beyond them, by the assumed power."""
        seen = {w: rate.successes / rate.trials for w, rate in self._kept.items() if rate.trials > _FORGOTTEN}
        if not seen:
            return _FIRST * (width / self.width) ** _GAIN
        below, above = (
            max((w for w in seen if w <= width), default=None),
            min((w for w in seen if w >= width), default=None),
        )
        if below is None or above is None:
            nearest = above if below is None else below
            assert nearest is not None
            return max(1.0, seen[nearest] * (width / nearest) ** _GAIN)
        share = math.log(width / below) / math.log(above / below) if above > below else 0.0
        return seen[below] + share * (seen[above] - seen[below])

    def _speed(self, width: int, num_windows: int) -> float:
        """Tokens a second of one window: a step runs the window and what it commits."""
        tokens = self._tokens(width)
        rows = 2 * width if self.costs.padded else width + tokens
        return tokens / self.costs(num_windows * rows)
