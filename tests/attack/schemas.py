# SPDX-License-Identifier: Apache-2.0
"""Schemas and grammars that a stranger may send: hostile ones of every kind that costs time, memory or stack somewhere,
and honest ones that are large. Each is the options of a ``SamplingParams``."""

import json
import random
from collections.abc import Iterator
from typing import Any

Options = dict[str, Any]
MOST = 60_000  # characters; 65,536 are admitted


def hostile() -> dict[str, Options]:
    """By name. Whether each is refused or works is left open; that it harms nothing is not."""
    found = {name: {"json_schema": schema} for name, schema in _schemas()}
    return found | {name: {"grammar": grammar} for name, grammar in _grammars()}


def honest() -> dict[str, Options]:
    """By name: what must go on working, large as it is."""
    kinds = [
        {"type": "object", "properties": {"kind": {"const": f"k{i}"}, "v": {"type": "integer"}}, "required": ["kind"]}
        for i in range(400)
    ]
    fields = {f"field {i}": {"type": ["string", "null"], "maxLength": 40} for i in range(300)}
    named = {f"T{i}": {"type": "array", "items": {"$ref": f"#/$defs/T{i + 1}"}} for i in range(40)}
    tree = {"type": "object", "properties": {"v": {"type": "number"}, "next": {"$ref": "#/$defs/N"}}, "required": ["v"]}
    schemas = {
        "constants": {"oneOf": [{"const": i} for i in range(3900)]},
        "enum": {"enum": [f"word {i}" for i in range(3900)]},
        "tagged union": {"oneOf": kinds},
        "tagged union by reference": {
            "$defs": {f"K{i}": kind for i, kind in enumerate(kinds)},
            "oneOf": [{"$ref": f"#/$defs/K{i}"} for i in range(len(kinds))],
        },
        "record": {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False},
        "chain of references": {"$defs": {**named, "T40": {"type": "null"}}, "$ref": "#/$defs/T0"},
        "list of itself": {"$defs": {"N": tree}, "$ref": "#/$defs/N"},
        "money": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 1e6},
        "formats": {"type": "array", "items": {"anyOf": [{"type": "string", "format": f} for f in FORMATS]}},
        "pattern": {"type": "string", "pattern": r"^\p{Lu}\p{L}{0,40}( \p{Lu}\p{L}{0,40}){0,3}$"},
        "anything": {},
    }
    return {name: {"json_schema": schema} for name, schema in schemas.items()} | {
        "arithmetic": {"grammar": 'start: sum\nsum: (sum "+")? product\nproduct: (product "*")? NUM\nNUM: /[0-9]{1,9}/'}
    }


FORMATS = ["date-time", "date", "time", "email", "ipv4", "ipv6", "uuid", "uri", "hostname"]


def constants(count: int) -> Options:
    """A ``oneOf`` of that many."""
    return {"json_schema": {"oneOf": [{"const": i} for i in range(count)]}}


def multiples(*factors: float) -> Options:
    """A common multiple of all of them."""
    return {"json_schema": {"allOf": [{"type": "integer", "multipleOf": factor} for factor in factors]}}


def nested_references(count: int, word: str = "oneOf") -> Options:
    """Each level refers to itself ``count`` times."""
    return {
        "json_schema": {
            "$defs": {"a": {"allOf": [{"anyOf": [{"$ref": "#/$defs/a"}]} for _ in range(count)]}},
            word: [{"$ref": "#/$defs/a"} for _ in range(2)],
        }
    }


