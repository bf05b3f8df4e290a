# SPDX-License-Identifier: Apache-2.0
"""What a cluster of H100s with an 8B model does in a day: routing and autoscaling compared, by measured step costs.

    python benchmarks/scale_model.py --cards 8,64,1000 --output benchmarks/results/scale

Steps cost what benchmarks/results/engine/h100_8b.json measured (AR, and ``auto`` with drafts accepted as measured),
prompts what its prefill did. A card is a fluid: all its sequences advance at the rate that its batch has, a prompt's
uncached part holds the card up, and beyond ``ROOM`` sequences the rest wait. Conversations of ten turns arrive by a
day's curve. Not in it: networks, faults, and evictions within a conversation's life.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from wedlm.deploy.routing import SPILL, choose, in_turn

RESULTS = Path(__file__).parent / "results"
ROOM = 128  # sequences that a card runs at once: the largest batch that was measured
TURNS, FIRST_PROMPT, TURN_PROMPT, ANSWER = 10, 600, 80, 200  # tokens
THINK_S = 20.0  # between an answer and the next turn, on average
CHOICES = 8  # cards that a request is offered among 1,000, by the hash: to ask all would cost more than it gains


@dataclass(frozen=True)
class Card:
    """Tokens a second of a batch, by interpolation of what was measured; and of prompts."""

    batches: tuple[int, ...]
    rates: tuple[float, ...]
    prefill: float

    def rate(self, batch: int) -> float:
        """Of all sequences together. Beyond the largest measured batch that one's."""
        if batch <= self.batches[0]:
            return self.rates[0]
        for (a, x), (b, y) in itertools.pairwise(zip(self.batches, self.rates, strict=True)):
            if batch <= b:
                return x + (y - x) * (batch - a) / (b - a)
        return self.rates[-1]


def measured(mode: str) -> Card:
    """ "autoregressive", or "auto" with drafts accepted at the embedded checkpoint's rates."""
    parts = json.loads((RESULTS / "engine" / "h100_8b.json").read_text())["parts"]
    rows = parts["steps"] if mode == "autoregressive" else parts["accept"]
    chosen = [
        one
        for one in rows
        if one["mode"] == mode and one.get("accepted", rows[0].get("accepted")) == rows[0].get("accepted")
    ]
    prefill = min(one["tok_per_s"] for one in parts["prefill"])
    return Card(tuple(one["batch"] for one in chosen), tuple(one["tok_per_s"] for one in chosen), prefill)


@dataclass
class Replica:
    """One card at work: who runs and who waits, each with the tokens to go."""

    name: str
    card: Card
    ready_s: float = 0.0
    now_s: float = 0.0
    busy_until_s: float = 0.0
    running: dict[int, float] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)  # of conversations, how many tokens it has keys of
    version: int = 0  # of what was foreseen of it

    @property
    def num_open(self) -> int:
        return len(self.running) + len(self.waiting)

    def advance(self, now_s: float) -> None:
        """All that runs gets its share of the time since the last call, less what prompts took."""
        begin = max(self.now_s, min(self.busy_until_s, now_s))
        if self.running and now_s > begin:
            share = (now_s - begin) * self.card.rate(len(self.running)) / len(self.running)
            for one in self.running:
                self.running[one] -= share
        self.now_s = now_s

    def next_end_s(self) -> float:
        """When the first of those that run ends, if nothing changes."""
        if not self.running:
            return math.inf
        left = max(0.0, min(self.running.values()))
        start = max(self.now_s, self.busy_until_s)
        return start + left * len(self.running) / self.card.rate(len(self.running))


@dataclass(frozen=True)
class Day:
    """Arrivals: conversations a second at the peak, and how long the simulated part of the day is, compressed."""

    peak_per_s: float
    length_s: float
    seed: int = 0

    def starts(self) -> list[float]:
        """Times at which conversations begin: a curve with its peak in the middle and a quarter of it at night."""
        rng, now, found = random.Random(self.seed), 0.0, []
        while True:
            now += rng.expovariate(self.peak_per_s)
            if now >= self.length_s:
                return found
            if rng.random() < 0.25 + 0.75 * math.sin(math.pi * now / self.length_s) ** 2:
                found.append(now)


