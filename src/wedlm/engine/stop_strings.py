# SPDX-License-Identifier: Apache-2.0
"""Search for several strings in a growing text at once, reading each character once: the automaton of Aho and
Corasick."""

import functools
from collections import deque
from collections.abc import Sequence


@functools.lru_cache(maxsize=16)  # the choices of a request share theirs
def automaton_of(strings: tuple[str, ...]) -> "StopStrings":
    return StopStrings(strings)


class StopStrings:
    """A state is the longest beginning of any of the strings that the text ends with; 0 is the empty one."""

    def __init__(self, strings: Sequence[str]) -> None:
        """The strings must not be empty."""
        self._next: dict[tuple[int, str], int] = {}
        self._shorter = [0]  # the next longest beginning that the text then ends with, too
        self._complete = [0]  # length of the longest string that the text then ends with; 0: none
        self._begun = [0]  # length of the longest beginning that is not a whole string yet
        children: list[list[str]] = [[]]
        for string in strings:
            state = 0
            for character in string:
                if (state, character) not in self._next:
                    self._next[state, character] = len(children)
                    children[state].append(character)
                    children.append([])
                    self._shorter.append(0)
                    self._complete.append(0)
                    self._begun.append(0)
                state = self._next[state, character]
            self._complete[state] = len(string)
        self._link(children)

    def _link(self, children: list[list[str]]) -> None:
        """Link each beginning to shorter ones, which are known before longer ones."""
        queue = deque([(0, 0)])
        while queue:
            state, length = queue.popleft()
            shorter = self._shorter[state]
            self._complete[state] = self._complete[state] or self._complete[shorter]
            self._begun[state] = length if children[state] else self._begun[shorter]
            for character in children[state]:
                child = self._next[state, character]
                if state:
                    self._shorter[child] = self.after(shorter, character)
                queue.append((child, length + 1))

    def after(self, state: int, character: str) -> int:
        """The state after one more character."""
        while (following := self._next.get((state, character))) is None and state:
            state = self._shorter[state]
        return following or 0

    def complete(self, state: int) -> int:
        """The length of the longest string that the text ends with; 0 for none."""
        return self._complete[state]

    def begun(self, state: int) -> int:
        """The length of the longest end of the text that may still become a string with what follows."""
        return self._begun[state]
