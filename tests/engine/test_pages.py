# SPDX-License-Identifier: Apache-2.0
"""The page pool: what may be shared, who is evicted, and that its own integrity check can fail."""

import copy
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from wedlm.engine.pages import PagePool


def run(pool: PagePool, name: str, tokens: list[int], ahead: int = 0) -> int:
    """Open, reserve ``ahead`` slots too many, and commit all tokens; returns slots reused."""
    reused = pool.allocate(name, tokens, len(tokens))
    assert pool.reserve(name, len(tokens) + ahead)
    pool.commit(name, tokens, len(tokens))
    pool.check_integrity()
    return reused


def state(pool: PagePool) -> dict:
    return copy.deepcopy(vars(pool))


def test_pages_reserved_ahead_for_a_window_are_never_found():
    """The original implementation's cache hands out pages that hold a window's scratch."""
    pool = PagePool(16, 4)
    tokens = list(range(20))
    pool.allocate("a", tokens, 10)
    assert pool.reserve("a", 10 + 8)
    pool.commit("a", tokens, 10)  # two full pages; the third holds two committed keys, the rest is scratch
    scratch = pool.table("a")[2:]
    assert pool.allocate("b", tokens, 20) == 8
    assert pool.reserve("b", 20)
    assert not set(pool.table("b")) & set(scratch)
    pool.check_integrity()
    pool.free("a")
    assert pool.allocate("c", tokens, 20) == 8  # no more after the first request has gone
    pool.check_integrity()
    pool.free("b")
    pool.free("c")
    assert pool.num_available == 16
    assert pool.allocate("d", tokens, 20) == 8


def test_a_page_filled_by_the_window_is_found_once_committed():
    pool = PagePool(16, 4)
    tokens = list(range(20))
    pool.allocate("a", tokens[:7], 7)
    pool.reserve("a", 20)
    for committed, found in [(7, 4), (8, 8), (9, 8), (11, 8), (17, 16)]:
        pool.commit("a", tokens[:committed], committed)
        assert pool.allocate("b", tokens, 20) == found
        pool.check_integrity()
        pool.free("b")


def test_limit_and_differing_tokens_bound_the_reuse():
    pool = PagePool(16, 4)
    run(pool, "a", list(range(12)))
    assert (
        pool.allocate("limit", list(range(12)), 11) == 8
    )  # the anchor of verified decoding must not come from the cache
    assert pool.allocate("tail", [*range(8), 99, 9, 10, 11], 12) == 8
    assert pool.allocate("head", [99, *range(1, 12)], 12) == 0  # equal pages after a different beginning are other keys
    assert pool.allocate("moved", list(range(4, 12)), 8) == 0
    pool.check_integrity()


def test_cache_salt_keeps_weights_apart():
    a, b, c = PagePool(4, 2, b"a"), PagePool(4, 2, b"b"), PagePool(4, 2, b"a")
    for pool in (a, b, c):
        run(pool, "x", [1, 2])
    assert set(a._page_of) == set(c._page_of) != set(b._page_of)


def test_least_recently_used_goes_first():
    pool = PagePool(3, 1)
    for token in (1, 2, 3):
        run(pool, "x", [token])
        pool.free("x")
    assert run(pool, "touch", [1]) == 1
    pool.free("touch")
    assert run(pool, "new", [4]) == 0  # evicts 2, the oldest
    pool.free("new")
    assert run(pool, "x", [3]) == 1
    assert run(pool, "y", [1]) == 1
    pool.free("x")
    pool.free("y")
    assert run(pool, "z", [2]) == 0


def test_free_pages_go_before_cached_ones():
    pool = PagePool(4, 2)
    run(pool, "a", [1, 2, 3, 4])
    pool.free("a")
    assert pool.num_available == 4
    run(pool, "b", [7, 8, 9])
    pool.free("b")
    assert run(pool, "a", [1, 2, 3, 4]) == 4


def test_a_prefix_outlives_what_follows_it():
    pool = PagePool(4, 2)
    tokens = list(range(8))
    run(pool, "a", tokens)
    pool.free("a")
    for evicted in (1, 2, 3):
        run(pool, f"n{evicted}", [100 + evicted, 0])
        assert pool.allocate("probe", tokens, 8) == 8 - 2 * evicted
        pool.free("probe")


