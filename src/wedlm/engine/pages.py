# SPDX-License-Identifier: Apache-2.0
"""Pages of the key/value cache: who holds which, and which may be shared by requests with the same prefix."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

_ROOT = b"wedlm"


class PagePool:
    """``num_pages`` pages of ``page_size`` slots, one table of pages per request.

    A page is shared only once it is full of tokens whose keys are committed: ``commit`` then files it under a digest of
    its tokens and all before it. Pages reserved ahead for a window hold scratch and are filed nowhere. A filed page
    that nobody holds stays until its memory is needed (least recently used goes first). ``salt`` keeps apart keys of
    different weights or adapters.
    """

    def __init__(self, num_pages: int, page_size: int, salt: bytes = b"") -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages is {num_pages} and page_size {page_size}; expected both to be at least 1")
        self.num_pages, self.page_size = num_pages, page_size
        self._root = hashlib.blake2b(_ROOT + salt, digest_size=16).digest()
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # filed, held by nobody; oldest first
        self._holders = [0] * num_pages
        self._tables: dict[str, list[int]] = {}
        self._num_filed: dict[str, int] = {}  # leading pages of a table that are filed or were found filed already
        self._digests: dict[str, bytes] = {}  # digest of those leading pages
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Pages that could be handed out now."""
        return len(self._free) + len(self._idle)

    def table(self, request_id: str) -> list[int]:
        """The request's pages in logical order."""
        return self._tables[request_id]

    def pages_for(self, num_slots: int) -> int:
        return -(-num_slots // self.page_size)

    def open(self, request_id: str, tokens: Sequence[int], limit: int) -> int:
        """Give the request a table that starts with the filed pages of ``tokens[:limit]``; returns slots reused."""
        assert request_id not in self._tables
        table: list[int] = []
        digest = self._root
        for end in range(self.page_size, limit + 1, self.page_size):
            following = _digest(digest, tokens[end - self.page_size : end])
            page = self._page_of.get(following)
            if page is None:
                break
            digest = following
            self._hold(page)
            table.append(page)
        self._tables[request_id] = table
        self._num_filed[request_id], self._digests[request_id] = len(table), digest
        return len(table) * self.page_size

    def reserve(self, request_id: str, num_slots: int) -> bool:
        """Let the request's table cover ``num_slots`` slots. False, and nothing changes, if pages do not suffice."""
        table = self._tables[request_id]
        if num_slots <= len(table) * self.page_size:
            return True
        missing = self.pages_for(num_slots) - len(table)
        if missing > self.num_available:
            return False
        table.extend(self._take() for _ in range(missing))
        return True

    def commit(self, request_id: str, tokens: Sequence[int], num_committed: int) -> None:
        """File the pages that ``tokens[:num_committed]``, whose keys are final, have filled."""
        size = self.page_size
        while (index := self._num_filed[request_id]) < num_committed // size:
            table = self._tables[request_id]
            digest = _digest(self._digests[request_id], tokens[index * size : (index + 1) * size])
            if digest not in self._page_of:
                self._page_of[digest] = table[index]
                self._digest_of[table[index]] = digest
            self._num_filed[request_id], self._digests[request_id] = index + 1, digest

    def close(self, request_id: str) -> None:
        """Take back all pages of the request; filed ones stay findable."""
        for page in reversed(self._tables.pop(request_id)):  # a prefix outlives what follows it
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
        del self._num_filed[request_id], self._digests[request_id]

    def forget(self) -> None:
        """Let no later request find what is filed now and held by nobody; pages are handed out in order again."""
        while self._idle:
            page, _ = self._idle.popitem()
            del self._page_of[self._digest_of.pop(page)]
            self._free.append(page)
        self._free.sort(reverse=True)

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] += 1

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._holders[page] = 1
        return page

    def check_integrity(self) -> None:
        """AssertionError unless every page is free, idle or held (one of these) and only filed pages are shared."""
        held: dict[int, int] = {}
        for request_id, table in self._tables.items():
            assert len(set(table)) == len(table), f"{request_id} holds a page twice"
            for index, page in enumerate(table):
                held[page] = held.get(page, 0) + 1
                assert page not in self._digest_of or index < self._num_filed[request_id], (
                    f"page {page} is filed but not full and committed in {request_id}"
                )
        for page, count in held.items():
            assert count == 1 or page in self._digest_of, f"page {page} is shared but not filed"
        assert self._holders == [held.get(page, 0) for page in range(self.num_pages)], "holder counts are off"
        everywhere = sorted([*self._free, *self._idle, *held])
        assert everywhere == list(range(self.num_pages)), "a page is lost or in two places"
        assert all(page in self._digest_of for page in self._idle), "an idle page is not filed"
        assert all(page not in self._digest_of for page in self._free), "a free page is still filed"
        assert {p: d for d, p in self._page_of.items()} == self._digest_of, "digests and pages disagree"
        assert len(self._page_of) == len(self._digest_of), "a page is filed twice"


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
