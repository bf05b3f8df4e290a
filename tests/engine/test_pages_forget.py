# SPDX-License-Identifier: Apache-2.0
"""A pool that is told to forget: what a benchmark asks for, so that no run finds the prompts of the one before."""

from tests.engine.test_pages import run
from wedlm.engine.pages import PagePool


def test_what_is_forgotten_is_not_found_and_what_is_held_stays():
    pool = PagePool(16, 4)
    tokens, others = list(range(20)), list(range(50, 60))
    for name, held in (("a", tokens), ("b", others)):
        run(pool, name, held)
    pool.close("a")
    pool.forget()
    pool.check_integrity()
    assert pool.open("c", tokens, 20) == 0
    assert pool.open("d", others, 10) == 8  # b holds these pages
    for name in ("b", "c", "d"):
        pool.close(name)
    pool.forget()
    pool.check_integrity()
    assert pool.num_available == 16
    assert pool.open("e", others, 10) == 0
    assert pool.reserve("e", 12)
    assert pool.table("e") == [0, 1, 2]