Policy = Callable[[str, dict[str, int], int], str]


def by_prefix(spill: int) -> Policy:
    """Ours, over the cards that the hash puts first."""
    return lambda key, num_open, _: choose(key, num_open, spill)[0]


def round_robin(key: str, num_open: dict[str, int], count: int) -> str:
    return in_turn(list(num_open), count)[0]


def least_busy(key: str, num_open: dict[str, int], _: int) -> str:
    return choose("", num_open)[0]


@dataclass
class Outcome:
    """Of a policy: shares and seconds over all turns."""

    policy: str
    cards: int
    turns: int
    hit_rate: float
    first_token_median_s: float
    first_token_p99_s: float
    tok_per_s_of_a_stream: float
    card_hours: float


class Cluster:
    """One day of cards under a policy. The clock jumps from event to event: turns that arrive, sequences that end,
    cards that come or go."""

    def __init__(self, policy: Policy, card: Card, cards: int, day: Day, scale: "Autoscaler | None" = None) -> None:
        self._policy, self._card, self._scale, self._day = policy, card, scale, day
        self._rng = random.Random(day.seed + 1)
        self._made = itertools.count()
        self._replicas: dict[str, Replica] = {}
        self._add(cards if scale is None else scale.least)
        self._events: list[tuple[float, int, str, tuple[int, int] | tuple[str, int] | None]] = []
        self._order, self._ids = itertools.count(), itertools.count()
        self._turns: dict[int, tuple[int, int, float]] = {}  # conversation, which turn, when it was asked
        self._began: dict[int, float] = {}
        self._near: dict[int, list[str]] = {}
        self.first: list[float] = []
        self.rates: list[float] = []
        self.cached = self.prompts = 0
        self.card_s = 0.0

    def run(self) -> None:
        """Until the last answer."""
        for number, start in enumerate(self._day.starts()):
            self._push(start, "turn", (number, 0))
        if self._scale is not None:
            self._push(self._scale.period_s, "scale", None)
        last = 0.0
        while self._events:
            now, _, what, about = heapq.heappop(self._events)
            self.card_s += (now - last) * len(self._replicas)
            last = now
            getattr(self, f"_on_{what}")(now, about)

    def _push(self, when: float, what: str, about: tuple[int, int] | tuple[str, int] | None) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, about))

    def _add(self, count: int, now: float = 0.0, start_s: float = 0.0) -> None:
        for _ in range(count):
            name = f"card {next(self._made)}"
            self._replicas[name] = Replica(name, self._card, ready_s=now + start_s, now_s=now)

    def _on_turn(self, now: float, about: tuple[int, int]) -> None:
        conversation, turn = about
        there = {name: one.num_open for name, one in self._replicas.items() if one.ready_s <= now}
        if len(there) > CHOICES and self._policy is least_busy:
            there = {name: there[name] for name in self._rng.sample(sorted(there), CHOICES)}
        elif len(there) > CHOICES and self._policy is not round_robin:
            there = {name: there[name] for name in self._near_to(conversation, there)}
        number = next(self._ids)
        one = self._replicas[self._policy(f"conversation {conversation}", there, number)]
        self._turns[number] = conversation, turn, now
        one.advance(now)
        one.waiting.append(number)
        self._fill(one, now)

    def _on_end(self, now: float, about: tuple[str, int]) -> None:
        one = self._replicas.get(about[0])
        if one is None or one.version != about[1]:
            return  # something has changed since that was foreseen
        one.advance(now)
        for number in [number for number, left in one.running.items() if left <= 1e-6]:
            del one.running[number]
            conversation, turn, _ = self._turns.pop(number)
            self.rates.append(ANSWER / max(1e-9, now - self._began.pop(number)))
            if turn + 1 < TURNS:
                self._push(now + self._rng.expovariate(1 / THINK_S), "turn", (conversation, turn + 1))
        self._fill(one, now)

    def _on_scale(self, now: float, _: None) -> None:
        scale, count = self._scale, len(self._replicas)
        assert scale is not None
        wanted = scale.wanted(sum(one.num_open for one in self._replicas.values()), count, now)
        self._add(wanted - count, now, scale.start_s)
        idle = [name for name, one in self._replicas.items() if not one.num_open]
        for name in idle[: max(0, count - wanted)]:
            del self._replicas[name]
        if now < self._day.length_s:
            self._push(now + scale.period_s, "scale", None)

    def _fill(self, one: Replica, now: float) -> None:
        """Begin what waits, if there is room, and foresee the next end."""
        while one.waiting and len(one.running) < ROOM:
            self._begin(one, one.waiting.pop(0), now)
        one.version += 1
        if one.running:
            self._push(one.next_end_s(), "end", (one.name, one.version))

    def _begin(self, one: Replica, number: int, now: float) -> None:
        conversation, turn, asked = self._turns[number]
        prompt = FIRST_PROMPT + turn * (TURN_PROMPT + ANSWER)
        known = one.known.get(conversation, 0)
        one.known[conversation] = prompt + ANSWER
        one.busy_until_s = max(now, one.busy_until_s) + (prompt - known) / one.card.prefill
        one.running[number] = ANSWER
        self._began[number] = one.busy_until_s
        self.first.append(one.busy_until_s - asked)
        self.cached, self.prompts = self.cached + known, self.prompts + prompt

    def _near_to(self, conversation: int, there: dict[str, int]) -> list[str]:
        """The cards that a hash puts first for a conversation, cheaper than ``routing.ranked``'s."""
        near = self._near.get(conversation, [])
        if not near or self._scale is not None or any(name not in there for name in near):
            near = heapq.nlargest(CHOICES, there, key=lambda name: zlib.crc32(f"{conversation} {name}".encode()))
            self._near[conversation] = near
        return near


