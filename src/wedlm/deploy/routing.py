# SPDX-License-Identifier: Apache-2.0
"""Which replica a request goes to: the one that has its conversation's keys, unless that one has far more to do.

Rendezvous hashing: each replica gets a number from the conversation's name and its own, and the highest one has it.
Any number of routers agree without a word between them, and when a replica comes or goes, the conversations of that one
alone move. It depends on no torch and no Ray; ``benchmarks/scale_model.py`` simulates it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# By how many requests a replica may exceed the least busy one before conversations leave it (docs/scale.md).
SPILL = 32
_PROMPT_CHARACTERS, _PROMPT_TOKENS = 256, 64  # of a text that goes on and on, what names it


def conversation_key(body: bytes) -> str:
    """A name for the conversation that a request's body goes on with, in any of the server's APIs; "" if it has none.

    It is made of what its first turn has and all later ones repeat: what stands before the first user's message, and
    that message. System prompts alone do not name a conversation, since all users of an application share one. A
    prompt without messages is named by its beginning.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return ""  # a replica will say what is wrong with it
    if not isinstance(request, dict):
        return ""
    first = _first_turn(request)
    if first is None:
        return ""
    shared = [request.get(name) for name in ("model", "system", "instructions", "tools")]
    return hashlib.sha256(json.dumps([*shared, first]).encode()).hexdigest()


def _first_turn(request: Mapping[str, Any]) -> Any:
    """Messages up to the first of a user, or how the prompt begins; None if there is neither."""
    for name in ("messages", "input", "prompt"):
        found = request.get(name)
        if isinstance(found, str) and found:
            return found if name == "input" else found[:_PROMPT_CHARACTERS]
        if isinstance(found, list) and found:
            if isinstance(found[0], int):
                return found[:_PROMPT_TOKENS]
            if not isinstance(found[0], dict):  # several prompts
                return str(found[0])[:_PROMPT_CHARACTERS]
            users = (i for i, one in enumerate(found) if isinstance(one, dict) and one.get("role") == "user")
            return found[: next(users, 0) + 1]
    return None


def ranked(key: str, replicas: Iterable[str]) -> list[str]:
    """The replicas, first the one that has the conversation, then the one that will have it once that is gone, ..."""
    return sorted(replicas, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest(), reverse=True)


def choose(key: str, num_open: Mapping[str, int], spill: int = SPILL) -> list[str]:
    """The replicas in the order in which they are asked to take a request. ``num_open``: requests of each.

    One with over ``spill`` requests more than the least busy one comes after those that have not, and "" belongs to
    none: the least busy one comes first.
    """
    if not key:
        return sorted(num_open, key=lambda name: num_open[name])
    least = min(num_open.values(), default=0)
    return sorted(ranked(key, num_open), key=lambda name: num_open[name] > least + spill)


def in_turn(names: Sequence[str], count: int) -> list[str]:
    """Round robin, the other policy: the replicas from the ``count``-th on."""
    start = count % max(1, len(names))
    return [*names[start:], *names[:start]]
