# SPDX-License-Identifier: Apache-2.0
"""Messages from rank 0 to the others: a kind and some arrays of integers, as bytes. Nothing in them can run code."""

import socket
import struct
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

_HEAD = struct.Struct("<QII")  # bytes that follow, kind, number of arrays
_MOST_BYTES = 2**30  # no step of ours comes near; a damaged length must not take all memory


class Kind(IntEnum):
    """What the receiver should do."""

    CACHE = 0
    FORWARD = 1
    CHOOSE = 2
    GATHER = 3
    CAPTURE = 4
    RUN = 5
    PAGES = 6


def encode(kind: Kind, arrays: Sequence[np.ndarray]) -> bytes:
    """The message. ``arrays``: int64 of one dimension each."""
    sizes = np.array([len(array) for array in arrays], dtype=np.int64).tobytes()
    body = b"".join([sizes, *(array.tobytes() for array in arrays)])
    return _HEAD.pack(len(body), kind, len(arrays)) + body


def receive(connection: socket.socket) -> tuple[Kind, list[np.ndarray]] | None:
    """The next message; None once the sender is gone. Raises ValueError for bytes that are not a message."""
    head = receive_bytes(connection, _HEAD.size)
    if head is None:
        return None
    size, kind, count = _HEAD.unpack(head)
    if size > _MOST_BYTES or size % 8 or 8 * count > size:
        raise ValueError(f"a message claims {size} bytes in {count} arrays")
    body = receive_bytes(connection, size)
    if body is None:
        return None
    numbers = np.frombuffer(body, dtype=np.int64)
    ends = np.cumsum(numbers[:count])
    if count and (numbers[:count].min() < 0 or ends[-1] != len(numbers) - count):
        raise ValueError(f"a message has arrays of {numbers[:count].tolist()} numbers in {size} bytes")
    return Kind(kind), np.split(numbers[count:], ends[:-1]) if count else []


def receive_bytes(connection: socket.socket, size: int) -> bytearray | None:
    """Exactly that many bytes; None if the sender left before the last of them."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return data