def _schemas() -> Iterator[tuple[str, Any]]:
    for factors in ((9973, 9967), (9973, 9967, 9949, 9941), (1000003,), (2999999,), (999999937,), (1e-9, 7), (1e-300,)):
        yield f"multiples of {factors}", multiples(*factors)["json_schema"]
    for word in ("oneOf", "anyOf", "allOf"):
        for count in (2, 6, 12):
            yield f"nested {word} {count}", nested_references(count, word)["json_schema"]
        doubling = {f"a{i}": {word: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
        yield f"doubling {word}", {"$defs": {**doubling, "a40": {"type": "object"}}, "$ref": "#/$defs/a0"}
        ways = [{"type": "object", "properties": {f"p{i}-{j}": {}}} for i in range(12) for j in range(4)]
        yield f"product {word}", {"allOf": [{word: ways[i : i + 4]} for i in range(0, 48, 4)]}
        yield f"many {word}", {word: [{"type": "string", "minLength": i} for i in range(1200)]}
        yield f"patterns {word}", {word: [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}c"} for i in range(200)]}
        yield f"same objects {word}", {word: [{"type": "object", "required": ["a"]}] * 1500}
    yield "constants", constants(3900)["json_schema"]
    yield "equal constants", {"oneOf": [{"const": 1}] * 4000}
    yield "equal but the last", {"oneOf": [{"const": "x" * 20_000 + letter} for letter in "ab"]}
    lists = [{"type": "array", "items": [{"const": i}], "minItems": 1} for i in range(900)]
    yield "lists", {"oneOf": lists}
    choices = [{"anyOf": [{"const": i}, {"const": [i]}]} for i in range(900)]
    yield "choices of constants", {"oneOf": choices}
    yield "enum", {"enum": [random.Random(i).random() for i in range(2500)]}
    yield "enum of objects", {"enum": [{"a": {"b": {"c": [i] * 5}}} for i in range(1500)]}
    yield "long constant", {"const": "a" * MOST}
    yield "properties", {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1500)}}
    required = {f"p{i}": {"enum": [i, "x"]} for i in range(900)}
    yield "required properties", {"type": "object", "properties": required, "required": list(required)}
    yield "pattern properties", {"type": "object", "patternProperties": {f"^(a|b)*{i}$": {} for i in range(300)}}
    yield "deep lists", _nested(lambda inner: {"type": "array", "items": inner}, 30)
    yield "deep objects", _nested(lambda inner: {"type": "object", "properties": {"a": inner}, "required": ["a"]}, 20)
    yield "deep anyOf", _nested(lambda inner: {"anyOf": [inner, {"type": "null"}]}, 20)
    yield "deep not", _nested(lambda inner: {"not": inner}, 60)
    wide = _nested(lambda inner: {"type": "object", "properties": dict.fromkeys("ab", inner), "required": ["a"]}, 9)
    yield "wide objects", wide
    for bound in (10**5, 10**9, 2**63, 10**30):
        yield f"items {bound}", {"type": "array", "minItems": bound, "maxItems": bound}
        yield f"length {bound}", {"type": "string", "minLength": bound, "maxLength": bound}
        yield f"properties {bound}", {"type": "object", "minProperties": bound, "maxProperties": bound}
        yield f"numbers {bound}", {"type": "integer", "minimum": -bound, "maximum": bound, "multipleOf": 7}
    yield (
        "items of items",
        _nested(lambda inner: {"type": "array", "items": inner, "minItems": 99, "maxItems": 999}, 12),
    )
    yield "lengths and pattern", {"type": "string", "minLength": 5000, "maxLength": 9000, "pattern": "^(a|b|ab)*$"}
    for name, pattern in _patterns():
        yield f"pattern {name}", {"type": "string", "pattern": pattern}
    conjunction = [{"type": "string", "pattern": f"^(.{{{i}}}a|b)*.*{i}"} for i in range(3, 40)]
    yield "conjunction of patterns", {"allOf": conjunction}
    primes = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
    yield "conjunction of periods", {"allOf": [{"type": "string", "pattern": f"^(a{{{p}}})*$"} for p in primes]}
    yield "formats and patterns", {"allOf": [{"type": "string", "format": f, "pattern": "a.{50}b"} for f in FORMATS]}
    yield "endless reference", {"$ref": "#"}
    yield (
        "references in a ring",
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    )
    yield "reference far away", {"$ref": "http://127.0.0.1:9/schema.json"}
    yield "reference to a file", {"$ref": "file:///etc/passwd"}
    yield "long pointer", {"$ref": "#" + "/a" * 20_000}
    yield "half a surrogate", {"const": "\ud800", "enum": ["\udfff"]}
    yield "options of the library", {"x-guidance": {"whitespace_pattern": "(a|b)*a(a|b){200}", "lenient": True}}
    ids = {"$defs": {f"a{i}": {"$id": f"http://a/{i}", "$anchor": "x"} for i in range(900)}, "$ref": "#/$defs/a1"}
    yield "identifiers", ids
    yield "conditions", _nested(lambda inner: {"if": inner, "then": inner, "else": inner}, 7)


def _nested(outer: Any, depth: int) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = outer(schema)
        if len(json.dumps(schema)) > MOST // 3:
            break
    return schema


def _patterns() -> Iterator[tuple[str, str]]:
    """Regular expressions that cost more than their length."""
    yield "stars", "((a*)*)*" * 50 + "b"
    yield "same ways", "^(a|a|a)*b$"
    yield "window", "(a|b)*a(a|b){200}"
    yield "any window", "a.{2000}b"
    yield "powers", "((((a{30}){30}){30}){30}){30}"
    yield "powers of ranges", "((a{0,50}){0,50}){0,50}b"
    yield "unicode", r"^(\p{L}|\p{N}|\p{Emoji}){1,2000}$"
    yield "not unicode", r"^(\P{L}\P{N}){0,500}[^\p{Greek}]$"
    yield "words", "^(" + "|".join(f"w{i}" for i in range(6000)) + ")$"
    yield "words in any order", "^(" + "|".join(f"w{i}" for i in range(5000)) + "){1,50}$"
    yield "parentheses", "(" * 20_000 + "a" + ")" * 20_000
    yield "large class", "[" + "".join(chr(0x4E00 + 2 * i) for i in range(10_000)) + "]{5,500}"
    yield "words within", ".*(" + "|".join(random.Random(i).randbytes(6).hex() for i in range(2000)) + ").*"
    yield "counters", "^" + "".join(f"[a-{chr(98 + i % 20)}]{{0,{i}}}" for i in range(300)) + "$"
    yield "look-ahead", "^(?=.*a)(?=.*b).{5,}$"


def _grammars() -> Iterator[tuple[str, str]]:
    yield "ambiguous", 'start: s\ns: s s s | s s | "a" | ""'
    yield "ambiguous letters", "start: s\ns: s s | /[a-z]*/ | /[a-z ]*/ | "
    yield "right recursion", 'start: s\ns: "a" s | "a"'
    yield "parentheses", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000
    yield "chain of rules", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(3000)) + '\nr3000: "a"'
    doubling = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60))
    yield "doubling rules", f'start: r0\n{doubling}\nr60: "a" | ""'
    yield "doubling terminals", "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(60)) + "\nT60: /a?/"
    yield (
        "many rules",
        "start: " + " | ".join(f"r{i}" for i in range(2500)) + "".join(f"\nr{i}: /x{i}/" for i in range(2500)),
    )
    yield "intersection", "start: T\nT: " + " & ".join(f"/(.*a.{{{i}}})/" for i in range(4, 30))
    yield "complement", "start: T\nT: ~/(.*a.{20})/ & ~/(.*b.{21})/ & ~/(.*c.{22})/"
    yield "periods", "start: T\nT: " + " & ".join(f"/(a{{{p}}})*/" for p in (2, 3, 5, 7, 11, 13, 17, 19, 23))
    yield "nested complements", "start: T\nT: " + "~(" * 200 + "/a.*b/" + ")" * 200
    yield "repetition", 'start: ("a" | "b"){1000000000}'
    yield "repetitions", 'start: ((("a"{1,900} "b"){1,900} "c"){1,900} "d"){1,900}'
    yield "schema within", 'start: %json {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}'
    yield "substrings", 'start: T\nT: %regex {"substring_chars": ' + json.dumps("abc " * 10_000) + "}"
    yield "lazy", "start: T*\nT[lazy]: /(.|\\n)*a.{30}b/"
    yield "empty repetitions", 'start: (""*)*'
    yield "comments", "// " + "x" * 50_000 + '\nstart: "a"'
    yield "quotes", 'start: "' + "\\\\" * 20_000 + '"'
    yield "noise", random.Random(0).randbytes(9000).hex()
