# SPDX-License-Identifier: Apache-2.0
"""JSON schemas' ``oneOf``. A grammar can say "this or that", not "exactly one of them": the two are the same where no
text is admitted by two alternatives, which is proved here for what people write (other types, values, or a property
that tells them apart), and refused otherwise."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})
_DATA = ("const", "enum", "default", "examples")  # what stands there is no schema
_DEPTH = 8  # of references and properties that are followed


def check_one_of(schema: Any) -> None:
    """ValueError unless the alternatives of every ``oneOf`` are known to exclude one another."""
    for alternatives in _one_ofs(schema):
        for a, b in itertools.combinations(alternatives, 2):
            if not exclude(a, b, schema):
                raise ValueError(
                    "oneOf has alternatives that may both hold; expected anyOf, or alternatives of different types, "
                    "values, or with a required property whose values differ"
                )


def _one_ofs(schema: Any) -> Iterator[list[Any]]:
    if isinstance(schema, list):
        for one in schema:
            yield from _one_ofs(one)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            if name == "oneOf" and isinstance(value, list):
                yield value
            if name not in _DATA or isinstance(value, dict):  # a property may have such a name, too
                yield from _one_ofs(value)


@dataclass
class _Facts:
    """What an instance must be like: a conjunction, perhaps not all of it."""

    types: frozenset[str] = _TYPES
    values: frozenset[str] | None = None
    required: set[str] = field(default_factory=set)
    properties: dict[str, list[Any]] = field(default_factory=dict)
    choices: list[list[Any]] = field(default_factory=list)


def exclude(a: Any, b: Any, root: Any, depth: int = _DEPTH) -> bool:
    """Whether surely no instance is valid under both. ``root`` is where references point into."""
    if depth == 0:
        return False
    one, other = _Facts(), _Facts()
    _collect(one, a, root, depth)
    _collect(other, b, root, depth)
    common = one.types & other.types
    if not common:
        return True
    if one.values is not None and other.values is not None and not one.values & other.values:
        return True
    if common == {"object"}:
        for name in one.required & other.required:
            pairs = itertools.product(one.properties.get(name, ()), other.properties.get(name, ()))
            if any(exclude(x, y, root, depth - 1) for x, y in pairs):
                return True
    return any(all(exclude(x, b, root, depth - 1) for x in xs) for xs in one.choices) or any(
        all(exclude(a, y, root, depth - 1) for y in ys) for ys in other.choices
    )


def _collect(facts: _Facts, schema: Any, root: Any, depth: int) -> None:
    """Add what ``schema`` demands to ``facts``."""
    if schema is False:
        facts.types = frozenset()
    if not isinstance(schema, dict) or depth == 0:
        return
    if "type" in schema:
        given = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        facts.types &= {"number" if name == "integer" else str(name) for name in given}
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        names = frozenset(_name(value) for value in values)
        facts.values = names if facts.values is None else facts.values & names
        facts.types &= {_type(value) for value in values}
    if isinstance(schema.get("required"), list):
        facts.required |= {name for name in schema["required"] if isinstance(name, str)}
    if isinstance(schema.get("properties"), dict):
        for name, value in schema["properties"].items():
            facts.properties.setdefault(name, []).append(value)
    facts.choices += [schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)]
    for part in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        _collect(facts, part, root, depth - 1)
    if isinstance(schema.get("$ref"), str):
        _collect(facts, _target(schema["$ref"], root), root, depth - 1)


def _target(reference: str, root: Any) -> Any:
    """What a reference inside the schema points to; True, which demands nothing, if that is not found."""
    place, *names = reference.split("/")
    found = root if place == "#" else True
    for name in names:
        name = name.replace("~1", "/").replace("~0", "~")
        found = found[name] if isinstance(found, dict) and name in found else True
    return found


def _name(value: Any) -> str:
    """Equal for equal JSON values: 1 is 1.0, and not true."""
    number = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if number else value, sort_keys=True)


def _type(value: Any) -> str:
    for name, kinds in (("null", type(None)), ("boolean", bool), ("number", int | float), ("string", str)):
        if isinstance(value, kinds):
            return name
    return "array" if isinstance(value, list) else "object"
