# SPDX-License-Identifier: Apache-2.0
"""The demo model in eight bits, made once and kept in the cache: base and deltas are added, then rounded."""

import hashlib
import warnings
from pathlib import Path

import torch
from rich.console import Console

from wedlm.model.demo import DEMO_SHA256, default_cache_dir, working
from wedlm.model.errors import CheckpointError
from wedlm.model.formats.checkpoint import Checkpoint, checkpoint_of_files
from wedlm.model.formats.int8_rows import write_int8

_FORMAT = "1"  # of what is kept: another number for other contents from the same sources


def packed_demo(demo: Checkpoint) -> Checkpoint:
    """``demo`` ("demo" as opened by ``open_checkpoint``) in eight bits, from the cache directory. If it is missing or
    damaged there, it is made first. If the directory cannot be written to, a warning says so and ``demo`` itself is
    returned."""
    directory = default_cache_dir()
    path = directory / f"demo-int8-{_key(demo)}.safetensors"
    if path.is_file():
        try:
            return checkpoint_of_files(path, demo.config, [path])
        except CheckpointError as error:
            Console(stderr=True).print(f"{error}: making it again.", markup=False, highlight=False)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = f"Packing the demo model into eight bits (136 MB, once) in {directory} ..."
        with working(Console(stderr=True), text):
            write_int8(path, demo.tensors(), demo.shapes, torch.float32, {"format": "pt"})
    except OSError as error:
        warnings.warn(
            f"the demo model in eight bits could not be kept in {directory} ({error}): each start makes it again",
            stacklevel=2,
        )
        return demo
    return checkpoint_of_files(path, demo.config, [path])


def _key(demo: Checkpoint) -> str:
    """A name for the content, made from its sources and the way it is made."""
    digest = hashlib.sha256(f"{_FORMAT} {DEMO_SHA256}".encode())
    for path in demo.deltas:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]
