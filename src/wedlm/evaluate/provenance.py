# SPDX-License-Identifier: Apache-2.0
"""Which model ran on what: the facts under which results are stored."""

import hashlib
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wedlm import __version__
from wedlm.machine import cpu_name
from wedlm.model.demo import DEMO_DELTAS
from wedlm.model.formats.resolve import DEMO_NAME, locate, locate_adapter

if TYPE_CHECKING:
    from wedlm.engine.llm import LLM

_KINDS = (".safetensors", ".gguf", ".json", ".jinja")


@dataclass(frozen=True)
class ModelProvenance:
    """A model as results name it. ``hash``: a digest of its files, including the adapter's; ``engine``: what
    runs it."""

    name: str
    hash: str
    dtype: str
    device: str
    adapter: str | None
    engine: str = "wedlm"


def model_provenance(llm: "LLM", model: str, adapter: str | None) -> ModelProvenance:
    """The provenance of an ``LLM``; ``model`` and ``adapter`` are as given to it."""
    formats = llm.blueprint.formats
    dtype = formats.activations
    for kind, part in ((formats.weights, "weights"), (formats.cache, "cache")):
        dtype += "" if kind == formats.activations else f", {kind} {part}"
    return provenance_of_files(model, adapter, dtype, str(llm.device))


def provenance_of_files(
    model: str, adapter: str | None, dtype: str, device: str, engine: str = "wedlm"
) -> ModelProvenance:
    """A model's provenance from its files. ``dtype`` is that of the activations, and says what else weights and cache
    are kept in."""
    paths = _files(locate(model))
    if model == DEMO_NAME:
        paths += DEMO_DELTAS
    if adapter is not None:
        paths += _files(locate_adapter(adapter))
    return ModelProvenance(
        name=_last_part(model),
        hash=_digest(paths),
        dtype=dtype,
        device=device,
        adapter=None if adapter is None else _last_part(adapter),
        engine=engine,
    )


def _last_part(path: str) -> str:
    return Path(path).name or path


def _files(path: Path) -> list[Path]:
    """The files of a checkpoint that decide its answers."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in _KINDS and file.is_file())


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}\n".encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, as far as they matter for speed."""
    return {
        "wedlm": __version__,
        "torch": torch.__version__,
        "lm_eval": version("lm_eval"),
        "python": platform.python_version(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
