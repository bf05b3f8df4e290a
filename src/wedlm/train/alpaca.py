# SPDX-License-Identifier: Apache-2.0
"""Fetch the set that the original's fine-tuning example trains on from the hub, and write it as its script does."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from wedlm.model.formats.save import write_whole

REPOSITORY, FILE = "yahma/alpaca-cleaned", "alpaca_data_cleaned.json"
PATH = Path("data/alpaca_cleaned_sft.jsonl")
Fetch = Callable[..., str]  # huggingface_hub.hf_hub_download


def download(path: Path = PATH, fetch: Fetch | None = None) -> tuple[Path, int]:
    """Write the conversations to ``path`` unless it exists. Returns (path, their number). Raises ValueError if the hub
    cannot be reached or sends something else."""
    if not path.exists():
        rows = _rows(fetch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(conversation(row), ensure_ascii=False) + "\n" for row in rows)
    with path.open("rb") as lines:
        return path, sum(1 for _ in lines)


def conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    """One exchange: the instruction, and if there is input, an empty line and the input; then the output."""
    asked = row["instruction"] + (f"\n\n{row['input']}" if row["input"].strip() else "")
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def _rows(fetch: Fetch | None) -> Iterable[dict[str, Any]]:
    if fetch is None:
        from huggingface_hub import hf_hub_download

        fetch = hf_hub_download
    try:
        rows = json.loads(Path(fetch(REPOSITORY, FILE, repo_type="dataset")).read_text(encoding="utf-8"))
    except Exception as error:  # the hub client raises many unrelated types; all mean "not fetched"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{FILE} of {REPOSITORY} could not be fetched from the hub: {reason}") from error
    names = ("instruction", "input", "output")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names) for row in rows
    ):
        raise ValueError(f"{FILE} of {REPOSITORY} has other contents; expected rows of {', '.join(names)}")
    return rows