def outcome_of(name: str, cards: int, cluster: Cluster) -> Outcome:
    """What came of a day."""
    first = sorted(cluster.first)
    return Outcome(
        policy=name,
        cards=cards,
        turns=len(first),
        hit_rate=round(cluster.cached / cluster.prompts, 3),
        first_token_median_s=round(statistics.median(first), 4),
        first_token_p99_s=round(first[int(0.99 * len(first))], 3),
        tok_per_s_of_a_stream=round(statistics.median(cluster.rates), 1),
        card_hours=round(cluster.card_s / 3600, 2),
    )


@dataclass
class Autoscaler:
    """``target`` open requests a card, up at once, down after the wish has lasted."""

    least: int
    most: int
    target: float
    start_s: float = 90.0
    period_s: float = 10.0
    down_after_s: float = 600.0
    _low_since: float | None = None

    def wanted(self, num_open: int, count: int, now: float) -> int:
        wish = min(self.most, max(self.least, math.ceil(num_open / self.target)))
        if wish >= count:
            self._low_since = None
            return wish
        if self._low_since is None:
            self._low_since = now
        return wish if now - self._low_since >= self.down_after_s else count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", default="8,64", help="how many, with commas")
    parser.add_argument("--modes", default="autoregressive,auto")
    parser.add_argument("--seconds", type=float, default=3600.0, help="a day compressed to this")
    parser.add_argument("--load", type=float, default=0.6, help="of what the cards can do, at the peak")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    outcomes = []
    for mode in given.modes.split(","):
        card = measured(mode)
        for cards in map(int, given.cards.split(",")):
            turn_s = ANSWER / card.rates[-1] + (FIRST_PROMPT / TURNS + TURN_PROMPT) / card.prefill
            day = Day(given.load * cards / turn_s / TURNS, given.seconds)
            policies: list[tuple[str, Policy, Autoscaler | None]] = [
                ("round robin", round_robin, None),
                ("least busy", least_busy, None),
                *((f"prefix, spill {spill}", by_prefix(spill), None) for spill in (0, 8, SPILL, 1000)),
            ]
            for target in (16, 32, 64):
                scale = Autoscaler(max(1, cards // 8), cards, target)
                policies.append((f"prefix, spill {SPILL}, autoscaled to {target}", by_prefix(SPILL), scale))
            for name, policy, scale in policies:
                cluster = Cluster(policy, card, cards, day, scale)
                cluster.run()
                outcome = {"mode": mode, **asdict(outcome_of(name, cards, cluster))}
                outcomes.append(outcome)
                print(json.dumps(outcome), flush=True)
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        record = {"load": given.load, "seconds": given.seconds, "outcomes": outcomes}
        (given.output / "model.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
