# SPDX-License-Identifier: Apache-2.0
"""``TextStream`` that searches its text for every stop string after every token: the slow twin of the automaton."""

from collections.abc import Sequence

from wedlm.engine.text import TextStream, TokenDecoder


class SearchingText(TextStream):
    """As ``TextStream``."""

    def __init__(self, tokenizer: TokenDecoder, stop: Sequence[str] = ()) -> None:
        super().__init__(tokenizer)
        self._strings = tuple(stop)

    @property
    def stable(self) -> int:
        held = 0
        for stop in self._strings:
            for size in range(min(len(stop) - 1, len(self.text)), held, -1):
                if self.text.endswith(stop[:size]):
                    held = size
                    break
        return len(self.text) - held

    def _read_on(self, start: int, may_stop: bool) -> bool:
        ends = [
            (at + len(stop), at)
            for stop in self._strings
            if (at := self.text.find(stop, max(0, start - len(stop) + 1))) >= 0
        ]
        if may_stop and ends:
            self.text = self.text[: min(ends)[1]]
        return may_stop and bool(ends)
