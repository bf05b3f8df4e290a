# SPDX-License-Identifier: Apache-2.0
"""The table of what forwards cost, by their number of rows."""

import bisect
import math
import time
from collections.abc import Callable, Sequence


class StepCosts:
    """Seconds of a forward by total number of rows, each measured once.

    If ``padded``, costs round up to the next measured size, because CUDA graphs come in such sizes; otherwise they are
    interpolated. Beyond the largest size they are extrapolated, which is unreliable: a GPU takes the same time for any
    few rows, so noise makes the slope. Therefore ``add`` the sizes that may run.
    """

    def __init__(self, seconds_by_rows: Sequence[tuple[int, float]], padded: bool) -> None:
        self.padded = padded
        self._rows: list[int] = []
        self._seconds: list[float] = []
        for rows, seconds in seconds_by_rows:
            self.add(rows, seconds)

    @property
    def most_rows(self) -> int:
        """Largest row count measured so far, or 0."""
        return self._rows[-1] if self._rows else 0

    def add(self, rows: int, seconds: float) -> None:
        """Extend the table for everybody who holds it. ``rows`` must be more than ``most_rows``."""
        assert rows > self.most_rows
        self._rows.append(rows)
        self._seconds.append(max(seconds, self._seconds[-1] if self._seconds else 0.0))  # more never cost less

    def measure(self, forward: Callable[[int], None], most_rows: int, seconds: float) -> float:
        """Extend the table by twice the rows each time, taking the fastest of three calls of ``forward``, up to
        ``most_rows`` and until ``seconds`` have passed. Returns how many seconds passed."""
        started, spent = time.perf_counter(), 0.0
        while (rows := 2 * self.most_rows or 1) <= most_rows and spent < seconds:
            best = math.inf
            for _ in range(3):
                start = time.perf_counter()
                forward(rows)
                best = min(best, time.perf_counter() - start)
            self.add(rows, best)
            spent = time.perf_counter() - started
        return spent

    def table(self) -> list[tuple[int, float]]:
        """(rows, seconds) as measured."""
        return list(zip(self._rows, self._seconds, strict=True))

    def __call__(self, rows: float) -> float:
        i = bisect.bisect_left(self._rows, rows)
        if i == 0 or (self.padded and i < len(self._rows)):
            return self._seconds[i]
        if len(self._rows) == 1:
            return self._seconds[0] * rows / self._rows[0]
        i = min(i, len(self._rows) - 1)
        (x0, y0), (x1, y1) = ((self._rows[j], self._seconds[j]) for j in (i - 1, i))
        return y0 + (rows - x0) * (y1 - y0) / (x1 - x0)

    def of_step(self, rows: float, beside: float) -> float:
        """Seconds of a step: the forward plus what was observed besides it. The latter is negative where the table is
        too high, but perhaps less so for these rows, so at least a tenth of the forward remains."""
        forward = self(rows)
        return max(forward / 10, forward + beside)

    def rows_within(self, seconds: float) -> int:
        """The most rows that a forward of ``seconds`` can have; at least 0."""
        points = list(zip(self._rows, self._seconds, strict=True))
        if len(points) == 1 or seconds < points[0][1]:
            return int(points[0][0] * seconds / points[0][1])
        if self.padded and seconds < points[-1][1]:
            return points[bisect.bisect_right(self._seconds, seconds) - 1][0]
        i = min(bisect.bisect_right(self._seconds, seconds), len(points) - 1)
        (x0, y0), (x1, y1) = points[i - 1], points[i]
        return int(x0 + (seconds - y0) * (x1 - x0) / max(y1 - y0, 1e-9))
