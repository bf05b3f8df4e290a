# SPDX-License-Identifier: Apache-2.0
"""Fetch the public data sets from the hub, once, into the files that the tasks read. GPQA is not among them, because
its authors ask everybody not to publish its questions, so users bring their own copy."""

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wedlm.model.formats.save import write_whole

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A split of a data set on the hub, and a function that turns its rows into ours (None: the row is left out)."""

    path: str
    config: str | None
    split: str
    convert: Callable[[Record], Record | None]


def _same(row: Record) -> Record:
    return row


def _arc(row: Record) -> Record:
    letters = dict(zip("ABCDE", row["choices"]["text"], strict=False))
    return {"question": row["question"], **letters, "answer": "ABCDE"[row["choices"]["label"].index(row["answerKey"])]}


def _hellaswag(row: Record) -> Record:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    letters = {letter: _without_marks(text) for letter, text in zip("ABCD", row["endings"], strict=True)}
    return {"question": _without_marks(context), **letters, "answer": "ABCD"[int(row["label"])]}


def _without_marks(text: str) -> str:
    """Remove WikiHow's marks in brackets; its titles become sentences."""
    text = text.strip().replace(" [title]", ". ")
    while "[" in text and "]" in text.partition("[")[2]:
        before, _, rest = text.partition("[")
        text = before + rest.partition("]")[2]
    return text.replace("  ", " ")


def _mmlu(row: Record) -> Record:
    letters = dict(zip("ABCD", row["choices"], strict=True))
    return {"subject": row["subject"], "question": row["question"], **letters, "answer": "ABCD"[row["answer"]]}


def _mbpp_test(row: Record) -> Record | None:
    return row if 11 <= row["task_id"] <= 510 else None


def _mbpp_prompt(row: Record) -> Record | None:
    return row if row["task_id"] <= 10 else None


def _piqa(row: Record) -> Record:
    return {"query": f"Question: {row['goal']}\n", "choices": [row["sol1"], row["sol2"]], "gold": row["label"]}


def _winogrande(row: Record) -> Record:
    before, _, after = row["sentence"].partition("_")
    options = [before + row["option1"], before + row["option2"]]
    return {"context_options": options, "continuation": after.strip(), "gold": int(row["answer"]) - 1}


def _boolq(row: Record) -> Record:
    query = f"Passage: {row['passage']}\nQuestion: {row['question']}?"
    return {"query": query, "choices": ["no", "yes"], "gold": int(row["answer"])}


SOURCES = {
    "gsm8k_test": Source("openai/gsm8k", "main", "test", _same),
    "gsm8k_train": Source("openai/gsm8k", "main", "train", _same),
    "math500": Source("HuggingFaceH4/MATH-500", None, "test", _same),
    "humaneval": Source("openai/openai_humaneval", None, "test", _same),
    "humaneval_plus": Source("evalplus/humanevalplus", None, "test", _same),
    "mbpp_test": Source("google-research-datasets/mbpp", "full", "test", _mbpp_test),
    "mbpp_prompt": Source("google-research-datasets/mbpp", "full", "prompt", _mbpp_prompt),
    "mmlu_test": Source("cais/mmlu", "all", "test", _mmlu),
    "mmlu_dev": Source("cais/mmlu", "all", "dev", _mmlu),
    "arc_c_test": Source("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "arc_e_test": Source("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "hellaswag_val": Source("Rowan/hellaswag", None, "validation", _hellaswag),
    "hellaswag_train": Source("Rowan/hellaswag", None, "train", _hellaswag),
    "piqa_val": Source("ybisk/piqa", None, "validation", _piqa),
    "winogrande_val": Source("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "boolq_val": Source("google/boolq", None, "validation", _boolq),
}
_SHOTS_KEPT = 1000  # of a training split: only the first few rows are ever used


def download_all(directory: Path, load: Callable[..., Iterable[Record]] | None = None) -> list[str]:
    """Write every file that is missing, and return the names of all. ``load`` is ``datasets.load_dataset``. Raises
    ValueError."""
    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for name, source in SOURCES.items():
        path = directory / f"{name}.jsonl.gz"
        if not path.exists():
            _write(path, _fetch(name, source, load))
        names.append(path.name)
    return names


def _fetch(name: str, source: Source, load: Callable[..., Iterable[Record]] | None) -> list[Record]:
    if load is None:
        from datasets import load_dataset

        load = load_dataset
    assert load is not None
    try:
        rows = list(load(source.path, source.config, split=source.split))
    except Exception as error:  # the hub client raises many unrelated types; all mean "not fetched"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} could not be fetched from {source.path}: {reason}") from error
    converted = [ours for row in rows if (ours := source.convert(row)) is not None]
    return converted[:_SHOTS_KEPT] if name.endswith("_train") else converted


def _write(path: Path, rows: list[Record]) -> None:
    with write_whole(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
