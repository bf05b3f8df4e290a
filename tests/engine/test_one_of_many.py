# SPDX-License-Identifier: Apache-2.0
"""``oneOf`` with many alternatives, told apart at once: as comparing them two by two would, in less time, and within a
budget."""

import itertools
import json
import random
import time

import jsonschema
import pytest

from tests.attack.schemas import nested_references
from tests.engine.alternatives import EXCLUSIVE, OVERLAPPING
from wedlm.engine.constraints import one_of
from wedlm.engine.constraints.one_of import check_one_of, exclude

TAGS = [
    {"type": kind, "properties": {"k": value, "n": {"enum": [number, number + 1]}}, "required": required}
    for kind in ("object", ["object", "null"])
    for value in ({"const": 1}, {"enum": ["a", "b"]}, {"const": "b"}, {"type": "string"}, {"const": {"x": [1.0]}})
    for number in (0, 5)
    for required in (["k"], ["n"], ["k", "n"])
]
OTHERS = [
    {"const": {"k": 1, "n": 0}},
    {"const": [1]},
    {"const": [1.0]},
    {"enum": [None, 3]},
    {"type": "object"},
    {"allOf": [{"type": "object", "required": ["k"]}, {"properties": {"k": {"const": 1}}}]},
    {"anyOf": [{"type": "string"}, {"const": 3}]},
]
POOL = [*TAGS, *OTHERS, *(one for few in EXCLUSIVE + OVERLAPPING for one in few)]
VALUES = [None, 3, "x", [], [1], 1, True, {}, {"k": "b"}, {"k": {"x": [1]}}] + [
    {"k": k, "n": n} for k in (1, "a", "b", "c", {"x": [1]}) for n in (0, 1, 5, 6)
]


def accepts(alternatives: list) -> bool:
    try:
        check_one_of({"oneOf": alternatives})
    except ValueError:
        return False
    return True


def test_as_comparing_two_by_two():
    """What that finds exclusive is so here, too; and no instance is ever valid under two accepted alternatives."""
    rng = random.Random(0)
    pool = [one for one in POOL if "$ref" not in json.dumps(one)]
    valid = [{i for i, v in enumerate(VALUES) if jsonschema.Draft202012Validator(one).is_valid(v)} for one in pool]
    accepted = 0
    for _ in range(3000):
        chosen = [rng.randrange(len(pool)) for _ in range(rng.randint(2, 4))]
        pairwise = all(exclude(pool[i], pool[j], {}) for i, j in itertools.combinations(chosen, 2))
        at_once = accepts([pool[i] for i in chosen])
        accepted += at_once
        assert at_once >= pairwise, [pool[i] for i in chosen]
        if at_once:
            assert all(not valid[i] & valid[j] for i, j in itertools.combinations(chosen, 2)), [pool[i] for i in chosen]
    assert 300 < accepted < 2700


def test_values_that_json_calls_equal():
    assert not accepts([{"const": [1]}, {"const": [1.0]}])
    assert not accepts([{"const": {"a": 2, "b": 1}}, {"enum": [{"b": 1.0, "a": 2}]}])
    assert accepts([{"const": [1]}, {"const": [True]}])


def tagged(count: int, name: str = "kind") -> list:
    return [
        {"type": "object", "properties": {name: {"const": f"k{i}"}, "v": {}}, "required": ["v", name]}
        for i in range(count)
    ]


@pytest.mark.parametrize(
    "alternatives",
    [
        [{"const": i} for i in range(4000)],
        [{"enum": [i, str(i), [i]]} for i in range(2000)],
        [*tagged(1000), {"type": "null"}, {"enum": ["a", 2]}],
        [*tagged(900), {"type": "string"}, {"type": "array"}],
    ],
    ids=["constants", "enums", "tagged", "mixed"],
)
def test_many_take_time_in_proportion(alternatives):
    """Steps are counted, which no other work on this machine changes."""
    steps = []
    for part in (len(alternatives) // 4, len(alternatives)):
        proof = one_of._Proof({})
        assert list(proof.doubtful(alternatives[-part:])) == []
        steps.append(proof._steps)
    assert steps[1] < 6 * steps[0]
    assert steps[1] < one_of._MAX_STEPS / 4
    assert not accepts([*alternatives, alternatives[0]])


def test_the_budget_ends_the_proof():
    """Each pair takes a look into its choices, and there are 400,000 pairs."""
    alternatives = [{"anyOf": [{"const": i}, {"const": [i]}]} for i in range(900)]
    started = time.thread_time()
    with pytest.raises(ValueError, match="oneOf takes too long to prove"):
        check_one_of({"oneOf": alternatives})
    assert time.thread_time() - started < 5
    assert accepts(alternatives[:100])


@pytest.mark.parametrize("count", [2, 4, 6, 12])
def test_references_within_references(count):
    """As text, so that no two parts are one object in memory."""
    schema = json.loads(json.dumps(nested_references(count)["json_schema"]))
    started = time.thread_time()
    with pytest.raises(ValueError, match="oneOf has alternatives that may both hold"):
        check_one_of(schema)
    assert time.thread_time() - started < 0.5
