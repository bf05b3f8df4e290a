# SPDX-License-Identifier: Apache-2.0
"""The benchmark's prompts: the paper's four scenarios, everyday questions, filler of any length, random ids for random
weights. Also when requests arrive."""

import random
from dataclasses import dataclass

from wedlm.bench.shapes import FIRST_TEXT_ID
from wedlm.model.formats.tokenizer import Tokenizer

# The paper's: what follows a pattern is fast, what is open is not.
SCENARIOS = {
    "counting": "Count from 1 to 100. Write only the numbers, with commas between them.",
    "equation": "Solve the equation 3x + 7 = 2(x + 9) for x, step by step.",
    "code": "Write a Python function that returns all prime numbers up to n, with a short example of its use.",
    "open question": "What makes a city a good place to live? Give your own view in a few paragraphs.",
}
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the larger of two numbers.",
    "A baker sells 12 loaves in the morning and twice as many in the afternoon. How many does she sell in all?",
    "Explain in simple words why the sky is blue.",
    "List five things to pack for a day of hiking.",
    "Write a short, polite letter that moves a meeting to Tuesday.",
    "What is the difference between weather and climate?",
    "How do I boil an egg so that the yolk stays soft?",
    "Tell a short story about a lighthouse keeper and a whale.",
    "Which numbers between 10 and 30 are prime?",
    "Describe the water cycle in four sentences.",
    "Give three reasons to learn a musical instrument.",
)
_WORDS = (
    *(
        "the",
        "a",
        "river",
        "town",
        "old",
        "market",
        "bridge",
        "people",
        "morning",
        "letter",
        "garden",
        "winter",
        "small",
    ),
    *("train", "window", "story", "teacher", "road", "music", "evening", "light", "house", "water", "paper", "green"),
    *("table", "quiet", "answer", "number", "street", "summer", "child", "work", "long", "bread", "stone", "field"),
    *("carried", "found", "opened", "crossed", "watched", "built", "followed", "repaired", "counted", "and", "while"),
)
_SHORTEST, _LONGEST = 16, 1024  # prompts that arrive, in tokens


@dataclass(frozen=True)
class Arrival:
    """A prompt that comes ``at_s`` seconds after the start and wants at most ``max_tokens`` tokens."""

    at_s: float
    prompt: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Prompts:
    """Prompts for a checkpoint, or random ids for random weights (``tokenizer`` None); always the same ones."""

    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int

    def of(self, number: int, length: int | None) -> list[int]:
        """A prompt. ``length`` None gives a plain question, for checkpoints only."""
        if self.tokenizer is None:
            assert length is not None
            rng = random.Random(f"{number} {length}")
            return [rng.randrange(FIRST_TEXT_ID, self.vocab_size) for _ in range(length)]
        asked = self.ask(QUESTIONS[number % len(QUESTIONS)])
        if length is None:
            return asked
        return [*self.tokenizer.encode(_filler(number, length), False)[: max(0, length - len(asked))], *asked][-length:]

    def ask(self, question: str) -> list[int]:
        """A question to a checkpoint, in its chat template if it has one."""
        assert self.tokenizer is not None
        if not self.tokenizer.has_chat_template:
            return self.tokenizer.encode(question, True)
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.encode_chat(messages)

    def counting(self, number: int) -> list[int]:
        """A prompt that asks to count; each number gives a different one."""
        first, last = 1 + 7 * number, 150 + 7 * number
        return self.ask(f"Count from {first} to {last}. Write only the numbers, with commas between them.")

    def batch(self, count: int, length: int | None, max_tokens: int) -> list[Arrival]:
        """Requests that are all there at once."""
        return [Arrival(0.0, self.of(number, length), max_tokens) for number in range(count)]

    def arrivals(self, count: int, most: int, rate: float) -> list[Arrival]:
        """Arrivals of ``rate`` requests a second on average, with exponential times between them (infinite: all at
        once). Prompts have 16 to 1,024 tokens, log-uniform, and answers a quarter of ``most`` up to all of it."""
        rng = random.Random("arrivals")
        longest = min(_LONGEST, self.max_model_len - most)
        found, now = [], 0.0
        for number in range(count):
            length = round(_SHORTEST * (longest / _SHORTEST) ** rng.random())
            answer = max(1, round(most * rng.uniform(0.25, 1.0)))
            found.append(Arrival(now, self.of(1000 + number, length), answer))
            now += rng.expovariate(1.0) / rate
        return found


def _filler(number: int, num_words: int) -> str:
    """English words in sentences without sense, different for each ``number``."""
    rng, sentences, left = random.Random(f"filler {number}"), [], num_words
    while left > 0:
        length = min(left, rng.randint(6, 14))
        sentences.append(" ".join(rng.choice(_WORDS) for _ in range(length)).capitalize() + ".")
        left -= length
    return " ".join(sentences)
