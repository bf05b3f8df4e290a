# SPDX-License-Identifier: Apache-2.0
"""Compare two runs question by question: who got what right, whether chance explains it, whose texts differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

from wedlm.evaluate.result_folder import Run, Sample, TaskResult, read_samples


@dataclass(frozen=True)
class Comparison:
    """Runs A and B on the questions that both answered.

    ``both`` ... ``neither`` count questions. ``differing`` are the pairs (A, B) with different texts,
    ``num_other_prompts`` counts questions that were worded differently, and ``num_unpaired`` those that only one run
    has.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    differing: Sequence[tuple[Sample, Sample]]
    num_other_prompts: int
    num_unpaired: int

    @property
    def num_questions(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def difference(self) -> float:
        """The accuracy of B minus that of A."""
        return (self.only_b - self.only_a) / self.num_questions

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval around ``difference``, by the normal approximation for paired samples."""
        disagreeing = self.only_a + self.only_b
        variance = disagreeing / self.num_questions - self.difference**2
        return 1.96 * sqrt(variance / self.num_questions)

    @property
    def p_value(self) -> float:
        """McNemar's exact test."""
        return mcnemar(self.only_a, self.only_b)

    @property
    def same_text(self) -> float:
        """The share of questions whose two answers are the same text."""
        return 1 - len(self.differing) / self.num_questions


def mcnemar(only_a: int, only_b: int) -> float:
    """The probability of a split at least this uneven if each question that only one run got right were a fair coin's
    toss.

    Two-sided and exact; 1.0 without such questions.
    """
    num = only_a + only_b
    # The integers are exact, and Python divides them correctly at any size.
    tail = sum(comb(num, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**num)


def compare_samples(a: Sequence[Sample], b: Sequence[Sample]) -> Comparison:
    """Pair samples by ``doc_id``. Raises ValueError if no question is in both."""
    of_b = {sample.doc_id: sample for sample in b}
    pairs = [(sample, of_b[sample.doc_id]) for sample in a if sample.doc_id in of_b]
    if not pairs:
        raise ValueError("the two runs have no question in common; expected runs on the same questions")
    counts = {(x, y): 0 for x in (True, False) for y in (True, False)}
    for x, y in pairs:
        counts[x.correct, y.correct] += 1
    return Comparison(
        both=counts[True, True],
        only_a=counts[True, False],
        only_b=counts[False, True],
        neither=counts[False, False],
        differing=[(x, y) for x, y in pairs if x.text != y.text],
        num_other_prompts=sum(x.prompt != y.prompt for x, y in pairs),
        num_unpaired=len(a) + len(b) - 2 * len(pairs),
    )


def compare_runs(a: Run, b: Run) -> dict[str, Comparison]:
    """Compare the tasks that both runs have, by name. Raises ValueError if there is none, or if a task's version
    changed."""
    shared = [name for name in a.tasks if name in b.tasks]
    if not shared:
        raise ValueError(
            f"A has {', '.join(a.tasks)} and B has {', '.join(b.tasks)}; expected at least one task in common"
        )
    return {name: compare_tasks(a.tasks[name], b.tasks[name]) for name in shared}


def compare_tasks(a: TaskResult, b: TaskResult) -> Comparison:
    """Compare the samples of two results of one task. Raises ValueError if versions or metrics differ."""
    if (a.version, a.metric) != (b.version, b.metric):
        raise ValueError(
            f"{a.name} is version {a.version:g} ({a.metric}) in A and version {b.version:g} ({b.metric}) in B; "
            "expected the same in both"
        )
    return compare_samples(read_samples(a), read_samples(b))
