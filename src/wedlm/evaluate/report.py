# SPDX-License-Identifier: Apache-2.0
"""The content of a report before it is written: rows with their baselines, failures, examples with their forwards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from wedlm.engine.text import TokenDecoder
from wedlm.evaluate.compare import Comparison, compare_samples
from wedlm.evaluate.result_folder import AUTOREGRESSIVE, Run, Sample, TaskResult, read_samples

# Of several AR runs that a run could be compared with, the one that agrees with it in these is taken, first ones first.
_CLOSENESS = ("temperature", "max_tokens", "top_p", "top_k", "seed")


@dataclass(frozen=True)
class Piece:
    """Text that one forward made final (``step`` from 0), which has ``num_tokens`` tokens."""

    text: str
    step: int
    num_tokens: int


@dataclass(frozen=True)
class Example:
    """A sample to show; without ``pieces`` its text has no colours."""

    sample: Sample
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class Failure:
    """A wrong answer, and why it is worth a look."""

    example: Example
    reasons: Sequence[str]


@dataclass(frozen=True)
class TableRow:
    """A run's result on a task. A comparison is None if there is nothing to compare with, or only the row itself.

    ``failures``: the first of ``num_notable`` wrong answers that have a reason to be shown, of ``num_wrong`` in all.
    """

    run: Run
    result: TaskResult
    against_ar: Comparison | None
    against_baseline: Comparison | None
    failures: Sequence[Failure]
    num_notable: int
    num_wrong: int
    examples: Sequence[Example]

    @property
    def is_plain(self) -> bool:
        """Whether its texts have no colours."""
        return not any(example.pieces for example in self.examples)


@dataclass(frozen=True)
class Section:
    """All results of one version of a task."""

    title: str
    metric: str
    kind: str
    rows: Sequence[TableRow]


def choose_baseline(runs: Sequence[Run], name: str) -> Run:
    """The run that a user calls ``name``: a key, its beginning, or a model's or an engine's name (which means its AR
    run).

    Raises ValueError if there is none, or several.
    """
    by_key = [run for run in runs if run.key.startswith(name)]
    named = [run for run in runs if name in (run.model["name"], run.engine)]
    by_model = [run for run in named if run.decoding == AUTOREGRESSIVE]
    found = by_key or by_model
    if len(found) != 1:
        known = "; ".join(f"{run.key} ({run.model['name']}, {run.label})" for run in runs)
        amount = "fits no run" if not found else f"fits {len(found)} runs"
        raise ValueError(f"the baseline {name!r} {amount}; expected a key, or a model with one AR run, of: {known}")
    return found[0]


def build_sections(
    runs: Sequence[Run],
    baseline: Run | None = None,
    num_examples: int = 10,
    decoder_of: Callable[[Run], TokenDecoder | None] = lambda _: None,
) -> list[Section]:
    """Read all samples and pair each run with the AR run of its weights and with the baseline."""
    titles: dict[tuple[str, float, str], list[Run]] = {}
    for run in runs:
        for result in run.tasks.values():
            titles.setdefault((result.name, result.version, result.metric), []).append(run)
    sections = []
    for (name, version, metric), members in sorted(titles.items(), key=lambda item: item[0]):
        samples = {run.key: read_samples(run.tasks[name]) for run in members}
        kind = members[0].tasks[name].kind
        # A likelihood task scores given texts, of which no model wrote any.
        decoders = {run.key: decoder_of(run) if kind == "generate" else None for run in members}
        rows = [_row(run, name, members, baseline, samples, num_examples, decoders[run.key]) for run in members]
        sections.append(Section(f"{name} (version {version:g})", metric, kind, rows))
    return sections


def _row(
    run: Run,
    name: str,
    members: Sequence[Run],
    baseline: Run | None,
    samples: Mapping[str, Sequence[Sample]],
    num_examples: int,
    decoder: TokenDecoder | None,
) -> TableRow:
    own, ar = samples[run.key], ar_twin(run, members, name)
    against = {}
    for role, other in (("ar", ar), ("baseline", baseline)):
        known = other is not None and other.key != run.key and other.key in samples
        shared = known and {s.doc_id for s in own} & {s.doc_id for s in samples[other.key]}  # type: ignore[union-attr]
        against[role] = compare_samples(samples[other.key], own) if shared else None  # type: ignore[union-attr]
    right_in_ar = {s.doc_id for s in samples[ar.key] if s.correct} if ar is not None else set()
    wrong = [sample for sample in own if not sample.correct]
    reasons = [(sample, _reasons(sample, right_in_ar)) for sample in wrong]
    notable = sorted((item for item in reasons if item[1]), key=lambda item: -len(item[1]))
    return TableRow(
        run=run,
        result=run.tasks[name],
        against_ar=against["ar"],
        against_baseline=against["baseline"],
        failures=[Failure(_example(sample, decoder), why) for sample, why in notable[:num_examples]],
        num_notable=len(notable),
        num_wrong=len(wrong),
        examples=[_example(sample, decoder) for sample in own[:num_examples]],
    )


def ar_twin(run: Run, runs: Sequence[Run], task: str) -> Run | None:
    """The AR run with the same weights, prompts and task version; if there are several, the one with the closest
    parameters."""
    result = run.tasks[task]
    twins = [
        other
        for other in runs
        if other.decoding == AUTOREGRESSIVE
        and other.weights() == run.weights()
        and other.chat_template == run.chat_template
        and other.tasks[task].num_fewshot == result.num_fewshot
    ]

    def distance(other: Run) -> tuple[bool, ...]:
        return tuple(other.params.get(name) != run.params.get(name) for name in _CLOSENESS)

    return min(twins, key=distance, default=None)


def _reasons(sample: Sample, right_in_ar: set[int]) -> list[str]:
    reasons = []
    if sample.doc_id in right_in_ar:
        reasons.append("AR decoding of the same weights is right")
    if sample.finish_reason == "length":
        reasons.append("cut at max_tokens")
    if sample.truncated:
        reasons.append("the prompt lost its beginning")
    if not sample.text.strip():
        reasons.append("empty answer")
    return reasons


def _example(sample: Sample, decoder: TokenDecoder | None) -> Example:
    return Example(sample, [] if decoder is None else split_by_step(sample, decoder))


def split_by_step(sample: Sample, decoder: TokenDecoder) -> list[Piece]:
    """A sample's text, split where a different forward made it final; joined, the pieces are the text.

    Tokens after the text's end (end tokens, stop strings) count in their forward's ``num_tokens``. Raises ValueError if
    the tokens do not decode to the text.
    """
    from wedlm.engine.text import TextStream

    stream = TextStream(decoder)
    for token in sample.token_ids:
        stream.push(token)
    stream.finish()
    if not stream.text.startswith(sample.text):
        raise ValueError(
            f"the tokens of question {sample.doc_id} do not decode to its text; expected the tokenizer of the model "
            "that wrote it"
        )
    pieces, start = [], 0
    last = len(stream.ends) - 1
    for step, tokens in groupby(range(len(sample.token_ids)), key=lambda index: sample.token_steps[index]):
        group = list(tokens)
        end = len(stream.text) if group[-1] == last else stream.ends[group[-1]]
        pieces.append(Piece(sample.text[start:end], step, len(group)))
        start = end
    return pieces
