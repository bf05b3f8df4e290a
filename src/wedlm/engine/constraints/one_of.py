# SPDX-License-Identifier: Apache-2.0
"""JSON schemas' ``oneOf``. A grammar can say "this or that", but not "exactly one of them". The two are the same if no
text fits two alternatives. This module proves that for what people write (different types or values, or a property that
distinguishes them) and refuses the rest. Alternatives with values are compared all at once, the others two by two,
within a budget of steps."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})
_DATA = ("const", "enum", "default", "examples")  # the values of these are not schemas
_DEPTH = 8  # of references and properties that are followed
_MAX_STEPS = 200_000  # about 0.2 s
_MAX_TAGS = 8  # properties that are tried as what tells alternatives apart


def check_one_of(schema: Any) -> None:
    """Raises ValueError unless the alternatives of every ``oneOf`` are known to exclude each other."""
    proof = _Proof(schema)
    for alternatives in _one_ofs(schema):
        for i, j in proof.doubtful(alternatives):
            if not proof.excludes(alternatives[i], alternatives[j], _DEPTH):
                raise ValueError(
                    "oneOf has alternatives that may both hold; expected anyOf, or alternatives of different types, "
                    "values, or with a required property whose values differ"
                )


def exclude(a: Any, b: Any, root: Any) -> bool:
    """Whether surely no instance is valid under both. References point into ``root``."""
    return _Proof(root).excludes(a, b, _DEPTH)


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
    """What is known about an instance, as a conjunction that may be incomplete. Each schema is kept once, by
    identity."""

    types: frozenset[str] = _TYPES
    values: frozenset[str] | None = None
    required: set[str] = field(default_factory=set)
    properties: dict[str, dict[int, Any]] = field(default_factory=dict)
    choices: dict[int, list[Any]] = field(default_factory=dict)

    def add(self, other: "_Facts") -> int:
        """Add everything that ``other`` demands, and return about how many steps that took."""
        self.types &= other.types
        if other.values is not None:
            self.values = other.values if self.values is None else self.values & other.values
        self.required |= other.required
        for name, schemas in other.properties.items():
            self.properties.setdefault(name, {}).update(schemas)
        self.choices |= other.choices
        sizes = [len(other.values or ()), len(other.required), len(other.choices)]
        return sum(sizes) + sum(1 + len(schemas) for schemas in other.properties.values())


class _Proof:
    """What is known about the parts of one schema, each worked out once. Raises ValueError when the budget is
    used up."""

    def __init__(self, root: Any) -> None:
        self._root, self._steps = root, 0
        self._facts: dict[tuple[int, int], _Facts] = {}
        self._excluded: dict[tuple[int, int, int], bool] = {}

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise ValueError("oneOf takes too long to prove that its alternatives exclude one another; expected anyOf")

    def excludes(self, a: Any, b: Any, depth: int) -> bool:
        """Whether surely no instance is valid under both, following references and properties ``depth`` deep."""
        if depth == 0:
            return False
        self._spend(1)
        key = id(a), id(b), depth
        known = self._excluded.get(key)
        if known is None:
            known = self._excluded[key] = self._compare(a, b, depth)
        return known

    def _compare(self, a: Any, b: Any, depth: int) -> bool:
        one, other = self.facts(a, depth), self.facts(b, depth)
        common = one.types & other.types
        if not common:
            return True
        if one.values is not None and other.values is not None:
            self._spend(min(len(one.values), len(other.values)))
            if not one.values & other.values:
                return True
        if common == {"object"}:
            self._spend(min(len(one.required), len(other.required)))
            for name in one.required & other.required:
                pairs = itertools.product(
                    one.properties.get(name, {}).values(), other.properties.get(name, {}).values()
                )
                if any(self.excludes(x, y, depth - 1) for x, y in pairs):
                    return True
        return any(all(self.excludes(x, b, depth - 1) for x in xs) for xs in one.choices.values()) or any(
            all(self.excludes(a, y, depth - 1) for y in ys) for ys in other.choices.values()
        )

    def facts(self, schema: Any, depth: int) -> _Facts:
        """What ``schema`` demands; do not change it."""
        key = id(schema), depth
        known = self._facts.get(key)
        if known is None:
            known = self._facts[key] = self._collect(schema, depth)
        return known

    def _collect(self, schema: Any, depth: int) -> _Facts:
        self._spend(1)
        facts = _Facts()
        if schema is False:
            facts.types = frozenset()
        if not isinstance(schema, dict) or depth == 0:
            return facts
        if "type" in schema:
            given = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            facts.types &= {"number" if name == "integer" else str(name) for name in given}
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            facts.values = frozenset(_name(value) for value in values)
            facts.types &= {_type(value) for value in values}
            self._spend(len(values))
        if isinstance(schema.get("required"), list):
            facts.required |= {name for name in schema["required"] if isinstance(name, str)}
        if isinstance(schema.get("properties"), dict):
            facts.properties = {name: {id(value): value} for name, value in schema["properties"].items()}
        choices = [schema[name] for name in ("anyOf", "oneOf") if isinstance(schema.get(name), list)]
        facts.choices = {id(choice): choice for choice in choices}
        self._spend(len(facts.required) + len(facts.properties))
        parts = schema["allOf"] if isinstance(schema.get("allOf"), list) else []
        if isinstance(schema.get("$ref"), str):
            parts = [*parts, _target(schema["$ref"], self._root)]
        for part in parts:
            self._spend(facts.add(self.facts(part, depth - 1)))
        return facts

    def doubtful(self, alternatives: Sequence[Any]) -> Iterator[tuple[int, int]]:
        """The pairs, by index, that neither their types nor their values nor a property's values distinguish."""
        facts = [self.facts(one, _DEPTH) for one in alternatives]
        seen = set()
        for kind in _TYPES:
            members = [i for i, one in enumerate(facts) if kind in one.types]
            names = [facts[i].values for i in members]
            if kind == "object" and None in names:
                names = self._tags([facts[i] for i in members])
            for i, j in self._meeting(names):
                pair = members[i], members[j]
                if pair not in seen:
                    seen.add(pair)
                    yield pair

    def _tags(self, facts: list[_Facts]) -> "list[_Names]":
        """For each alternative the values of a required property, or None where they are unknown. Uses the property
        that is known most often.

        Alternatives that may not be objects are None, too.
        """
        self._spend(sum(len(one.required) for one in facts))
        required = Counter(name for one in facts if one.types == {"object"} for name in one.required)
        best: list[_Names] = [None] * len(facts)
        for name, _ in required.most_common(_MAX_TAGS):
            values: list[_Names] = []
            for one in facts:
                known = _Facts()
                if one.types == {"object"} and name in one.required:
                    for schema in one.properties.get(name, {}).values():
                        self._spend(known.add(self.facts(schema, _DEPTH - 1)))
                values.append(known.values)
            if values.count(None) < best.count(None):
                best = values
        return best

    def _meeting(self, names: "list[_Names]") -> Iterator[tuple[int, int]]:
        """The pairs that share a name, or of which one has no known name."""
        holders: dict[str, list[int]] = defaultdict(list)
        unknown: list[int] = []
        for j, some in enumerate(names):
            self._spend(1 + len(some or ()))
            meets = range(j) if some is None else {*unknown, *(i for name in some for i in holders[name])}
            for i in meets:
                self._spend(1)
                yield i, j
            if some is None:
                unknown.append(j)
            for name in some or ():
                holders[name].append(j)


_Names = frozenset[str] | None


def _target(reference: str, root: Any) -> Any:
    """What a reference inside the schema points to; True, which demands nothing, if the target is missing."""
    place, *names = reference.split("/")
    found = root if place == "#" else True
    for name in names:
        name = name.replace("~1", "/").replace("~0", "~")
        found = found[name] if isinstance(found, dict) and name in found else True
    return found


def _name(value: Any) -> str:
    """A key that is equal for equal JSON values: 1 equals 1.0, and not true."""
    return json.dumps(_without_fractions(value), sort_keys=True)


def _without_fractions(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_fractions(one) for one in value]
    if isinstance(value, dict):
        return {name: _without_fractions(one) for name, one in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _type(value: Any) -> str:
    for name, kinds in (("null", type(None)), ("boolean", bool), ("number", int | float), ("string", str)):
        if isinstance(value, kinds):
            return name
    return "array" if isinstance(value, list) else "object"
