# SPDX-License-Identifier: Apache-2.0
"""How many replicas there are to be, by what is open now and by what will be when one that starts now has loaded.

It depends on no torch and no Ray; ``benchmarks/scale_model.py`` simulates it, and docs/scale.md compares.
"""

import math
from collections import deque
from dataclasses import dataclass, field

AHEAD_S = 240.0  # for a replica to load, and to be of use for a while before it is late again
LOOK_BACK_S = 15.0  # over which open requests are averaged
DOWN_AFTER_S = 600.0  # how long fewer replicas must have been enough
_WINDOW_S = 60.0  # over which the slope is taken
_APART_S = 1.0  # between two samples, at least
_MOST_GROWTH = 3.0  # of what is open, that is believed


@dataclass
class LookAhead:
    """``target`` open requests a replica, of those that there are or, if they become more, of those that there will be
    after ``ahead_s`` seconds. It never asks for fewer than now need, nor for more than three times as many."""

    target: float
    ahead_s: float = AHEAD_S
    _seen: deque[tuple[float, float]] = field(default_factory=deque)  # when, and how many were open

    def wanted(self, num_open: float, now_s: float) -> float:
        """Replicas, not rounded. It is called again and again, and remembers a minute of samples."""
        if not self._seen or now_s - self._seen[-1][0] >= _APART_S:
            self._seen.append((now_s, num_open))
            while now_s - self._seen[0][0] > _WINDOW_S:
                self._seen.popleft()
        expected = num_open + self.ahead_s * self._rise()
        return max(num_open, min(expected, _MOST_GROWTH * num_open)) / self.target

    def _rise(self) -> float:
        """Open requests a second by which they rise, by least squares, less what chance may do; at least 0. It is 0
        before half a window has been seen, which says too little."""
        seconds = self._seen[-1][0] - self._seen[0][0]
        if seconds < _WINDOW_S / 2:
            return 0.0
        count = len(self._seen)
        mean_s, mean = (sum(one[i] for one in self._seen) / count for i in (0, 1))
        spread = sum((when - mean_s) ** 2 for when, _ in self._seen)
        slope = sum((when - mean_s) * (num_open - mean) for when, num_open in self._seen) / spread
        # One standard error of the slope, as if arrivals were by chance and an average forgot the one before.
        chance = math.sqrt(12 * mean * LOOK_BACK_S / seconds**3)
        return max(0.0, slope - chance)
