# SPDX-License-Identifier: Apache-2.0
"""The program of every rank but the first: ``python -m wedlm.engine.ranks.worker CONNECTION LIFE``, two file
descriptors.

It loads its part of the weights, then follows rank 0 until the connection closes. When ``LIFE`` closes, rank 0's
process has ended, and this one ends at once, whatever it waits for.
"""

import json
import os
import shutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from wedlm.engine.options import EngineOptions
from wedlm.engine.ranks.cache_size import CacheSize, read_cache
from wedlm.engine.ranks.first_rank import read_choice, read_forward
from wedlm.engine.ranks.group import Group
from wedlm.engine.ranks.life import end_with
from wedlm.engine.ranks.load import LoadedShard, load_shard, new_rank, random_shard
from wedlm.engine.ranks.messages import Kind, receive, receive_bytes
from wedlm.engine.ranks.reports import FAILED, LOADED, send_report
from wedlm.model import ModelConfig

if TYPE_CHECKING:
    from wedlm.engine.execution.graphs import StepGraphs

_PEERS_S = 3600.0  # rank 0 notices who does not answer; a rank that waits for a slow one must not


def main(connection_fd: int, life_fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to handle
    directory: list[str] = []  # where the ranks meet, which rank 0 may not have had time to remove
    end_with(life_fd, lambda: _remove(directory))
    connection = socket.socket(fileno=connection_fd)
    try:
        _serve(connection, directory)
    except BaseException as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        try:
            send_report(connection, FAILED, message=f"{type(error).__name__}: {message}")
        finally:
            os._exit(1)  # no exchange with the others that libraries might wait for
    os._exit(0)


def _remove(directory: list[str]) -> None:
    for path in directory:
        shutil.rmtree(path, ignore_errors=True)


def _serve(connection: socket.socket, directory: list[str]) -> None:
    head = receive_bytes(connection, 8)
    data = None if head is None else receive_bytes(connection, int.from_bytes(head, "little"))
    if data is None:
        return
    task = json.loads(data)
    directory.append(task["directory"])
    torch.set_num_threads(task["threads"])
    options, device = EngineOptions(**task["options"]), torch.device(task["device"])
    group = Group(task["rank"], task["size"], device, options.deterministic)
    if task["random"] is None:
        loaded = load_shard(task["model"], options, device, group)
    else:
        loaded = random_shard(ModelConfig.from_hf(task["random"]), options, device, group)
    send_report(connection, LOADED, weight_bytes=loaded.num_bytes)
    group.connect(Path(task["directory"]), _PEERS_S)
    orders: Orders | None = None
    while (message := receive(connection)) is not None:
        kind, arrays = message
        if kind == Kind.CACHE:
            orders = None  # the memory of a former cache first
            orders = Orders(loaded, read_cache(arrays))
        else:
            assert orders is not None, "rank 0 names the cache first"
            orders.obey(kind, arrays)


class Orders:
    """What rank 0 can tell this rank to do, over one cache."""

    def __init__(self, loaded: LoadedShard, size: CacheSize) -> None:
        self.rank = new_rank(loaded, size)
        self.graphs: StepGraphs | None = None
        if size.on_kernels:
            self._take_kernels(loaded, size)

    def _take_kernels(self, loaded: LoadedShard, size: CacheSize) -> None:
        from wedlm.attention.paged import plan_paged  # these import triton
        from wedlm.engine.execution.captured_step import MAX_STOP_TOKENS
        from wedlm.engine.execution.graphs import StepGraphs
        from wedlm.engine.ranks.device import OtherDeviceRank
        from wedlm.model.inference.triton_transformer import FusedTransformer

        deterministic = loaded.options.deterministic
        fused = FusedTransformer(loaded.model, deterministic=deterministic)
        self.rank.model, self.rank.plan_attention = fused, partial(plan_paged, fixed=deterministic)
        pages = -(-size.max_model_len // size.page_size)
        table = torch.zeros(size.num_slots, pages, dtype=torch.long, device=self.rank.device)
        self.device_rank = OtherDeviceRank(fused, self.rank, size.mask_token_id, table, MAX_STOP_TOKENS)
        self.graphs = StepGraphs(self.device_rank)

    @torch.inference_mode()
    def obey(self, kind: Kind, arrays: list[np.ndarray]) -> None:
        if kind == Kind.FORWARD:
            self.rank.forward(*read_forward(arrays, self.rank.device))
        elif kind == Kind.CHOOSE:
            self.rank.choose(read_choice(arrays, self.rank.device))
        elif kind == Kind.GATHER:
            self.rank.whole_logits()
        else:
            self._obey_on_kernels(kind, arrays)

    def _obey_on_kernels(self, kind: Kind, arrays: list[np.ndarray]) -> None:
        from wedlm.engine.ranks.device import read_shape

        assert self.graphs is not None, "rank 0 has no kernels either"
        if kind == Kind.PAGES:
            self.device_rank.add_pages(*(numbers.tolist() for numbers in arrays))
        elif kind == Kind.CAPTURE:
            self.graphs.add(read_shape(arrays[0]), None, None)
        else:
            self.graphs.run(read_shape(arrays[0]), None, None)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
