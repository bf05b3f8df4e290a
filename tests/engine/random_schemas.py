# SPDX-License-Identifier: Apache-2.0
"""Random JSON schemas of what answers are asked for, each part of bounded length."""

import random
from typing import Any

Schema = dict[str, Any]
WORDS = ["name", "city", "count", "ok", "tags", "x", "a b", 'q"', "items"]


def random_schema(rng: random.Random) -> Schema:
    """An object or array, now and then with definitions that it refers to. ASCII alone."""
    if rng.random() < 0.2:
        named = {"Part": _value(rng, 1), "Kind": {"enum": ["one", "two", 3, None]}}
        properties = {"first": {"$ref": "#/$defs/Part"}, "kind": {"$ref": "#/$defs/Kind"}}
        return {"$defs": named, **_object(properties, list(properties))}
    return _container(rng, 2)


def _object(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _container(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.3:
        low = rng.randint(0, 1)
        return {"type": "array", "items": _value(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(1, 2)}
    names = rng.sample(WORDS, rng.randint(1, 3))
    return _object({name: _value(rng, depth - 1) for name in names}, [name for name in names if rng.random() < 0.7])


def _value(rng: random.Random, depth: int) -> Schema:
    if depth > 0 and rng.random() < 0.4:
        return _container(rng, depth)
    low = rng.randint(-20, 20)
    kinds: list[Schema] = [
        {"type": "string", "maxLength": rng.randint(1, 8)},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": "^[a-c]{1,4}(x|yz)$"},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)},
        {"type": "integer", "exclusiveMinimum": 0, "multipleOf": 5, "maximum": 100},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", "green", 7, False]},
        {"const": "fixed"},
        {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
        {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    ]
    return rng.choice(kinds)
