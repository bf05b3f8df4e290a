# SPDX-License-Identifier: Apache-2.0
"""Turn times into figures, and several runs into a row. Imports nothing, because vLLM's process uses it, too."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Figures = dict[str, float]
TableRow = dict[str, Any]


@dataclass
class Delivered:
    """When a request came, and how many tokens it had received when (seconds of one clock)."""

    came: float
    at: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, now: float, num_tokens: int) -> None:
        """Record that it has ``num_tokens`` tokens in all by now."""
        new = num_tokens - sum(self.counts)
        if new > 0:
            self.at.append(now)
            self.counts.append(new)


def answer_figures(answers: Sequence[Delivered], seconds: float) -> Figures:
    """Figures of requests that ran to their ends. ``tok_per_s`` is over all ``seconds``; ``stream_tok_per_s`` is what
    one stream got after its first tokens (median); ``between_ms`` is the time between deliveries of one or several
    tokens."""
    first = [1e3 * (one.at[0] - one.came) for one in answers]
    gaps = [1e3 * (after - before) for one in answers for before, after in itertools.pairwise(one.at)]
    stream = [sum(one.counts[1:]) / (one.at[-1] - one.at[0]) for one in answers if len(one.at) > 1]
    tokens = sum(sum(one.counts) for one in answers)
    return {
        "tok_per_s": tokens / seconds,
        "stream_tok_per_s": statistics.median(stream) if stream else 0.0,
        "first_token_ms": statistics.median(first),
        "first_token_p99_ms": percentile(first, 0.99),
        "between_ms": statistics.median(gaps) if gaps else 0.0,
        "between_p99_ms": percentile(gaps, 0.99) if gaps else 0.0,
        "tokens": tokens,
        "seconds": seconds,
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def make_row(label: dict[str, Any], runs: Sequence[Figures], **more: Any) -> TableRow:
    """The label, medians over runs, and the spread: the least and most of each figure."""
    names = list(runs[0])
    values = {name: [run[name] for run in runs] for name in names}
    return {
        **label,
        **{name: rounded(statistics.median(values[name])) for name in names},
        **more,
        "runs": len(runs),
        "spread": {name: [rounded(min(values[name])), rounded(max(values[name]))] for name in names},
    }


def ratio_row(label: dict[str, Any], pairs: Sequence[tuple[Figures, Figures]], figure: str) -> TableRow:
    """A row of interleaved pairs (base, other): the ratio of other's figure to base's."""
    ratios = [other[figure] / base[figure] for base, other in pairs]
    bases, others = ([figures[figure] for figures in side] for side in zip(*pairs, strict=True))
    return {
        **label,
        "figure": figure,
        "median_ratio": rounded(statistics.median(ratios)),
        "ratio_of_means": rounded(statistics.mean(others) / statistics.mean(bases)),
        "runs": len(pairs),
        "spread": {"ratio": [rounded(min(ratios)), rounded(max(ratios))]},
        "ratios": [rounded(ratio) for ratio in ratios],
    }


def rounded(value: float) -> float:
    """Five significant digits: no clock here is more exact."""
    return float(f"{value:.5g}")


def describe(label: dict[str, Any]) -> str:
    """A label in a few words."""
    return ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in label.items())
