# SPDX-License-Identifier: Apache-2.0
"""Read the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from wedlm.model.errors import CheckpointError

# The largest are an index of shards and a tokenizer's configuration, a few MB at most.
_MAX_BYTES = 2**26


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in ``path``. Raises CheckpointError if it is not an object, or is larger than any honest one."""
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise CheckpointError(f"{path} has {size} bytes; expected at most {_MAX_BYTES} of JSON")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
