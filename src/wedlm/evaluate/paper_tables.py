# SPDX-License-Identifier: Apache-2.0
"""Tables 1 and 2 of arXiv 2512.22737 as published, with columns for our own results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["base", "instruct"]
# Our names of its ten sets, in its order, with its words.
SETS = {
    "arc_c": "ARC-C (0-shot)",
    "arc_e": "ARC-E (0-shot)",
    "hellaswag": "HellaSwag (10-shot)",
    "mmlu": "MMLU (5-shot)",
    "gsm8k": "GSM8K (3-shot)",
    "math500": "MATH (4-shot)",
    "gpqa": "GPQA-Diamond (5-shot)",
    "mbpp": "MBPP (3-shot)",
    "humaneval": "HumanEval (4-shot)",
    "humaneval_plus": "HumanEval-plus (4-shot)",
}
_TITLES: dict[Kind, str] = {"base": "Table 1: base models", "instruct": "Table 2: instruct models"}
# Model -> scores in percent in the order of SETS, and the average that the paper gives.
PUBLISHED: dict[Kind, dict[str, tuple[float, ...]]] = {
    "base": {
        "Qwen2.5-7B": (89.93, 96.55, 80.20, 71.62, 79.23, 43.40, 33.70, 65.30, 59.14, 53.05, 67.21),
        "Qwen3-8B": (92.66, 97.13, 85.27, 74.03, 85.97, 50.80, 37.00, 70.94, 68.90, 63.40, 72.61),
        "LLaDA-8B": (81.14, 92.00, 85.34, 64.61, 71.80, 28.00, 29.80, 41.99, 31.71, 28.05, 55.44),
        "Dream-7B": (88.40, 96.21, 78.05, 70.64, 75.97, 38.00, 25.76, 56.47, 20.12, 19.51, 56.91),
        "WeDLM-7B": (90.70, 96.13, 85.11, 71.93, 84.76, 48.20, 36.87, 61.81, 68.90, 64.00, 70.84),
        "WeDLM-8B": (92.92, 97.14, 84.55, 75.46, 90.20, 53.60, 42.42, 67.00, 75.00, 68.90, 74.72),
    },
    "instruct": {
        "Qwen2.5-7B": (86.09, 93.27, 87.59, 71.98, 89.91, 45.00, 27.10, 63.66, 76.22, 70.12, 71.09),
        "Qwen3-8B": (91.47, 96.17, 86.13, 71.52, 89.91, 69.60, 41.41, 68.37, 71.95, 64.63, 75.12),
        "LLaDA-8B": (85.92, 94.32, 78.55, 63.70, 80.59, 34.20, 25.25, 36.24, 36.59, 32.32, 56.77),
        "Dream-7B": (87.20, 93.27, 62.00, 64.19, 79.00, 41.00, 35.86, 58.52, 57.32, 51.22, 62.96),
        "SDAR-8B": (91.13, 97.01, 92.12, 73.61, 91.66, 43.40, 38.38, 67.97, 76.83, 70.12, 74.22),
        "WeDLM-7B": (89.59, 96.09, 84.75, 70.52, 87.57, 55.40, 33.84, 63.66, 75.00, 71.34, 72.78),
        "WeDLM-8B": (92.92, 97.43, 82.94, 75.14, 92.27, 64.80, 44.95, 70.53, 80.49, 73.78, 77.53),
    },
}
# The models of the tables that this package runs, by their names on the hub.
DEFAULT_MODELS = (
    "Qwen/Qwen2.5-7B=base",
    "Qwen/Qwen3-8B-Base=base",
    "tencent/WeDLM-7B-Base=base",
    "tencent/WeDLM-8B-Base=base",
    "Qwen/Qwen2.5-7B-Instruct=instruct",
    "Qwen/Qwen3-8B=instruct",
    "tencent/WeDLM-7B-Instruct=instruct",
    "tencent/WeDLM-8B-Instruct=instruct",
)


@dataclass(frozen=True)
class Column:
    """Our results for a model. ``scores`` in percent by set, for those that were run; ``questions`` by set."""

    name: str
    kind: Kind
    decoding: str
    scores: Mapping[str, float]
    questions: Mapping[str, int]

    @classmethod
    def of(cls, name: str, kind: Kind, record: Mapping[str, Any]) -> "Column":
        """A column from a run's record (docs/evaluation.md)."""
        tasks = {task.removesuffix("_paper"): result for task, result in record["tasks"].items()}
        return cls(
            name,
            kind,
            record["params"]["decoding"],
            {task: 100 * result["value"] for task, result in tasks.items()},
            {task: result["num_samples"] for task, result in tasks.items()},
        )


def parse_model(text: str) -> tuple[str, Kind]:
    """Read "NAME=base", "NAME=instruct", or NAME alone if it says which. Raises ValueError for another kind."""
    name, equals, kind = text.rpartition("=")
    if not equals:
        is_instruct = "instruct" in text.lower() or text in ("demo", "demo-base")
        return text, "instruct" if is_instruct else "base"
    if kind not in PUBLISHED or not name:
        raise ValueError(f"--models has {text!r}; expected NAME, NAME=base or NAME=instruct")
    return name, kind


def tables(columns: Sequence[Column]) -> str:
    """Both tables as Markdown; a table to which no model belongs has only the published figures."""
    return "\n\n".join(_table(kind, [one for one in columns if one.kind == kind]) for kind in _TITLES) + "\n"


def _table(kind: Kind, columns: Sequence[Column]) -> str:
    published = PUBLISHED[kind]
    heads = [*(f"{name}, paper" for name in published), *(f"**{one.name}, here ({one.decoding})**" for one in columns)]
    lines = [f"## {_TITLES[kind]}", "", f"| set | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for place, (name, title) in enumerate(SETS.items()):
        cells = [f"{scores[place]:.2f}" for scores in published.values()]
        cells += [_cell(one, name) for one in columns]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    averages = [f"{scores[-1]:.2f}" for scores in published.values()]
    for one in columns:
        whole = all(name in one.scores for name in SETS)
        averages.append(f"{sum(one.scores.values()) / len(SETS):.2f}" if whole else "–")
    lines.append(f"| average | {' | '.join(averages)} |")
    return "\n".join(lines)


def _cell(column: Column, name: str) -> str:
    if name not in column.scores:
        return "–"
    return f"{column.scores[name]:.2f} ({column.questions[name]:,})"
