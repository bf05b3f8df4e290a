# SPDX-License-Identifier: Apache-2.0
"""The program of every rank but the first: ``python -m wedlm.engine.ranks.worker CONNECTION LIFE``, two descriptors.

It loads its part of the weights, then does what rank 0 tells it until the connection closes. When ``LIFE`` closes, rank
0's process has ended, and this one ends at once, whatever it waits for.
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from wedlm.engine.options import EngineOptions
from wedlm.engine.ranks.cache_size import read_cache
from wedlm.engine.ranks.first_rank import read_choice, read_forward
from wedlm.engine.ranks.group import Group
from wedlm.engine.ranks.load import load_shard, new_rank
from wedlm.engine.ranks.messages import Kind, receive, receive_bytes
from wedlm.engine.ranks.rank import Rank
from wedlm.engine.ranks.reports import FAILED, LOADED, send_report

_PEERS_S = 3600.0  # rank 0 notices who does not answer; a rank that waits for a slow one must not


def main(connection_fd: int, life_fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to handle
    directory: list[str] = []  # where the ranks meet, which rank 0 may not have had time to remove
    threading.Thread(target=_end_with, args=(life_fd, directory), daemon=True).start()
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


def _end_with(life_fd: int, directory: list[str]) -> None:
    while os.read(life_fd, 1):
        pass
    for path in directory:
        shutil.rmtree(path, ignore_errors=True)
    os._exit(1)


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
    loaded = load_shard(task["model"], options, device, group)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    send_report(connection, LOADED, peak_bytes=peak, weight_bytes=loaded.num_bytes)
    group.connect(Path(task["directory"]), _PEERS_S)
    rank: Rank | None = None
    while (message := receive(connection)) is not None:
        kind, arrays = message
        if kind == Kind.CACHE:
            rank = new_rank(loaded, read_cache(arrays), options)
        else:
            assert rank is not None, "rank 0 names the cache first"
            _obey(rank, kind, arrays)


@torch.inference_mode()
def _obey(rank: Rank, kind: Kind, arrays: list[Any]) -> None:
    if kind == Kind.FORWARD:
        rank.forward(*read_forward(arrays, rank.device))
    elif kind == Kind.CHOOSE:
        rank.choose(read_choice(arrays, rank.device))
    else:
        rank.whole_logits()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
