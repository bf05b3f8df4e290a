# SPDX-License-Identifier: Apache-2.0
"""Write files completely or not at all, and safetensors with the folder's read permissions."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from wedlm.model.formats.temporary import temporary_folder


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; the file written there becomes ``path`` in one step at the end.

    ``path`` appears complete, with its content on the disk, or stays as it was; an error leaves no temporary file, and
    what a killed process leaves goes with the next file that is written to the same folder (``temporary_folder``).
    """
    try:
        with temporary_folder(path.parent) as folder:
            temporary = folder / path.name
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk has no name by itself
            error.filename = str(path)
        raise


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a record per line; the file is complete, or stays as it was."""
    with write_whole(path) as temporary:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="utf-8")


def read_whole_lines(path: Path) -> list[bytes]:
    """Read the lines of a file that is written line by line. A last line that a kill cut is removed from the file."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return [line for line in content[:end].split(b"\n") if line]


def save_shared(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write safetensors with the folder's read permissions; the file is complete, or stays as it was.

    safetensors >= 0.8 writes mode 0600, but a model trained by one account is served by another.
    """
    with write_whole(path) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata))
        temporary.chmod(path.parent.stat().st_mode & 0o666)
