# SPDX-License-Identifier: Apache-2.0
"""The file of a run: hardware, versions, configuration and rows by part. It is rewritten after each part."""

import json
import math
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wedlm.attention.base import KVCache
from wedlm.bench.settings import Settings
from wedlm.bench.stats import TableRow, describe, rounded
from wedlm.bench.target import Target
from wedlm.machine import cpu_name, peak_memory_bytes
from wedlm.model.formats.save import write_whole

_PACKAGES = ("wedlm", "torch", "triton", "transformers", "vllm", "xllamacpp", "numpy")
# What a row is about; everything else in it was measured.
LABELS = (
    *(
        "scenario",
        "kind",
        "accepted",
        "batch",
        "engine",
        "mode",
        "rows",
        "context",
        "prompt",
        "chunk",
        "requests",
        "load",
    ),
    "copies",
)
_KEY_FIGURES = ("median_ratio", "host_ms", "step_ms", "tok_per_s")
_FILE = "bench.json"


class Record:
    """Everything that a reader needs to judge the figures or to repeat them."""

    def __init__(self, settings: Settings, command: list[str]) -> None:
        self.values: dict[str, Any] = {
            "benchmark": "wedlm bench",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "versions": versions(),
            "settings": asdict(settings),
            "load_average": {"start": os.getloadavg()[0]},
            "parts": {},
        }

    def describe(self, target: Target) -> None:
        """Record the machine and the engine."""
        engine, config = target.engine, target.config
        heads = (config.num_kv_heads, config.head_dim, engine.runner.cache.keys.dtype)
        self.values |= {
            "hardware": hardware(target.device),
            "target": {
                "name": target.name,
                "dtype": target.dtype,
                "runner": type(engine.runner.executors[0]).__name__,
                "model": config.to_hf(),
                "engine": asdict(engine.config),
                "cache_tokens": engine.pool.num_pages * engine.pool.page_size,
                "cache_bytes_per_token": KVCache.bytes_per_token(config.num_layers, *heads),
            },
        }

    def finish(self, target: Target, seconds: float, skipped: list[str]) -> None:
        """Record what is known at the end: memory, auto's table of costs, what there was no time for."""
        self.values["memory"] = memory(target.device)
        auto = target.engine.controller.draft_budget
        if auto is not None:
            self.values["step_costs_ms"] = {rows: rounded(1e3 * cost) for rows, cost in auto.costs.table()}
        self.values |= {"seconds": round(seconds, 1), "skipped": skipped}

    def write(self, directory: Path | None) -> None:
        """Write ``bench.json``, completely or not at all."""
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        values = _json_values(self.values)
        with write_whole(directory / _FILE) as temporary:
            temporary.write_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def summary(self, directory: Path | None) -> str:
        """One line of JSON: the most important figure of each row, by part and label."""
        parts = {
            part: {describe(label_of(row)): key_figure(row) for row in rows}
            for part, rows in self.values["parts"].items()
        }
        file = None if directory is None else str(directory / _FILE)
        kept = {name: self.values[name] for name in ("seconds", "skipped") if name in self.values}
        return json.dumps({"file": file, "parts": parts, **kept}, ensure_ascii=False)


def _json_values(value: Any) -> Any:
    """Replace what JSON does not have: infinity, which some options may be, and NaN."""
    if isinstance(value, dict):
        return {name: _json_values(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any]:
    """Read what a run has written. Raises ValueError if the folder has no ``bench.json`` of ours."""
    file = folder / _FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); expected what wedlm bench --output wrote") from error
    if not isinstance(values, dict) or not isinstance(values.get("parts"), dict):
        raise ValueError(f"{file} has no parts; expected what wedlm bench --output wrote")
    return values


def label_of(row: TableRow) -> dict[str, Any]:
    """What the row is about."""
    return {name: row[name] for name in LABELS if name in row}


def key_figure(row: TableRow) -> tuple[str, float]:
    """The most important figure of the row."""
    name = next(name for name in _KEY_FIGURES if name in row and not (name == "step_ms" and "accepted" in row))
    return name, row[name]


def versions() -> dict[str, str]:
    """Versions of Python and of the important packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The device, and the CPU next to it."""
    found: dict[str, Any] = {"cpu": cpu_name(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1)}
        found["cuda"] = torch.version.cuda
    return found


def memory(device: torch.device) -> dict[str, float]:
    """Peaks so far, in GB. On a GPU this includes the cache, whose size is in the configuration."""
    found = {"host_peak_gb": rounded(peak_memory_bytes() / 1e9)}
    if device.type == "cuda":
        found["device_peak_gb"] = rounded(torch.cuda.max_memory_allocated(device) / 1e9)
        free, total = torch.cuda.mem_get_info(device)
        found["device_in_use_gb"] = rounded((total - free) / 1e9)  # graphs and libraries included
    return found
