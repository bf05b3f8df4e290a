# SPDX-License-Identifier: Apache-2.0
"""Grammars, in llguidance's Lark syntax, for the forms of an answer that clients request."""

import json
from collections.abc import Sequence
from typing import Any

from wedlm.engine.constraints.one_of import check_one_of
from wedlm.server.tool_forms import ToolForm

_JSON_OPTIONS = {"whitespace_pattern": "[ ]?", "coerce_one_of": True}  # as the engine compiles schemas


def regex_grammar(regex: str) -> str:
    """The whole text matches ``regex``."""
    regex = regex.removeprefix("^")
    if regex.endswith("$") and not regex.endswith("\\$"):
        regex = regex[:-1]
    pieces, escaped = [], False
    for character in regex:
        if character == "/" and not escaped:
            character = r"\/"
        elif character == "\n":
            character = "n" if escaped else r"\n"
        escaped = character == "\\" and not escaped
        pieces.append(character)
    return f"start: /{''.join(pieces)}/"


def choice_grammar(texts: Sequence[str]) -> str:
    """One of ``texts``."""
    return f"start: {' | '.join(json.dumps(text) for text in texts)}"


def answer_or_calls_grammar(answer: dict[str, Any] | str, call: dict[str, Any], form: ToolForm, several: bool) -> str:
    """JSON of the schema ``answer``, or calls, each of the schema ``call``, as a model of ``form`` writes them.

    Raises ValueError for a form whose calls are not JSON, or for a schema whose oneOf may hold twice.
    """
    if form.call_grammar is None:
        raise ValueError(
            "response_format asks for JSON while tools may be called, and this model's calls "
            f"({form.name}) are not JSON; expected tool_choice to be none, required or a tool's name"
        )
    schema = json.loads(answer) if isinstance(answer, str) else answer
    if not isinstance(schema, dict):
        raise ValueError("response_format has no object as its schema; expected a JSON schema, which is an object")
    for one in (schema, call):
        check_one_of(one)
    return "\n".join(
        [
            "start: answer | calls",
            f"answer: {_json(schema)}",
            form.call_grammar if several else form.call_grammar.replace(form.more_calls, ""),
            f"call: {_json(call)}",
        ]
    )


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _JSON_OPTIONS})
