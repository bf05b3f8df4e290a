# SPDX-License-Identifier: Apache-2.0
"""Where requests go, without Ray; and the page of metrics of several replicas."""

import json
import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from wedlm.deploy.metrics import per_replica
from wedlm.deploy.routing import choose, conversation_key, in_turn, ranked

REPLICAS = [f"r{i}" for i in range(8)]


def key(**body):
    return conversation_key(json.dumps(body).encode())


def user(text):
    return {"role": "user", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.mark.parametrize(
    ("first", "later"),
    [
        ({"messages": [SYSTEM, user("a")]}, {"messages": [SYSTEM, user("a"), ANSWER, user("b")], "stream": True}),
        ({"system": "Be kind.", "messages": [user("a")]}, {"system": "Be kind.", "messages": [user("a"), ANSWER]}),
        ({"input": [user("a")]}, {"input": [user("a"), ANSWER, user("b")], "temperature": 0.5}),
        ({"prompt": "x" * 256}, {"prompt": "x" * 256 + "and more"}),
        ({"prompt": list(range(64))}, {"prompt": list(range(100))}),
        ({"prompt": ["a" * 256, "b"]}, {"prompt": ["a" * 256 + "c"]}),
    ],
)
def test_turns_of_a_conversation_have_one_key(first, later):
    assert key(**first) == key(**later) != ""


def test_conversations_differ():
    bodies = [
        {"messages": [SYSTEM, user("a")]},
        {"messages": [SYSTEM, user("b")]},
        {"messages": [user("a")]},
        {"messages": [user("a")], "model": "sql"},
        {"messages": [user("a")], "tools": [{"type": "function"}]},
        {"prompt": "a"},
        {"prompt": [1, 2]},
    ]
    assert len({key(**body) for body in bodies}) == len(bodies)


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"{", b"[" * 100_000, b"{}", b'{"messages": []}', b'{"prompt": 5}', b"\xff"]
)
def test_what_has_no_conversation(body):
    assert conversation_key(body) == ""


def test_only_conversations_of_a_replica_that_goes_move():
    keys = [f"conversation {i}" for i in range(2000)]
    before = {one: ranked(one, REPLICAS)[0] for one in keys}
    shares = [list(before.values()).count(name) for name in REPLICAS]
    assert min(shares) > 0.7 * len(keys) / len(REPLICAS), shares
    after = {one: ranked(one, REPLICAS[1:])[0] for one in keys}
    assert {one for one in keys if before[one] != after[one]} == {one for one in keys if before[one] == REPLICAS[0]}


def test_a_busy_replica_is_left_and_found_again():
    key, load = "c", dict.fromkeys(REPLICAS, 3)
    first, second = ranked(key, REPLICAS)[:2]
    assert choose(key, load | {first: 11}, spill=8)[0] == first
    assert choose(key, load | {first: 12}, spill=8)[:1] == [second]
    assert choose(key, load | {first: 12}, spill=8)[-1] == first
    assert choose("", load | {"r5": 0})[0] == "r5"
    assert choose(key, {}) == []


def test_loads_stay_near_each_other():
    """However the conversations are spread: none has more than the spill above the least busy one."""
    rng, load = random.Random(1), dict.fromkeys(REPLICAS, 0)
    running = []
    for _ in range(5000):
        if len(running) > 100:
            load[running.pop(rng.randrange(len(running)))] -= 1
        name = choose(f"conversation {int(rng.expovariate(0.5))}", load, spill=4)[0]
        before = min(load.values())
        load[name] += 1
        running.append(name)
        assert load[name] <= before + 5


def test_round_robin():
    assert [in_turn("abc", i)[0] for i in range(7)] == list("abcabca")
    assert in_turn([], 3) == []


def test_metrics_of_replicas():
    page = "# HELP a_total As\n# TYPE a_total counter\na_total 1.0\n# HELP h H\n# TYPE h histogram\n"
    page += 'h_bucket{model_name="m",le="+Inf"} 2.0\nh_count{model_name="m"} 2.0\nh_sum{model_name="m"} 3.5\n'
    merged = per_replica({"x": page, "y": page.replace("1.0", "7.0")})
    families = list(text_string_to_metric_families(merged))
    samples = [sample for family in families for sample in family.samples]
    assert [(one.labels["replica"], one.value) for one in samples if one.name == "a_total"] == [("x", 1), ("y", 7)]
    buckets = [one.labels for one in samples if one.name == "h_bucket"]
    assert buckets == [{"replica": name, "model_name": "m", "le": "+Inf"} for name in "xy"]
    assert merged.count("# TYPE") == 2
