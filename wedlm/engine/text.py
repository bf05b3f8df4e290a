# SPDX-License-Identifier: Apache-2.0
"""Token ids to text while they arrive: whole characters only, and never past a stop string."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What a tokenizer must offer here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class TextStream:
    """The text of one request, growing token by token.

    ``text`` holds whole characters; bytes of an unfinished one wait for the tokens that complete it. ``stable`` is how
    much of ``text`` can no longer be taken back, i.e. may be streamed: a tail that might begin a stop string waits.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # ids[_context:_read] have been turned into text; they are decoded again with what follows, because a
        # tokenizer may render a token by its left neighbour (leading spaces).
        self._context = self._read = 0
        self.text = ""

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Add a token. True if a stop string is complete: ``text`` then ends just before it."""
        self._ids.append(token)
        before = len(self.text)
        known, whole = self._decode(self._read), self._decode(len(self._ids))
        if len(whole) <= len(known) or whole.endswith("\ufffd"):
            return False
        self._append(whole[len(known) :])
        return may_stop and self._cut(before)

    def finish(self) -> None:
        """No token follows: bytes that never became a character turn into the replacement character."""
        known, whole = self._decode(self._read), self._decode(len(self._ids))
        self._append(whole[len(known) :])

    @property
    def stable(self) -> int:
        """Length of the prefix of ``text`` that no stop string can take back."""
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:size]):
                    held = size
                    break
        return len(self.text) - held

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._context : end], skip_special_tokens=True)

    def _append(self, new: str) -> None:
        self.text += new
        self._context, self._read = self._read, len(self._ids)

    def _cut(self, before: int) -> bool:
        """Cut the text at the earliest stop string that touches what came after ``before``."""
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        found = [at for at in found if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)
