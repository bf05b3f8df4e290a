# SPDX-License-Identifier: Apache-2.0
"""``python -m wedlm.cli.replica INDEX/COUNT SOCKETS LIFE ARGUMENT...``: one replica of ``wedlm serve``, started by
``replicas.py``. SOCKETS and LIFE are numbers of descriptors that it inherits."""

import socket
import sys

from wedlm.cli import main, serve
from wedlm.cli.replicas import Replica
from wedlm.engine.ranks.life import end_with

if __name__ == "__main__":
    place, numbers, life, *arguments = sys.argv[1:]
    end_with(int(life))
    index, _, count = place.partition("/")
    sockets = [socket.socket(fileno=int(number)) for number in numbers.split(",")]
    serve.replica = Replica(int(index), int(count), sockets)
    sys.argv = ["wedlm", *arguments]
    main()
