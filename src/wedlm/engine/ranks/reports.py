# SPDX-License-Identifier: Apache-2.0
"""Reports from the other ranks to rank 0, which are rare: that they have loaded, or why they failed."""

import json
import socket
from typing import Any

from wedlm.engine.ranks.messages import receive_bytes

LOADED, FAILED = "loaded", "failed"
_MOST_BYTES, _MOST_CHARACTERS = 2**16, 2000


def send_report(connection: socket.socket, kind: str, **values: Any) -> None:
    """``values`` are numbers and strings; long strings are cut."""
    cut = {name: value[:_MOST_CHARACTERS] if isinstance(value, str) else value for name, value in values.items()}
    data = json.dumps({"kind": kind, **cut}).encode()
    connection.sendall(len(data).to_bytes(8, "little") + data)


def receive_report(connection: socket.socket) -> dict[str, Any] | None:
    """The report; None if the other side has gone. Raises ValueError for bytes that are not a report."""
    head = receive_bytes(connection, 8)
    if head is None:
        return None
    size = int.from_bytes(head, "little")
    if size > _MOST_BYTES:
        raise ValueError(f"a report claims {size} bytes; expected at most {_MOST_BYTES}")
    data = receive_bytes(connection, size)
    if data is None:
        return None
    report = json.loads(data)
    if not isinstance(report, dict) or "kind" not in report:
        raise ValueError("a report is not an object with a kind")
    return report
