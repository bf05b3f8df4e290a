# SPDX-License-Identifier: Apache-2.0
"""Tool calls as the readers find them in a text that comes in pieces."""

import json
from typing import Any

from wedlm.server.readers import CallReader, Delta, message
from wedlm.server.tool_forms import FORMS

NAMES = ["add", "get_weather", "f.g-2", "a"]


def read(reader, pieces: list[str], reason: str = "stop") -> tuple[list[Delta], dict]:
    deltas = [reader.push(piece) for piece in pieces]
    deltas.append(reader.finish(reason))
    whole = Delta()
    for delta in json.loads(json.dumps([[delta.content, delta.calls] for delta in deltas])):
        whole.add(Delta(*delta))
    return deltas, dict(message(whole))


def calls_in(form: str, pieces: list[str], names: list[str] = NAMES, parallel: bool = True) -> tuple[Any, list]:
    """Content and calls, names with the text of their arguments."""
    whole = read(CallReader(FORMS[form], names, parallel), pieces)[1]
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in whole.get("tool_calls", ())]
    return whole["content"], found
