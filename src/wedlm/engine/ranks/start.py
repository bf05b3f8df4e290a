# SPDX-License-Identifier: Apache-2.0
"""Start all ranks of a checkpoint's model; this process becomes the first of them."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from wedlm.engine.load_weights import LoadedWeights
from wedlm.engine.options import EngineOptions
from wedlm.engine.ranks.group import Group
from wedlm.engine.ranks.load import LoadedShard, load_shard, random_shard
from wedlm.engine.ranks.processes import Ranks
from wedlm.model import ModelConfig
from wedlm.model.formats.checkpoint import open_checkpoint
from wedlm.model.sharding import Shard, check_divides


def load_over_ranks(path_or_id: str | Path, options: EngineOptions, device: torch.device) -> LoadedWeights:
    """``load_weights`` for ``tensor_parallel_size`` above 1. It starts the other ranks, which load their parts while
    this one does, and connects them. On a CPU they share torch's threads, this process included.

    Raises ValueError for anything impossible before it starts a process, and RankFault if another rank fails.
    """
    config = open_checkpoint(path_or_id).config
    return _load(config, options, device, {"model": str(path_or_id), "random": None}, partial(load_shard, path_or_id))


def random_over_ranks(config: ModelConfig, options: EngineOptions, device: torch.device) -> LoadedWeights:
    """``load_over_ranks`` with random weights, for measurements."""
    return _load(config, options, device, {"model": "", "random": config.to_hf()}, partial(random_shard, config))


def _load(
    config: ModelConfig,
    options: EngineOptions,
    device: torch.device,
    source: dict[str, Any],
    load: Callable[[EngineOptions, torch.device, Group], LoadedShard],
) -> LoadedWeights:
    size = options.tensor_parallel_size
    check_divides(config, size)
    devices = _devices(device, size)
    if options.quantization == "int8":
        raise ValueError(
            f"quantization is 'int8' and tensor_parallel_size is {size}; expected 1, because the native forward of "
            "CPUs runs in one process"
        )
    threads = max(1, torch.get_num_threads() // size) if device.type == "cpu" else 1
    if device.type == "cpu":
        torch.set_num_threads(threads)
    group = Group(0, size, devices[0], options.deterministic)
    common = {**source, "size": size, "options": asdict(options), "threads": threads}
    tasks = [{**common, "rank": rank, "device": str(devices[rank])} for rank in range(1, size)]
    ranks = Ranks(group, Shard(config, 0, size), tasks)
    try:
        ranks.start()
        loaded = load(options, devices[0], group)
        ranks.connect()
    except BaseException:
        ranks.close()
        raise
    note = "the native forward runs in one process" if device.type == "cpu" else ""
    return LoadedWeights(loaded.model, loaded.config, loaded.options, note, ranks)


def _devices(first: torch.device, size: int) -> list[torch.device]:
    """One device for each rank. Raises ValueError if there are fewer."""
    if first.type == "cpu":
        return [first] * size
    if first.type != "cuda":
        raise ValueError(f"tensor_parallel_size is {size} and the device is {first}; expected cuda or cpu")
    number, start = torch.cuda.device_count(), first.index or 0
    if start + size > number:
        raise ValueError(
            f"tensor_parallel_size is {size} from {first} on, and there are {number} CUDA devices; expected at most "
            f"{number - start}"
        )
    return [torch.device("cuda", start + rank) for rank in range(size)]
