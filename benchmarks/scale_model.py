# SPDX-License-Identifier: Apache-2.0
"""What a cluster of H100s with an 8B model does in a day: routing and autoscaling compared, by measured step costs.

    python benchmarks/scale_model.py --cards 8,64 --seconds 300 --output benchmarks/results/scale
    python benchmarks/scale_model.py --cards 1000 --seconds 120 --modes auto --policies "round robin" "prefix, spill 32"

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
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path

import numpy as np

from wedlm.deploy.routing import SPILL, ranked
from wedlm.deploy.scaling import DOWN_AFTER_S, LOOK_BACK_S, LookAhead

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


@dataclass(slots=True, eq=False)
class Conversation:
    """One that goes on: what each card has of it, and the cards that a hash puts first for it."""

    number: int
    known: dict[str, int] = field(default_factory=dict)  # of cards by name, how many tokens each has keys of
    near: list["Replica"] = field(default_factory=list)  # in the order in which routing.ranked names them
    near_of: int = -1  # the set of cards, by its version, that they were taken from


@dataclass(slots=True, eq=False)
class Replica:
    """One card at work. All its sequences advance alike and have as far to go, so that they end in the order in which
    they began: ``served``, the tokens that one has got that ran since the card was there, says what all have got."""

    name: str
    shares: list[float]  # tokens a second of each sequence, by the number of sequences
    ready_s: float = 0.0
    now_s: float = 0.0
    busy_until_s: float = 0.0
    served: float = 0.0
    running: deque[tuple[float, Conversation, int, float]] = field(default_factory=deque)  # ``served`` at its end, its
    # conversation, which turn, when it began
    waiting: deque[tuple[Conversation, int, float]] = field(default_factory=deque)  # ..., when it was asked
    num_open: int = 0  # that run or wait
    foreseen_s: float = math.inf  # when it will be looked at: never later than the first of its sequences ends
    version: int = 0  # of what was foreseen of it

    def advance(self, now_s: float) -> None:
        """All that runs gets its share of the time since the last call, less what prompts took."""
        begin = max(self.now_s, min(self.busy_until_s, now_s))
        if self.running and now_s > begin:
            self.served += (now_s - begin) * self.shares[len(self.running)]
        self.now_s = now_s

    def next_end_s(self) -> float:
        """When the first of those that run ends, if nothing changes."""
        if not self.running:
            return math.inf
        left = max(0.0, self.running[0][0] - self.served)
        return max(self.now_s, self.busy_until_s) + left / self.shares[len(self.running)]


@dataclass(frozen=True)
class Day:
    """Arrivals: conversations a second at the peak, and how long the simulated part of the day is, compressed."""

    peak_per_s: float
    length_s: float
    seed: int = 0

    def starts(self) -> list[float]:
        """Times at which conversations begin: a curve with its peak in the middle and a quarter of it at night."""
        rng, now = random.Random(self.seed), 0.0
        found: list[float] = []
        while True:
            now += rng.expovariate(self.peak_per_s)
            if now >= self.length_s:
                return found
            if rng.random() < 0.25 + 0.75 * math.sin(math.pi * now / self.length_s) ** 2:
                found.append(now)


Policy = Callable[["Cluster", Conversation, int], Replica]


def by_prefix(spill: int) -> Policy:
    """Ours, ``routing.choose``, over the cards that the hash puts first."""

    def policy(cluster: "Cluster", conversation: Conversation, _: int) -> Replica:
        near = cluster.near_to(conversation)
        most = min([one.num_open for one in near]) + spill
        return next(one for one in near if one.num_open <= most)

    return policy


def round_robin(cluster: "Cluster", _: Conversation, number: int) -> Replica:
    """``routing.in_turn``."""
    return cluster.ready[number % len(cluster.ready)]


def least_busy(cluster: "Cluster", _: Conversation, __: int) -> Replica:
    """``routing.choose`` without a key, over some cards by chance."""
    return min(cluster.some(), key=attrgetter("num_open"))


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
    mean_cards: float  # until the day ends, those that load among them


class Cluster:
    """One day of cards under a policy. The clock jumps from event to event: turns that arrive, sequences that end,
    cards that come or go. What an event costs does not depend on how many cards there are, save those that change
    the set of them."""

    def __init__(self, policy: Policy, card: Card, cards: int, day: Day, scale: "Autoscaler | None" = None) -> None:
        self._policy, self._scale, self._day = policy, scale, day
        self._shares = [0.0, *(card.rate(batch) / batch for batch in range(1, ROOM + 1))]
        self._prefill = card.prefill
        self._rng = random.Random(day.seed + 1)
        self._made, self._versions = itertools.count(), itertools.count()
        self.ready: list[Replica] = []  # in the order in which they were made
        self._loading: deque[Replica] = deque()
        self._add(cards if scale is None else scale.least)
        # When, its number among all that was foreseen, what it is about, and which turn or version of that
        self._events: list[tuple[float, int, Conversation | Replica | None, int]] = []
        self._order, self._ids = itertools.count(), itertools.count()
        self.first, self.rates = array("d"), array("d")
        self.cached = self.prompts = 0
        self.counts: list[int] = []  # of cards, each time that the autoscaler looked

    def run(self) -> None:
        """Until the last answer."""
        starts = enumerate(self._day.starts())
        self._start_next(starts)
        if self._scale is not None:
            self._push(self._scale.period_s, None, 0)
        while self._events:
            now, _, about, which = heapq.heappop(self._events)
            if isinstance(about, Replica):
                if about.version == which:  # else something has changed since that was foreseen
                    self._look_at(about, now)
            elif about is not None:
                if which == 0:
                    self._start_next(starts)
                self._on_turn(about, which, now)
            else:
                self._on_scale(now)

    def _start_next(self, starts: Iterator[tuple[int, float]]) -> None:
        """Foresee the conversation that begins next."""
        for number, start in starts:
            self._push(start, Conversation(number), 0)
            return

    def _push(self, when: float, about: Conversation | Replica | None, which: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), about, which))

    def _add(self, count: int, now: float = 0.0, start_s: float = 0.0) -> None:
        for _ in range(count):
            self._loading.append(Replica(f"card {next(self._made)}", self._shares, ready_s=now + start_s, now_s=now))
        self._take_ready(now)

    def _take_ready(self, now: float) -> None:
        """Cards that have loaded take part. They do in the order in which they were made."""
        if self._loading and self._loading[0].ready_s <= now:
            while self._loading and self._loading[0].ready_s <= now:
                self.ready.append(self._loading.popleft())
            self._set_changed()

    def _on_turn(self, conversation: Conversation, turn: int, now: float) -> None:
        self._take_ready(now)
        one = self._policy(self, conversation, next(self._ids))
        one.advance(now)
        one.num_open += 1
        one.waiting.append((conversation, turn, now))
        self._fill(one, now)

    def _look_at(self, one: Replica, now: float) -> None:
        """End what has ended. What came since that was foreseen may have put it off."""
        one.foreseen_s = math.inf
        if one.next_end_s() <= now:
            one.advance(now)
            while one.running and one.running[0][0] - one.served <= 1e-6:
                _, conversation, turn, began = one.running.popleft()
                one.num_open -= 1
                self.rates.append(ANSWER / max(1e-9, now - began))
                if turn + 1 < TURNS:
                    self._push(now + self._rng.expovariate(1 / THINK_S), conversation, turn + 1)
        self._fill(one, now)

    def _on_scale(self, now: float) -> None:
        scale, cards = self._scale, [*self.ready, *self._loading]
        assert scale is not None
        self.counts.append(len(cards))
        wanted = scale.wanted(sum(one.num_open for one in cards), len(cards), now)
        self._add(wanted - len(cards), now, scale.start_s)
        gone = {one.name for one in [one for one in cards if not one.num_open][: max(0, len(cards) - wanted)]}
        if gone:
            self.ready = [one for one in self.ready if one.name not in gone]
            self._loading = deque(one for one in self._loading if one.name not in gone)
            self._set_changed()
        if now < self._day.length_s:
            self._push(now + scale.period_s, None, 0)

    def _fill(self, one: Replica, now: float) -> None:
        """Begin what waits, if there is room, and foresee the next end, unless the card is looked at before."""
        while one.waiting and len(one.running) < ROOM:
            self._begin(one, *one.waiting.popleft(), now)
        end = one.next_end_s()
        if end < one.foreseen_s:
            one.version += 1
            one.foreseen_s = end
            self._push(end, one, one.version)

    def _begin(self, one: Replica, conversation: Conversation, turn: int, asked: float, now: float) -> None:
        prompt = FIRST_PROMPT + turn * (TURN_PROMPT + ANSWER)
        known = conversation.known.get(one.name, 0)
        conversation.known[one.name] = prompt + ANSWER
        one.busy_until_s = max(now, one.busy_until_s) + (prompt - known) / self._prefill
        one.running.append((one.served + ANSWER, conversation, turn, one.busy_until_s))
        self.first.append(one.busy_until_s - asked)
        self.cached, self.prompts = self.cached + known, self.prompts + prompt

    def _set_changed(self) -> None:
        """Prepare what ``some`` and ``near_to`` ask of the set of cards that are ready."""
        self._version = next(self._versions)
        self._by_name = sorted(self.ready, key=attrgetter("name"))
        names = [one.name.encode() for one in self.ready]
        self._zeros = [bytes(length) for length in sorted({len(name) for name in names})]
        self._length_of = np.array([[len(zeros) for zeros in self._zeros].index(len(name)) for name in names])
        # Low bits say which card it is, and of two with one hash they put the earlier one first.
        self._hashes = np.array([zlib.crc32(name) << 20 | 0xFFFFF - at for at, name in enumerate(names)], np.uint64)

    def some(self) -> list[Replica]:
        """``CHOICES`` cards by chance, or all if there are no more."""
        return self._rng.sample(self._by_name, CHOICES) if len(self.ready) > CHOICES else self.ready

    def near_to(self, conversation: Conversation) -> list[Replica]:
        """The ``CHOICES`` cards whose names have the highest CRC behind the conversation's number, by ``ranked``.

        To ask ``ranked`` of all would cost too much. A CRC of two strings is that of the second, changed in bits that
        depend on the first one's CRC and the second one's length alone: so one XOR gives those of all names.
        """
        if conversation.near_of != self._version:
            near = self.ready
            if len(near) > CHOICES:
                begun = zlib.crc32(f"{conversation.number} ".encode())
                changed = [(zlib.crc32(zeros, begun) ^ zlib.crc32(zeros)) << 20 for zeros in self._zeros]
                hashes = self._hashes ^ np.array(changed, np.uint64)[self._length_of]
                hashes.partition(len(near) - CHOICES)
                near = [near[0xFFFFF - (one & 0xFFFFF)] for one in hashes[-CHOICES:].tolist()]
            if set(near) != set(conversation.near):
                by_name = {one.name: one for one in near}
                conversation.near = [by_name[name] for name in ranked(f"conversation {conversation.number}", by_name)]
            conversation.near_of = self._version
        return conversation.near


def outcome_of(name: str, cards: int, cluster: Cluster) -> Outcome:
    """What came of a day."""
    first = np.sort(cluster.first)
    return Outcome(
        policy=name,
        cards=cards,
        turns=len(first),
        hit_rate=round(cluster.cached / cluster.prompts, 3),
        first_token_median_s=round(float(np.median(first)), 4),
        first_token_p99_s=round(float(first[int(0.99 * len(first))]), 3),
        tok_per_s_of_a_stream=round(float(np.median(cluster.rates)), 1),
        mean_cards=round(statistics.mean(cluster.counts or [cards]), 1),
    )


@dataclass
class Autoscaler:
    """As many cards as ``rule`` wants, by the mean of what was open in ``look_back_s``: more once that has lasted
    ``up_after_s``, fewer once it has lasted ``down_after_s``."""

    least: int
    most: int
    rule: LookAhead  # which is one day's alone
    start_s: float = 90.0
    period_s: float = 10.0
    look_back_s: float = 0.0
    up_after_s: float = 0.0
    down_after_s: float = DOWN_AFTER_S
    _seen: deque[tuple[float, int]] = field(default_factory=deque)
    _since: tuple[int, float] | None = None  # the direction of the wish, and since when

    def wanted(self, num_open: int, count: int, now: float) -> int:
        self._seen.append((now, num_open))
        while now - self._seen[0][0] > self.look_back_s:
            self._seen.popleft()
        mean = statistics.fmean(one for _, one in self._seen)
        wish = min(self.most, max(self.least, math.ceil(self.rule.wanted(mean, now))))
        direction = (wish > count) - (wish < count)
        if self._since is None or self._since[0] != direction:
            self._since = direction, now
        patience = self.up_after_s if direction > 0 else self.down_after_s
        return wish if direction and now - self._since[1] >= patience else count


def scalings() -> list[tuple[str, LookAhead, dict[str, float]]]:
    """The autoscalers that are compared: name, rule, options of ``Autoscaler``. Serve's own, with its defaults; a
    target alone, without any delay, of which lower ones are headroom; and what ``wedlm deploy ray`` does."""
    return [
        ("to 32 as Ray does", LookAhead(32, 0.0), {"look_back_s": 30.0, "up_after_s": 30.0}),
        *((f"to {target}", LookAhead(target, 0.0), {}) for target in (16, 24, 32, 64)),
        *((f"to {target}, ahead", LookAhead(target), {"look_back_s": LOOK_BACK_S}) for target in (24, 32)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", default="8,64", help="how many, with commas")
    parser.add_argument("--modes", default="autoregressive,auto")
    parser.add_argument("--policies", nargs="+", metavar="NAME", help="these alone, by the names that are printed")
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
            for name, rule, options in scalings():
                scaling = Autoscaler(max(1, cards // 4), cards, rule, **options)  # what the night needs
                policies.append((f"prefix, spill {SPILL}, autoscaled {name}", by_prefix(SPILL), scaling))
            names = [name for name, _, _ in policies]
            for name in given.policies or ():
                if name not in names:
                    parser.error(f"--policies is {name!r}; expected some of {names}")
            for name, policy, scale in policies:
                if given.policies and name not in given.policies:
                    continue
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
