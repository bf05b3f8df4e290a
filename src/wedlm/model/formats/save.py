# SPDX-License-Identifier: Apache-2.0
"""Save safetensors with the folder's read permissions: safetensors 0.8 and newer write for the owner alone."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_shared(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that whoever may read its folder can read: safetensors 0.8 makes it its owner's alone,
    and a model trained by one account is served by another."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    path.chmod(path.parent.stat().st_mode & 0o666)