def test_shared_pages_count_once_and_stay_for_the_last_holder():
    pool = PagePool(6, 2)
    tokens = [1, 2, 3, 4]
    for name in "abc":
        run(pool, name, tokens)
    assert pool.table("a") == pool.table("b") == pool.table("c")
    assert pool.num_available == 4
    pool.free("a")
    pool.free("c")
    assert pool.num_available == 4
    assert not pool.reserve("b", 13)
    assert pool.reserve("b", 12)
    assert len(set(pool.table("b"))) == 6
    pool.check_integrity()
    pool.free("b")
    assert pool.num_available == 6


def test_two_requests_that_compute_the_same_page_keep_their_own():
    pool = PagePool(4, 2)
    for name in "ab":
        assert pool.allocate(name, [1, 2], 2) == 0
        pool.reserve(name, 2)
    for name in "ab":
        pool.commit(name, [1, 2], 2)
    pool.check_integrity()
    assert pool.table("a") != pool.table("b")
    pool.free("a")
    assert pool.allocate("c", [1, 2], 2) == 2  # filed once, under the first
    pool.check_integrity()
    pool.free("b")
    pool.free("c")
    assert pool.num_available == 4


def test_a_reserve_that_fails_changes_nothing():
    pool = PagePool(4, 2)
    run(pool, "old", [1, 2])
    pool.free("old")
    run(pool, "a", [3, 4, 5])
    before = state(pool)
    assert not pool.reserve("a", 9)
    assert state(pool) == before
    assert pool.reserve("a", 8)


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 4), (4, 0), (-1, 1)])
def test_sizes_below_one_are_refused(num_pages, page_size):
    with pytest.raises(ValueError, match=f"num_pages is {num_pages} and page_size {page_size}; expected"):
        PagePool(num_pages, page_size)


def pool_with_everything() -> PagePool:
    """Free, idle, shared, filed and scratch pages all occur: "a" and "b" share two, "old" left one idle."""
    pool = PagePool(12, 2)
    run(pool, "old", [9, 9])
    pool.free("old")
    run(pool, "a", [1, 2, 3, 4, 5], ahead=3)
    run(pool, "b", [1, 2, 3, 4, 6])
    assert pool._free
    assert pool._idle
    return pool


