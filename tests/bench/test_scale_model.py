# SPDX-License-Identifier: Apache-2.0
"""The simulator of a cluster's day, against one that looks at every card and every sequence for each event."""

import heapq
import itertools
import math
import random
import zlib

import numpy as np
import pytest

from benchmarks import scale_model
from benchmarks.scale_model import Autoscaler, Card, Cluster, Day, by_prefix, least_busy, outcome_of, round_robin
from wedlm.deploy.routing import choose, in_turn
from wedlm.deploy.scaling import LookAhead

ROOM, CHOICES, TURNS = 3, 4, 4
CARD = Card((1, 2, 4), (100.0, 180.0, 300.0), 5000.0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """So little room and so few choices that cards fill and the hash decides."""
    for name, value in {"ROOM": ROOM, "CHOICES": CHOICES, "TURNS": TURNS, "THINK_S": 3.0}.items():
        monkeypatch.setattr(scale_model, name, value)


class SlowCard:
    def __init__(self, ready):
        self.ready, self.now, self.busy_until = ready, ready, 0.0
        self.running, self.waiting, self.known = {}, [], {}

    def num_open(self):
        return len(self.running) + len(self.waiting)

    def advance(self, now):
        begin = max(self.now, min(self.busy_until, now))
        for one in self.running:
            self.running[one] -= (now - begin) * CARD.rate(len(self.running)) / len(self.running)
        self.now = max(self.now, now)

    def next_end(self):
        if not self.running:
            return math.inf
        left = max(0.0, min(self.running.values()))
        return max(self.now, self.busy_until) + left * len(self.running) / CARD.rate(len(self.running))


def slow_day(policy, spill, cards, day, scale):
    """First tokens' and streams' seconds, and cached tokens: the routing's own functions over all cards."""
    rng, made, ids = random.Random(day.seed + 1), itertools.count(), itertools.count()
    there = {f"card {next(made)}": SlowCard(0.0) for _ in range(cards if scale is None else scale.least)}
    arrivals = [(start, number, 0) for number, start in enumerate(day.starts())]
    heapq.heapify(arrivals)
    scaling = math.inf if scale is None else scale.period_s
    asked, began, first, streams, cached = {}, {}, [], [], 0
    while True:
        name, end = min(((name, one.next_end()) for name, one in there.items()), key=lambda pair: pair[1])
        arrival = arrivals[0][0] if arrivals else math.inf
        now = min(end, arrival, scaling)
        if now == math.inf:
            return first, streams, cached
        if now == scaling:
            wanted = scale.wanted(sum(one.num_open() for one in there.values()), len(there), now)
            idle = [name for name, one in there.items() if not one.num_open()][: max(0, len(there) - wanted)]
            there |= {f"card {next(made)}": SlowCard(now + scale.start_s) for _ in range(wanted - len(there))}
            for name in idle:
                del there[name]
            scaling = now + scale.period_s if now < day.length_s else math.inf
            continue
        if now == arrival:
            _, conversation, turn = heapq.heappop(arrivals)
            number = next(ids)
            loads = {name: one.num_open() for name, one in there.items() if one.ready <= now}
            if policy == "round robin":
                name = in_turn(list(loads), number)[0]
            elif policy == "least busy":
                names = rng.sample(sorted(loads), CHOICES) if len(loads) > CHOICES else list(loads)
                name = choose("", {name: loads[name] for name in names})[0]
            else:
                near = sorted(loads, key=lambda name: zlib.crc32(f"{conversation} {name}".encode()))[-CHOICES:]
                name = choose(f"conversation {conversation}", {name: loads[name] for name in near}, spill)[0]
            asked[number] = conversation, turn, now
            there[name].advance(now)
            there[name].waiting.append(number)
        one = there[name]
        one.advance(now)
        for number in [number for number, left in one.running.items() if left <= 1e-6]:
            del one.running[number]
            streams.append(now - began[number])
            conversation, turn, _ = asked[number]
            if turn + 1 < TURNS:
                heapq.heappush(arrivals, (now + rng.expovariate(1 / scale_model.THINK_S), conversation, turn + 1))
        while one.waiting and len(one.running) < ROOM:
            number = one.waiting.pop(0)
            conversation, turn, since = asked[number]
            prompt = scale_model.FIRST_PROMPT + turn * (scale_model.TURN_PROMPT + scale_model.ANSWER)
            known = one.known.get(conversation, 0)
            one.known[conversation] = prompt + scale_model.ANSWER
            one.busy_until = began[number] = max(now, one.busy_until) + (prompt - known) / CARD.prefill
            one.running[number] = float(scale_model.ANSWER)
            first.append(began[number] - since)
            cached += known


class Watched(Cluster):
    """Counts what is answered, and looks at what every card has open."""

    def __init__(self, *args):
        super().__init__(*args)
        self.begun, self.most = [], 0

    def _begin(self, one, conversation, turn, *when):
        super()._begin(one, conversation, turn, *when)
        self.begun.append((conversation.number, turn))
        self.most = max(self.most, len(one.running))
        assert one.num_open == len(one.running) + len(one.waiting)
        assert one.ready_s <= when[-1]


POLICIES = {"round robin": round_robin, "least busy": least_busy, "prefix": by_prefix}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("autoscaled", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_fast_simulator_computes_what_the_slow_one_does(policy, autoscaled, seed):
    rng = random.Random(seed)
    cards, spill = rng.choice((2, 7, 12)), rng.choice((0, 1, 3))
    day = Day(cards * rng.choice((0.1, 0.25)), 120.0, seed)
    ahead = rng.choice((0.0, 30.0))
    scales = [
        Autoscaler(2, cards, LookAhead(2.0, ahead), 7.0, 5.0, 12.0, 5.0, down_after_s=15.0) if autoscaled else None
        for _ in "ab"
    ]
    fast = Watched(by_prefix(spill) if policy == "prefix" else POLICIES[policy], CARD, cards, day, scales[0])
    fast.run()
    first, streams, cached = slow_day(policy, spill, cards, day, scales[1])
    np.testing.assert_allclose(fast.first, first, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fast.rates, scale_model.ANSWER / np.array(streams), rtol=1e-6)
    assert fast.cached == cached

    conversations = len(day.starts())
    assert sorted(fast.begun) == [(number, turn) for number in range(conversations) for turn in range(TURNS)]
    assert len(fast.rates) == conversations * TURNS
    assert 0 < fast.most <= ROOM
    assert all(one.num_open == 0 and not one.waiting for one in fast.ready)
    outcome = outcome_of(policy, cards, fast)
    assert outcome.turns == conversations * TURNS
    assert 0 <= outcome.hit_rate <= 1
    assert outcome.mean_cards <= cards if autoscaled else outcome.mean_cards == cards
    assert min(fast.first) >= 0
