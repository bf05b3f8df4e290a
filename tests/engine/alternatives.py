# SPDX-License-Identifier: Apache-2.0
"""Lists of alternatives for ``oneOf``, by whether they exclude each other."""

TYPED = [{"type": "integer"}, {"type": "string"}, {"type": ["null", "boolean"]}, {"enum": [[1], {}]}]
KINDS = [{"properties": {"k": {"const": c}}, "required": ["k"], "type": "object"} for c in ("a", "b", 1, True, None)]
EXCLUSIVE = [
    TYPED,
    KINDS,
    [{"const": 1}, {"enum": [2, True, "1"]}, {"enum": [[1], "2"]}],
    [{"allOf": [{"type": "string"}]}, {"anyOf": [{"type": "integer"}, {"type": "null"}]}],
    [False, {}],
]
OVERLAPPING = [
    [{"type": "string"}, {"type": "string"}],
    [{"type": "integer"}, {"type": "number"}],
    [{"const": 1}, {"enum": [1.0, 2]}],
    [{"type": "string"}, True],
    [
        {"properties": {"k": {"const": "a"}}, "required": ["k"]},
        {"properties": {"k": {"const": "b"}}, "required": ["k"]},
    ],
    [{"type": "object", "properties": {"k": {"const": c}}} for c in "ab"],  # {} is both
    [{"$ref": "#/nowhere"}, {"type": "null"}],
    [{"type": "null"}, {"anyOf": [{"type": "integer"}, {"type": "null"}]}],
]
