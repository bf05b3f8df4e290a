# SPDX-License-Identifier: Apache-2.0
"""Pages of the key/value cache: which request holds which, and which may be shared by requests with the same prefix."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

_ROOT = b"wedlm"


class TokenSlices(Protocol):
    """Tokens by slot, as the pool sees them: equal prefixes must mean equal keys."""

    def __getitem__(self, part: slice, /) -> Sequence[int]: ...


class PagePool:
    """``num_pages`` pages of ``page_size`` slots, one table of pages per request.

    A page is shared only once it is full of tokens whose keys are committed. ``commit`` then puts it into the prefix
    cache, under a digest of its tokens and all before it. Pages reserved ahead for a window hold scratch and are not
    cached. A cached page without a holder stays until its memory is needed (the least recently used goes first).
    ``cache_salt`` separates keys of different weights. ``block_length``: keys, and so a page's digest, depend on the
    tokens up to the end of their block of this many slots; with 1 they depend on no later token.
    """

    def __init__(self, num_pages: int, page_size: int, cache_salt: bytes = b"", block_length: int = 1) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages is {num_pages} and page_size {page_size}; expected both to be at least 1")
        self.num_pages, self.page_size, self.block_length = num_pages, page_size, block_length
        self._root = hashlib.blake2b(_ROOT + cache_salt, digest_size=16).digest()
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, without a holder; oldest first
        self._holders = [0] * num_pages
        self._tables: dict[str, list[int]] = {}
        self._num_cached_pages: dict[str, int] = {}  # leading pages of a table that the prefix cache has
        self._digests: dict[str, bytes] = {}  # digest of those leading pages
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """The number of pages that could be handed out now."""
        return len(self._free) + len(self._idle)

    def table(self, request_id: str) -> list[int]:
        """The request's pages in logical order."""
        return self._tables[request_id]

    def _stop(self, index: int) -> int:
        """The number of tokens on which the keys of page ``index`` of a table, and of those before it, depend."""
        return -(-(index + 1) * self.page_size // self.block_length) * self.block_length

    def pages_for(self, num_slots: int) -> int:
        return -(-num_slots // self.page_size)

    def allocate(self, request_id: str, tokens: TokenSlices, limit: int, salt: str = "", key_root: int = 0) -> int:
        """Give the request a table that starts with the cached pages of ``tokens[:limit]``, and return the number of
        slots reused. Requests share pages if they have the same ``salt`` and ``key_root``, which stands for the adapter
        that changes keys (0: none does)."""
        assert request_id not in self._tables
        table: list[int] = []
        digest = _marked(self._root, b"adapter", str(key_root)) if key_root else self._root
        digest = _marked(digest, b"salt", salt) if salt else digest
        while (stop := self._stop(len(table))) <= limit:
            following = _digest(digest, tokens[len(table) * self.page_size : stop])
            page = self._page_of.get(following)
            if page is None:
                break
            digest = following
            table.append(page)
        for page in table:  # only now: an error above must leave no page held without a table
            self._ref(page)
        self._tables[request_id] = table
        self._num_cached_pages[request_id], self._digests[request_id] = len(table), digest
        return len(table) * self.page_size

    def reserve(self, request_id: str, num_slots: int) -> bool:
        """Extend the request's table to ``num_slots`` slots. Returns False, and changes nothing, if there are too few
        pages."""
        table = self._tables[request_id]
        if num_slots <= len(table) * self.page_size:
            return True
        missing = self.pages_for(num_slots) - len(table)
        if missing > self.num_available:
            return False
        table.extend(self._take_page() for _ in range(missing))
        return True

    def commit(self, request_id: str, tokens: TokenSlices, num_committed: int) -> None:
        """Put the pages that ``tokens[:num_committed]``, whose keys are final, have filled into the prefix cache."""
        size = self.page_size
        while (stop := self._stop(index := self._num_cached_pages[request_id])) <= num_committed:
            table = self._tables[request_id]
            digest = _digest(self._digests[request_id], tokens[index * size : stop])
            if digest not in self._page_of:
                self._page_of[digest] = table[index]
                self._digest_of[table[index]] = digest
            self._num_cached_pages[request_id], self._digests[request_id] = index + 1, digest

    def free(self, request_id: str) -> None:
        """Take back all pages of the request; cached ones can still be found."""
        for page in reversed(self._tables.pop(request_id)):  # a prefix outlives what follows it
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        del self._num_cached_pages[request_id], self._digests[request_id]

    def reset_prefix_cache(self) -> None:
        """Make cached pages without a holder impossible to find; pages are handed out in order again."""
        while self._idle:
            page, _ = self._idle.popitem()
            del self._page_of[self._digest_of.pop(page)]
            self._free.append(page)
        self._free.sort(reverse=True)

    def _ref(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] += 1

    def _take_page(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._holders[page] = 1
        return page

    def check_integrity(self) -> None:
        """Raises AssertionError unless every page is free, idle or held (exactly one of these) and only cached pages
        are shared."""
        held: dict[int, int] = {}
        for request_id, table in self._tables.items():
            assert len(set(table)) == len(table), f"{request_id} holds a page twice"
            for index, page in enumerate(table):
                held[page] = held.get(page, 0) + 1
                assert page not in self._digest_of or index < self._num_cached_pages[request_id], (
                    f"page {page} is cached but not full and committed in {request_id}"
                )
        for page, count in held.items():
            assert count == 1 or page in self._digest_of, f"page {page} is shared but not cached"
        assert self._holders == [held.get(page, 0) for page in range(self.num_pages)], "holder counts are off"
        everywhere = sorted([*self._free, *self._idle, *held])
        assert everywhere == list(range(self.num_pages)), "a page is lost or in two places"
        assert all(page in self._digest_of for page in self._idle), "an idle page is not cached"
        assert all(page not in self._digest_of for page in self._free), "a free page is still cached"
        assert {p: d for d, p in self._page_of.items()} == self._digest_of, "digests and pages disagree"
        assert len(self._page_of) == len(self._digest_of), "a page is cached twice"


def _marked(root: bytes, what: bytes, value: str) -> bytes:
    """A marker that never equals a page's digest, because no token's eight bytes are letters."""
    return hashlib.blake2b(root + what + value.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