CORRUPTIONS: dict[str, Callable[[PagePool], object]] = {
    "lost free page": lambda p: p._free.pop(),
    "free page twice": lambda p: p._free.append(p._free[0]),
    "held page is free": lambda p: p._free.append(p.table("a")[0]),
    "held page is idle": lambda p: p._idle.__setitem__(p.table("a")[0], None),
    "lost idle page": lambda p: p._idle.popitem(),
    "holder too many": lambda p: p._holders.__setitem__(p.table("a")[0], 3),
    "holder too few": lambda p: p._holders.__setitem__(p.table("a")[0], 1),
    "free page has a holder": lambda p: p._holders.__setitem__(p._free[0], 1),
    "scratch page shared": lambda p: p.table("b").append(p.table("a")[-1]),
    "scratch page shared and counted": lambda p: (
        p.table("b").append(p.table("a")[-1]),
        p._holders.__setitem__(p.table("a")[-1], 2),
    ),
    "page twice in a table": lambda p: p.table("a").append(p.table("a")[0]),
    "page dropped from a table": lambda p: p.table("a").pop(),
    "table dropped": lambda p: p._tables.pop("b"),
    "scratch page filed": lambda p: (
        p._page_of.__setitem__(b"x", p.table("a")[-1]),
        p._digest_of.__setitem__(p.table("a")[-1], b"x"),
    ),
    "count of cached pages too small": lambda p: p._num_cached_pages.__setitem__("a", 1),
    "free page filed": lambda p: (
        p._page_of.__setitem__(b"x", p._free[0]),
        p._digest_of.__setitem__(p._free[0], b"x"),
    ),
    "idle page not filed": lambda p: p._page_of.pop(p._digest_of.pop(next(iter(p._idle)))),
    "digest without page": lambda p: p._page_of.__setitem__(b"x", 0),
    "page without digest": lambda p: p._page_of.popitem(),
    "two digests of one page": lambda p: p._page_of.__setitem__(next(iter(p._page_of)), 11),
    "two pages of one digest": lambda p: (
        p._page_of.pop(p._digest_of[next(iter(p._idle))]),
        p._digest_of.__setitem__(next(iter(p._idle)), p._digest_of[p.table("a")[0]]),
    ),
    "shared page not filed": lambda p: p._page_of.pop(p._digest_of.pop(p.table("a")[0])),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_check_integrity_detects(name):
    pool = pool_with_everything()
    pool.check_integrity()
    CORRUPTIONS[name](pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations, beside a model that knows what each slot holds: a reused slot must hold its token.

    ``content[page]`` is the sequence of tokens, from the beginning, whose keys the page's slots stand for.
    """

    @initialize(num_pages=st.integers(1, 8), page_size=st.integers(1, 3))
    def start(self, num_pages, page_size):
        self.pool = PagePool(num_pages, page_size)
        self.content: dict[int, tuple[int, ...]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.committed: dict[str, int] = {}
        self.count = 0

    @rule(tokens=st.lists(st.integers(0, 1), max_size=9), short=st.integers(0, 2))
    def open(self, tokens, short):
        name = f"r{self.count}"
        self.count += 1
        limit = max(0, len(tokens) - short)
        reused = self.pool.allocate(name, tokens, limit)
        size = self.pool.page_size
        assert reused <= limit
        assert reused == size * len(self.pool.table(name))
        for index, page in enumerate(self.pool.table(name)):
            assert self.content[page] == tuple(tokens[: (index + 1) * size]), "the page holds other keys"
        self.tokens[name], self.committed[name] = list(tokens), reused

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), ahead=st.integers(0, 6))
    def reserve(self, data, ahead):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        before, table = state(self.pool), list(self.pool.table(name))
        if self.pool.reserve(name, len(self.tokens[name]) + ahead):
            fresh = self.pool.table(name)[len(table) :]
            assert self.pool.table(name)[: len(table)] == table
            held = {page for other in self.tokens if other != name for page in self.pool.table(other)}
            assert not held & set(fresh)
            for page in fresh:
                self.content[page] = ()  # scratch
        else:
            assert state(self.pool) == before

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), grow=st.lists(st.integers(0, 1), max_size=3))
    def commit(self, data, grow):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        tokens, size = self.tokens[name], self.pool.page_size
        tokens += grow
        num_slots = size * len(self.pool.table(name))
        if num_slots < len(tokens):
            return
        for index in range(self.committed[name] // size, len(tokens) // size):
            self.content[self.pool.table(name)[index]] = tuple(tokens[: (index + 1) * size])
        self.pool.commit(name, tokens, len(tokens))
        self.committed[name] = len(tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def close(self, data):
        name = data.draw(st.sampled_from(sorted(self.tokens)))
        self.pool.free(name)
        del self.tokens[name], self.committed[name]

    @invariant()
    def intact(self):
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            held = {page for name in self.tokens for page in self.pool.table(name)}
            assert self.pool.num_available == self.pool.num_pages - len(held)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_what_is_forgotten_is_not_found_and_what_is_held_stays():
    pool = PagePool(16, 4)
    tokens, others = list(range(20)), list(range(50, 60))
    for name, held in (("a", tokens), ("b", others)):
        run(pool, name, held)
    pool.free("a")
    pool.reset_prefix_cache()
    pool.check_integrity()
    assert pool.allocate("c", tokens, 20) == 0
    assert pool.allocate("d", others, 10) == 8  # b holds these pages
    for name in ("b", "c", "d"):
        pool.free(name)
    pool.reset_prefix_cache()
    pool.check_integrity()
    assert pool.num_available == 16
    assert pool.allocate("e", others, 10) == 0
    assert pool.reserve("e", 12)
    assert pool.table("e") == [0, 1, 2]


def test_pages_are_shared_among_requests_of_one_salt():
    pool = PagePool(8, 4)
    tokens = list(range(8))
    for name, salt, found in [("a", "", 0), ("b", "x", 0), ("c", "x", 8), ("d", "", 8), ("e", "y", 0)]:
        assert pool.allocate(name, tokens, 8, salt) == found
        assert pool.reserve(name, 8)
        pool.commit(name, tokens, 8)
        pool.free(name)
        pool.check_integrity()
