# SPDX-License-Identifier: Apache-2.0
"""Turn token ids into text while they arrive: whole characters only, and never past a stop string."""

from collections.abc import Sequence
from typing import Protocol

from wedlm.engine.stop_strings import automaton_of


class TokenDecoder(Protocol):
    """What a tokenizer must offer here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class EngineTokenizer(TokenDecoder, Protocol):
    """What the engine asks of a tokenizer."""

    @property
    def drops_first_space(self) -> bool:
        """Whether ``decode`` drops the space that a text's first token begins with, as SentencePiece's does."""

    def special_token_id(self, text: str) -> int | None:
        """The id of a special token, which ``decode`` leaves out, given its text."""


class TextStream:
    """The text of one request, growing token by token.

    ``text`` holds whole characters; bytes of an unfinished one wait for the tokens that complete it. ``stable`` is how
    much of ``text`` is final and may be streamed; a tail that might begin a stop string waits. ``ends[i]`` is where the
    text ended after token i, before any stop string was cut off.
    """

    def __init__(
        self,
        tokenizer: TokenDecoder,
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
        *,
        keep_stop: bool = False,
    ) -> None:
        """``before``: the preceding tokens, if they change how the first one is spelled. ``keep_stop``: keep a stop
        string that ends the text."""
        self._keep_stop = keep_stop
        self._tokenizer = tokenizer
        self._stop = automaton_of(tuple(stop)) if stop else None
        self._state = 0  # of the automaton after ``text``
        self._ids = list(before)
        # ids[_context:_read] ended on a character's border; they are decoded again with what follows, because a
        # tokenizer may render a token by its left neighbour (leading spaces). The first _known characters of
        # ids[_context:] are in the text.
        self._context, self._read = 0, len(self._ids)
        self._known = len(self._decode().rstrip("\ufffd")) if self._ids else 0
        self.text = ""
        self.ends: list[int] = []

    def push(self, token: int, may_stop: bool = True) -> bool:
        """Add a token. Returns True if a stop string is complete; ``text`` then ends just before it, or with it."""
        self._ids.append(token)
        before = len(self.text)
        whole = self._decode()
        self._append(whole.rstrip("\ufffd"))
        if self._known == len(whole) > 0 and len(self.text) > before:
            self._context, self._read = self._read, len(self._ids)
            self._known = len(self._decode())
        self.ends.append(len(self.text))
        return self._read_on(before, may_stop)

    def finish(self) -> None:
        """No token follows: bytes that never became a character turn into the replacement character."""
        before = len(self.text)
        self._append(self._decode())
        self._read_on(before, may_stop=False)

    @property
    def stable(self) -> int:
        """The length of the prefix of ``text`` that no stop string can take back."""
        return len(self.text) - (0 if self._stop is None else self._stop.begun(self._state))

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._context :], skip_special_tokens=True)

    def _append(self, whole: str) -> None:
        """Append what is new in ``whole``, the text of ids[_context:]."""
        self.text += whole[self._known :]
        self._known = max(self._known, len(whole))

    def _read_on(self, start: int, may_stop: bool) -> bool:
        """Look for stop strings that are complete after ``start``. Returns True if the text was cut at the first of
        them, and at the longest if there are several.

        "First" goes by their end, not their beginning, so that the text does not depend on where tokens end.
        """
        if self._stop is None:
            return False
        for end in range(start, len(self.text)):
            self._state = self._stop.after(self._state, self.text[end])
            length = self._stop.complete(self._state)
            if length and may_stop:
                cut = end + 1 if self._keep_stop else end + 1 - length
                self.text, self._state = self.text[:cut], 0
                return True
        return False
