# SPDX-License-Identifier: Apache-2.0
"""How much of a prompt may share a step with windows that are being decoded, so that their tokens keep coming."""

from dataclasses import dataclass

from wedlm.engine.adaptive.step_costs import StepCosts

_SMALLEST_CHUNK = 32  # a prompt makes progress however expensive its rows are
_NEW = 0.1  # weight of the latest observation


@dataclass
class PrefillBudget:
    """Limits the rows of chunks beside windows, so that such a step takes at most ``ratio`` times what the windows
    alone take.

    ``costs`` knows forwards; the rest of a step (attention, the host) is observed.
    """

    costs: StepCosts
    ratio: float
    _beside_windows: float = 0.0  # seconds, of steps of windows alone
    _beside_chunks: float = 0.0  # of steps with chunks

    def chunk_rows(self, window_rows: int) -> int:
        """The most rows of chunks beside ``window_rows`` rows of windows."""
        alone = self.costs(window_rows) + self._beside_windows
        beside = max(self._beside_chunks, self._beside_windows)
        return max(_SMALLEST_CHUNK, self.costs.rows_within(self.ratio * alone - beside) - window_rows)

    def observe(self, window_rows: int, chunk_rows: int, seconds: float) -> None:
        """Record how long a step with windows took."""
        beside = max(0.0, seconds - self.costs(window_rows + chunk_rows))
        if chunk_rows:
            self._beside_chunks = _towards(self._beside_chunks, beside)
        else:
            self._beside_windows = _towards(self._beside_windows, beside)


def _towards(before: float, now: float) -> float:
    """A moving average that a pause of the machine barely moves."""
    return before + _NEW * (min(now, 2 * before + 2e-3) - before)
