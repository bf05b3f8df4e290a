# SPDX-License-Identifier: Apache-2.0
"""Stage 0: more prompts, and numbers to count. ``python prompts.py DATA_DIR OUT_DIR``

``gsm8k_numbers.jsonl``: GSM8K's training questions with other numbers, five times each. Their answers will be the
model's own, right or wrong: what is learnt from them is its manner. ``counting.jsonl``: conversations that count.
"""

import gzip
import json
import random
import re
import sys
from pathlib import Path

VARIANTS = 5
NUMBER = re.compile(r"(?<![\d.,/:])\d{1,4}(?![\d/:]|[.,]\d)")
ASKING = [
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Count up from {a} to {b}",
    "count from {a} to {b}",
    "List the numbers from {a} to {b}.",
    "Write all whole numbers from {a} to {b}.",
    "Write down the integers from {a} to {b}, in order.",
    "Print the numbers {a} through {b}.",
    "Please list every integer between {a} and {b}, both included.",
    "Start at {a} and count to {b}.",
    "I want to see all numbers from {a} up to {b}.",
]
SEPARATORS = [("", ", "), ("", ", "), ("", ", "), (" One number a line.", "\n"), (" Separate them by spaces.", " ")]
HELD_OUT = (1, 100)  # what is measured


def other_numbers(question: str, rng: random.Random) -> str:
    """Each number of the question replaced by another of about its size, the same one everywhere."""
    chosen: dict[str, str] = {}

    def replace(match: re.Match[str]) -> str:
        text = match.group()
        if text not in chosen:
            value = int(text)
            chosen[text] = str(rng.randint(max(1, value // 2), 2 * value + 2)) if value else text
        return chosen[text]

    return NUMBER.sub(replace, question)


def counting(rng: random.Random, count: int) -> list[dict]:
    """Conversations; half of them count from 1."""
    found: list[dict] = []
    while len(found) < count:
        first = 1 if rng.random() < 0.5 else rng.randint(0, 150)
        last = first + (rng.choice([9, 19, 29, 49, 119, 149]) if rng.random() < 0.3 else rng.randint(4, 150))
        if (first, last) == HELD_OUT:
            continue
        words, separator = rng.choice(SEPARATORS)
        question = rng.choice(ASKING).format(a=first, b=last)
        if words and question[-1] not in ".?":
            question += "."
        answer = separator.join(str(n) for n in range(first, last + 1)) + ("." if separator == ", " else "")
        found.append(
            {"messages": [{"role": "user", "content": question + words}, {"role": "assistant", "content": answer}]}
        )
    return found


def write(rows: list[dict], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main(data: Path, out: Path) -> None:
    rng = random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    with gzip.open(data / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as file:
        questions = [json.loads(line)[0]["content"] for line in file]
    made = dict.fromkeys(other_numbers(question, rng) for _ in range(VARIANTS) for question in questions)
    known = set(questions)
    variants = [text for text in made if text not in known]
    unanswered = {"role": "assistant", "content": "(to come)"}  # a file of conversations needs one
    write(
        [{"messages": [{"role": "user", "content": text}, unanswered]} for text in variants],
        out / "gsm8k_numbers.jsonl",
    )
    write(counting(rng, 3000), out / "counting.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
