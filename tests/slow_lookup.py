# SPDX-License-Identifier: Apache-2.0
"""The slow twin of ``wedlm.algorithm.lookup.TextLookup``: it compares everything with everything."""

from collections.abc import Sequence

from wedlm.algorithm.lookup import SHORTEST


def common(text: list[int], place: int, most: int) -> int:
    """The longest common end of the text and of its first ``place`` tokens, up to ``most``."""
    return max(n for n in range(min(most, place) + 1) if text[place - n : place] == text[len(text) - n :])


class SlowLookup:
    """Asked for a growing text. ``ends``: tokens after which nothing is proposed."""

    def __init__(self, longest: int = 32, candidates: int = 16, ends: Sequence[int] = ()) -> None:
        self.longest, self.candidates, self.ends = longest, candidates, ends
        self.known, self.source, self.length = 0, 0, 0

    def find(self, text: list[int]) -> tuple[int, int]:
        """(length, source) of the match."""
        for token in text[self.known :]:  # a match goes on, or ends
            goes_on = self.source > 0 and text[self.source] == token
            self.source, self.length = (self.source + 1, self.length + 1) if goes_on else (0, 0)
        self.known = len(text)
        if self.length < self.longest:
            places = [p for p in range(len(text) - 1, SHORTEST - 1, -1) if common(text, p, SHORTEST) == SHORTEST]
            for place in places[: self.candidates]:
                length = common(text, place, self.longest)
                if length > self.length:
                    self.source, self.length = place, length
        return (self.length, self.source) if self.length >= SHORTEST else (0, 0)

    def propose(self, text: list[int]) -> list[int]:
        """All that a step could take: tokens as they follow the match, again and again."""
        _, source = self.find(text)
        tokens: list[int] = []
        while source and len(tokens) < 64 and not (tokens and tokens[-1] in self.ends):
            tokens.append((text + tokens)[source + len(tokens)])
        return tokens
